"""The configuration of a run: its schema, its registration with Hydra, and from the composed tree to typed
objects.

Methods, benchmarks and models are dataclasses of the library; they are their own schema, so an unknown key
or a wrong type fails while composing, with the full key. What is asked on the command line is checked
earlier, in overrides.py; what the settings mean together, in checks.py.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from hcache import records
from hcache.budget import Budget
from hcache.geometry import Geometry
from hcache.models import ModelSpec
from hcache.models.source import local_directory
from hcache.registry import unknown_name

CONF = Path(__file__).resolve().parent.parent / "conf"
_WEIGHTS = (".safetensors", ".bin")
GRAPHS, COMPILE = ("auto", "off", "on"), ("off", "default", "tuned")
"""Choices of runtime.graphs and runtime.compile (hcache.engine.EngineSettings, which imports torch)."""

DEFAULT_FRACTION = 0.25
"""Kept where neither budget.kept_fraction nor budget.kept_tokens is set."""


class ConfigError(ValueError):
    """The configuration asks for something that can't be; the message is for the user, in one line."""


class TrackerMode(Enum):
    """How the W&B client works: beside the outputs, or against its server."""

    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class BudgetConfig:
    """At most one of the two; see hcache.Budget."""

    kept_fraction: float | None = None
    kept_tokens: int | None = None


@dataclass
class RunnerConfig:
    """Which runner does the work: a module of `runners` with a function `run`.

    Args:
        trace: examples of each task that leave what was kept of them (runners.tracing); for evaluate.
    """

    name: str = "evaluate"
    trace: int = 0

    def __post_init__(self) -> None:
        if self.trace < 0 or (self.trace and self.name != "evaluate"):
            raise ConfigError(
                f"runner.trace={self.trace} must be 0, or for runner=evaluate a number of examples a task"
            )


@dataclass
class RuntimeConfig:
    """The machine's side of a run.

    Args:
        device: auto (CUDA if there is one), cpu, cuda, cuda:1 ...
        batch_size: sequences that decode side by side.
        seed: of everything random while generating.
        threads: CPU threads of torch; None leaves torch's own choice.
        graphs: decode steps as CUDA graphs: auto (where they can be), off, on (an error where they can't).
        compile: decoder layers through torch.compile in captured decoding: off, default, tuned.
        temperature, top_p: how a token is drawn; temperature 0 takes the most likely one.
    """

    device: str = "auto"
    batch_size: int = 1
    seed: int = 0
    threads: int | None = None
    graphs: str = "auto"
    compile: str = "off"
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"runtime.batch_size={self.batch_size} must be at least 1")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(
                f"runtime.threads={self.threads} must be at least 1, or null for torch's own choice"
            )
        for key, allowed in (("graphs", GRAPHS), ("compile", COMPILE)):
            if getattr(self, key) not in allowed:
                raise ConfigError(unknown_name(f"runtime.{key}", getattr(self, key), allowed))
        if self.temperature < 0 or not 0 < self.top_p <= 1 or (self.top_p < 1 and not self.temperature):
            raise ConfigError(
                f"runtime.temperature={self.temperature} must be 0 (greedy) or more, and "
                f"runtime.top_p={self.top_p} above 0 and at most 1, where it is below 1 with a temperature"
            )


@dataclass
class TrackerConfig:
    """Who else is told about a run. `mode` null: the environment's WANDB_MODE, else offline."""

    name: str = "none"
    project: str = "hcache"
    entity: str | None = None
    mode: TrackerMode | None = None


@dataclass
class RunConfig:
    """The root of the configuration: everything one cell needs. `method` and `benchmark` are library
    dataclasses.

    `profile`, `budget_table`, `latency` and `score` hold the settings of runner=profile, runner=budget,
    runner=latency and runner=score, null for others.
    """

    model: ModelSpec = field(default_factory=ModelSpec)
    method: Any = None
    benchmark: Any = None
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    profile: Any = None
    budget_table: Any = None
    latency: Any = None
    score: Any = None
    plugins: list[str] = field(default_factory=list)
    outputs: str = "outputs"
    tag: str = "default"


def schema_of(cls: type) -> DictConfig:
    """`cls` as a schema that YAML may fill: OmegaConf makes frozen classes read-only, nested ones too."""
    node = OmegaConf.structured(cls)
    assert isinstance(node, DictConfig)
    _unlock(node)
    return node


def _unlock(node: DictConfig) -> None:
    OmegaConf.set_readonly(node, None)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            _unlock(child)


def register(plugins: Sequence[str] = ()) -> None:
    """Put every schema into Hydra's ConfigStore: the root, and each method and benchmark known by name.

    A method without a YAML file of its own (a plug-in) also becomes a choice of the group `method`.

    Raises:
        ValueError: a plug-in file that isn't there.
    """
    from hcache.benchmarks import BENCHMARKS
    from hcache.methods import METHODS, load_file

    for path in plugins:
        load_file(path)
    store = ConfigStore.instance()
    root, spec = schema_of(RunConfig), schema_of(ModelSpec)
    # conf/model/hf.yaml leaves the path to the user, and `???` in a file doesn't unset a value.
    root.model.path = spec.path = MISSING
    store.store(name="run", group="schema", node=root)
    store.store(name="spec", group="schema/model", node=spec)
    for group, registry in (("method", METHODS), ("benchmark", BENCHMARKS)):
        for name in registry.names():
            schema = schema_of(registry.get(name))
            store.store(name=name, group=f"schema/{group}", node=schema)
            if not (CONF / group / f"{name}.yaml").exists():
                store.store(name=name, group=group, node=schema)


def typed(config: DictConfig) -> RunConfig:
    """The composed tree as typed objects, which check themselves.

    Raises:
        ConfigError: a value of the wrong type or out of range, a missing value, a section without a schema.
    """
    try:
        run = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no default: set it, {error.full_key}=...") from error
    except (OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(one_line(error)) from error
    assert isinstance(run, RunConfig)
    for group in ("method", "benchmark"):
        if not dataclasses.is_dataclass(getattr(run, group)):
            raise ConfigError(
                f"{group} has no schema: begin its YAML file with "
                f"`defaults: [/schema/{group}/NAME@_here_, _self_]`"
            )
    return run


def one_line(error: BaseException) -> str:
    """An exception's message in one line, without the lines OmegaConf adds about its own types."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(
        line for line in lines if line and not line.startswith(("object_type=", "reference_type="))
    )


def budget_of(run: RunConfig) -> Budget:
    """The budget that was set, or the default one.

    Raises:
        ConfigError: both were set, or a value out of range.
    """
    fraction, tokens = run.budget.kept_fraction, run.budget.kept_tokens
    if fraction is None and tokens is None:
        return Budget(kept_fraction=DEFAULT_FRACTION)
    try:
        return Budget(kept_fraction=fraction, kept_tokens=tokens)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def plain_config(run: RunConfig) -> dict[str, Any]:
    """The whole configuration as JSON data, with the names of method and benchmark and the budget that
    counts.

    `content` says what the files are that the configuration points at, since a path itself decides nothing.
    """
    from hcache.attention.backends import resolve  # imports torch

    config = records.plain(run)
    content = {"content": _profile_content(run), "source": _plugin_source(run.method)}
    config["method"] = {"name": run.method.name, **config["method"], **content}
    config["benchmark"] = _benchmark(run, config["benchmark"])
    config["budget"] = records.plain(budget_of(run)) if run.method.uses_budget else None
    config["model"] = _model_identity(run.model, config["model"])
    config["model"]["attention"] = resolve(run.model.attention, _device_type(run.runtime.device))[0]
    return config


def _device_type(device: str) -> str:
    """cpu or cuda, as the model's loading will decide."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device.partition(":")[0]


def _benchmark(run: RunConfig, section: dict[str, Any]) -> dict[str, Any]:
    """What is run: the benchmark's settings, or those of runner=latency, which has no examples."""
    if run.runner.name != "latency":
        return {"name": run.benchmark.name, **section, **records.plain(run.benchmark.identity())}
    from runners.latency_settings import settings_of  # which imports this module

    # Captured steps compute the same as others, but not in the same time.
    return {"name": "latency", **records.plain(settings_of(run.latency)), "graphs": run.runtime.graphs}


def _model_identity(spec: ModelSpec, section: dict[str, Any]) -> dict[str, Any]:
    """A model on this machine is what its files hold; one of the Hub is its id and revision.

    Random weights are their shape; other models don't name one.
    """
    shape = section.pop("shape")
    if spec.random:
        return {**section, "shape": shape, "content": records.text_digest(json.dumps(shape, sort_keys=True))}
    directory = local_directory(spec)
    if directory is None:
        return {**section, "content": f"{spec.path}@{spec.revision or 'main'}"}
    files = [path for path in directory.glob("*") if path.name == "config.json" or path.suffix in _WEIGHTS]
    return {**section, "content": records.content_digest(files)}


def _profile_content(run: RunConfig) -> str | None:
    """A digest of the head profile a method goes by, whether it was named or found for the model.

    None without one: a method that needs it refuses to run, and says what to do.
    """
    if run.method.profiled is None:
        return None
    from hcache.profiling import find_profile, load_profile  # imports torch
    from runners.synthetic import synthetic_profile

    path = run.method.profiled.profile
    find = synthetic_profile if run.model.random else find_profile
    try:
        profile = find(geometry_of(run.model)) if path is None else load_profile(path)
    except ValueError:
        return None
    if profile.stability is None:  # the published format: roles without scores
        return records.content_digest([Path(path).expanduser()])
    scores = [
        profile.stability,
        *(profile.similarity[graph] for graph in sorted(profile.similarity, key=str)),
    ]
    own = {key: value for key, value in profile.settings.items() if key.endswith("_threshold")}
    return records.text_digest(json.dumps([[score.tolist() for score in scores], own], sort_keys=True))


def _plugin_source(method: Any) -> str | None:
    """A digest of the file a method from outside the library is in; None for the library's own."""
    import hcache  # light by itself

    file = Path(inspect.getfile(type(method))).resolve()
    inside = file.is_relative_to(Path(str(hcache.__file__)).resolve().parent)
    return None if inside else records.content_digest([file])


@lru_cache(maxsize=64)
def geometry_of(spec: ModelSpec) -> Geometry:
    """The model's geometry before it is loaded, with its fingerprint where its files are here."""
    from hcache.models import geometry  # imports torch

    return geometry(spec, weights=True)


def cell_of(run: RunConfig, config: dict[str, Any]) -> records.Cell:
    """The cell that `run` is, from its plain configuration; FullKV has one cell whatever the budget."""
    return records.Cell(
        tag=run.tag,
        model=run.model.name,
        benchmark=config["benchmark"]["name"],
        method=run.method.name,
        budget=budget_of(run).label if run.method.uses_budget else "full",
        seed=run.runtime.seed,
        config_hash=records.config_hash(config),
    )
