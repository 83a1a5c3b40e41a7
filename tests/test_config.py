"""Configuration: every shipped file composes, the default is frozen, what is wrong is said early."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from hcache.benchmarks import BENCHMARKS
from hcache.methods import METHODS
from hcache.methods.heterocache import HeteroCache, RoleSettings
from hcache.methods.snapkv import SnapKV
from hcache.models import ModelSpec
from hcache.scoring import Pooling
from runners import checks, overrides
from runners.config import (
    CONF,
    BudgetConfig,
    ConfigError,
    RunConfig,
    TrackerMode,
    budget_of,
    register,
    schema_of,
    typed,
)
from runners.plan import compose_all
from runners.usage import usage

ROOT = CONF.parent
FILES = sorted(path for path in CONF.rglob("*.yaml") if "local" not in path.parts)


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register()


def compose(*lines: str, multirun: bool = False) -> list[RunConfig]:
    """As run.py: checked on the command line, then composed."""
    parsed = overrides.parse(lines)
    if not multirun:
        overrides.check_single(parsed)
    overrides.check(parsed)
    return compose_all(lines, multirun)


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


# --- what is shipped


def test_composed_default_is_frozen() -> None:
    """The configuration is an interface: change this test with care."""
    (run,) = compose()
    assert run.method == HeteroCache(roles=RoleSettings(fit_budget=True))  # conf/sizes/tiny_heterocache
    assert run.benchmark == BENCHMARKS.get("retrieval")()
    assert run.model == ModelSpec(name="tiny", path="tiny", dtype="float32")  # type: ignore[arg-type]
    assert run.budget == BudgetConfig(None, None)
    assert budget_of(run).kept_fraction == 0.25
    machine = {"device": "auto", "batch_size": 1, "seed": 0, "threads": None}
    engine = {"graphs": "auto", "compile": "off", "temperature": 0.0, "top_p": 1.0}
    assert dataclasses.asdict(run.runtime) == machine | engine
    assert dataclasses.asdict(run.tracker) == {
        "name": "wandb",
        "project": "hcache",
        "entity": None,
        "mode": None,
    }
    assert (run.runner.name, run.tag, run.outputs, run.plugins, run.profile) == (
        "evaluate",
        "default",
        "outputs",
        [],
        None,
    )


@pytest.mark.parametrize("method", names("method"))
def test_method_file_says_the_defaults_of_its_class(method: str) -> None:
    (run,) = compose(f"method={method}", "model=hf", "model.path=/any")
    assert run.method == METHODS.get(method)()


def test_values_for_a_size_are_read_by_themselves_and_give_way_to_the_command_line() -> None:
    assert compose("model=tiny", "method=heterocache")[0].method.roles.fit_budget
    assert not compose("method=heterocache", "method.roles.fit_budget=false")[0].method.roles.fit_budget


@pytest.mark.parametrize("path", sorted((CONF / "method").glob("*.yaml")), ids=lambda path: path.stem)
def test_method_file_lists_every_option(path: Path) -> None:
    """The early check of options goes by the files."""
    listed = {key for key in yaml.safe_load(path.read_text()) if key != "defaults"}
    assert listed == {option.name for option in dataclasses.fields(METHODS.get(path.stem))}


@pytest.mark.parametrize("benchmark", names("benchmark"))
def test_benchmark_file_composes(benchmark: str) -> None:
    (run,) = compose(f"benchmark={benchmark}")
    schema = re.search(r"/schema/benchmark/(\w+)@", (CONF / f"benchmark/{benchmark}.yaml").read_text())
    assert schema is not None
    assert type(run.benchmark) is BENCHMARKS.get(schema[1])


@pytest.mark.parametrize("model", names("model"))
def test_model_file_composes(model: str) -> None:
    (run,) = compose(f"model={model}", *(["model.path=x/y"] if model == "hf" else []))
    assert run.model.name == ("y" if model == "hf" else model)


@pytest.mark.parametrize(
    ("name", "kept"),
    [("f05", 0.05), ("f10", 0.1), ("f25", 0.25), ("f50", 0.5), ("full", 1.0)]
    + [(f"t{tokens}", tokens) for tokens in (128, 256, 512, 1024, 2048)],
)
def test_budget_file_means_kept(name: str, kept: float) -> None:
    (run,) = compose(f"budget={name}")
    budget = budget_of(run)
    assert (budget.kept_tokens if name.startswith("t") else budget.kept_fraction) == kept


def test_every_budget_file_is_tested() -> None:
    assert names("budget") == sorted(
        ["default", "full", "f05", "f10", "f25", "f50", "t128", "t256", "t512", "t1024", "t2048"]
    )


@pytest.mark.parametrize("group", ["runner", "runtime", "tracker", "launch", "debug"])
def test_other_files_compose(group: str) -> None:
    for name in names(group):
        (run,) = compose(f"{group}={name}")
        if group in ("runner", "tracker"):
            assert getattr(run, group).name == name


def test_first_run_is_what_make_run_shows() -> None:
    runs = compose("experiment=first_run", multirun=True)
    assert runs[0].method.name == "fullkv"
    assert {run.method.name for run in runs} == set(METHODS.names()) - {"random"}
    assert {budget_of(run).kept_fraction for run in runs} == {0.25}
    assert all(run.tag == "first_run" and min(run.benchmark.lengths) >= 2048 for run in runs)
    assert all(run.benchmark.limit >= 10 for run in runs)
    assert runs[-1].method.roles.fit_budget


def test_methods_compares_all_of_them_at_four_budgets() -> None:
    runs = compose("experiment=methods", multirun=True)
    assert runs[0].method.name == "fullkv"
    assert {run.method.name for run in runs} == set(METHODS.names())
    assert {budget_of(run).kept_fraction for run in runs} == {0.05, 0.1, 0.25, 0.5}
    assert {run.benchmark.examples_per_task for run in runs} == {100}
    assert {run.benchmark.limit for run in runs} == {None}


def test_retrieval_300_has_enough_examples() -> None:
    runs = compose("experiment=retrieval_300", multirun=True)
    assert len(runs) == 4
    assert {run.benchmark.examples_per_task for run in runs} == {300}
    assert {run.benchmark.limit for run in runs} == {None}


def test_command_line_wins_over_an_experiment() -> None:
    runs = compose("experiment=first_run", "method=snapkv", "benchmark.limit=3", "tag=mine", multirun=True)
    assert [(run.method.name, run.benchmark.limit, run.tag) for run in runs] == [("snapkv", 3, "mine")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_file_is_short_and_says_its_command(path: Path) -> None:
    lines = path.read_text().splitlines()
    heading = [line for line in lines[:3] if line.startswith("#")]
    assert len(lines) <= 32 if path.name == "config.yaml" else len(lines) < 25
    assert heading
    assert any("python run.py" in line for line in heading)


def test_sweep_expands_as_hydra_does() -> None:
    runs = compose("method=glob(*)", "budget.kept_fraction=0.1,0.25", "tag=x", multirun=True)
    assert [(run.method.name, run.budget.kept_fraction) for run in runs] == [
        (method, fraction) for method in overrides.choices("method") for fraction in (0.1, 0.25)
    ]


# --- the schema


class Choice(Enum):
    one = "one"
    two = "two"


@dataclass(frozen=True)
class Inner:
    flag: bool = False


@dataclass(frozen=True)
class Outer:
    number: int = 1
    choice: Choice = Choice.one
    threshold: float | None = None
    inner: Inner = field(default_factory=Inner)


def test_frozen_classes_are_schemas_down_to_nested_ones() -> None:
    schema = schema_of(Outer)
    merged = OmegaConf.merge(schema, {"number": 2, "choice": "two", "inner": {"flag": True}})
    assert OmegaConf.to_object(merged) == Outer(2, Choice.two, None, Inner(True))
    with pytest.raises(dataclasses.FrozenInstanceError):
        OmegaConf.to_object(merged).number = 3  # type: ignore[union-attr]


def test_values_arrive_typed() -> None:
    (run,) = compose(
        "method=snapkv", "method.pooling=max", "benchmark.lengths=[512,1024]", "tracker.mode=online"
    )
    assert run.method == SnapKV(pooling=Pooling.max)
    assert run.benchmark.lengths == (512, 1024)
    assert run.tracker.mode is TrackerMode.online


def test_section_without_schema_is_refused() -> None:
    config = OmegaConf.merge(schema_of(RunConfig), {"method": {"a": 1}, "benchmark": {"b": 1}})
    with pytest.raises(ConfigError, match=r"defaults: \[/schema/method/NAME@_here_"):
        typed(config)  # type: ignore[arg-type]


# --- what is wrong, and what is said about it

WRONG = [
    (["method=snapvk"], "unknown method 'snapvk'; did you mean 'snapkv'?"),
    (["method=snapkv", "method.windwo=3"], "did you mean 'window'?"),
    (["method.roles.fitbudget=true"], "did you mean 'fit_budget'?"),
    (["modle=tiny"], "unknown key 'modle'; did you mean 'model'?"),
    (["model=tinny"], "did you mean 'tiny'?"),
    (["model.nmae=x"], "did you mean 'name'?"),
    (["runtime.batchsize=2"], "did you mean 'batch_size'?"),
    (["experiment=first_rum"], "did you mean 'first_run'?"),
    (["budget=f26"], "did you mean 'f25'?"),
    (["budget.kept_fraction=0"], "budget.kept_fraction=0 must be a number above 0 and at most 1"),
    (["budget.kept_fraction=1.7"], "budget.kept_fraction=1.7 must be"),
    (["budget.kept_fraction=abc"], "budget.kept_fraction='abc' must be"),
    (["budget.kept_tokens=1"], "ambiguous"),
    (["budget.kept_tokens=12.5"], "whole number"),
    (["budget.kept_fraction=0.1", "budget.kept_tokens=64"], "not both"),
    (["budget.kept=0.1"], "did you mean 'kept_tokens'?"),
    (["method=snapkv,fullkv"], "add -m"),
    (["method"], "can't read 'method' as key=value"),
    (["+extra=1"], "unknown key 'extra'"),
    (["+method.extra=1"], "unknown option of method heterocache 'extra'"),
    (["profile.text=x"], "it belongs to runner=profile"),
    (["runner=profile", "profile.txt=x"], "did you mean 'text'?"),
    (["plugins=mine.py"], "plugins=[mine.py]"),
]


def first_look(lines: Sequence[str]) -> None:
    parsed = overrides.parse(lines)
    overrides.check_single(parsed)
    overrides.plugins(parsed)
    overrides.check(parsed)


@pytest.mark.parametrize(("lines", "said"), WRONG, ids=[" ".join(lines) for lines, _ in WRONG])
def test_typo_is_answered_by_the_first_look(lines: Sequence[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        first_look(lines)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


COMPOSED_WRONG = [
    (["method=snapkv", "method.window=abc"], "method.window"),
    (["method=snapkv", "method.pooling=mox"], "expected one of [avg, max]"),
    (["method=snapkv", "method.window=0"], "method.window=0 must be at least 1 token"),
    (["method=snapkv", "method.kernel=4"], "method.kernel=4"),
    (["benchmark.lengthz=[512]"], "did you mean 'lengths'?"),
    (["benchmark.lengths=[1]"], "benchmark.lengths=[1]"),
    (["benchmark=retreival"], "did you mean 'retrieval'?"),
    (["budget=f25", "budget.kept_tokens=512"], "exactly one of budget.kept_fraction and budget.kept_tokens"),
    (["runtime.batch_size=0"], "runtime.batch_size=0 must be at least 1"),
    (["model=hf"], "model.path has no default"),
    (["model.dtype=float33"], "expected one of"),
    (["tracker.mode=sometimes"], "expected one of [offline, online, disabled]"),
]


@pytest.mark.parametrize(
    ("lines", "said"), COMPOSED_WRONG, ids=[" ".join(lines) for lines, _ in COMPOSED_WRONG]
)
def test_wrong_value_is_answered_by_composing(lines: Sequence[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        [budget_of(run) for run in compose(*lines)]
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            ["method=snapkv", "budget.kept_tokens=32"],
            "method.window=32 must be smaller than the budget of 32",
        ),
        (["model=hf", "model.path=/no/such/place"], "model.path=/no/such/place: no such directory"),
        (["tag=a/b"], "tag='a/b'"),
        (["tag=''"], "tag=''"),
        (["tracker.name=mlflow"], "unknown tracker 'mlflow'"),
        (["runner.name=evalute"], "did you mean 'evaluate'?"),
    ],
)
def test_settings_that_do_not_go_together(lines: Sequence[str], said: str) -> None:
    (run,) = compose(*lines)
    with pytest.raises(ValueError, match=".") as error:
        checks.check_run(run)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_good_overrides_pass() -> None:
    good = [
        "method=heterocache",
        "method.roles.fit_budget=true",
        "method.roles.stable_threshold=null",
        "budget.kept_tokens=512",
        "benchmark.tasks=[single]",
        "model.path=/x",
        "tag=a.b-c",
        "debug=default",
        "experiment=null",
        "hydra.verbose=true",
    ]
    overrides.check(overrides.parse(good))


def test_usage_lists_every_choice() -> None:
    text = usage()
    for group in ("method", "budget", "model", "benchmark", "experiment"):
        for name in names(group):
            assert name in text
    assert "*heterocache" in text
    assert re.search(r"^ +snapkv +the last queries vote once", text, re.MULTILINE)
    silent = [line for line in text.splitlines() if re.fullmatch(r" {4}\S+", line)]
    assert not silent, "each choice says what it is"


def test_usage_names_launch_options_as_they_are_typed() -> None:
    """Each is a key of the composed configuration, with the value that it has there."""
    shown = re.findall(r"^  ([\w.]+)=(\S*) ", usage().split("Options of launch")[1], re.MULTILINE)
    composed = {}
    for name in ("ray", "slurm"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed[name] = hydra_compose("config", [f"launch={name}"], return_hydra_config=True)
    assert len(shown) == sum(
        len(re.findall(r"^ +\w+: .*#", (CONF / f"launch/{name}.yaml").read_text(), re.MULTILINE))
        for name in composed
    )
    for key, value in shown:
        owner = composed["ray" if ".ray." in key else "slurm"]
        assert str(OmegaConf.select(owner, key, throw_on_missing=True)) == value.replace("null", "None")


PLUGIN = """
from dataclasses import dataclass
import torch
from hcache import EvictionMethod, register

@register("every_other")
@dataclass(frozen=True)
class EveryOther(EvictionMethod):
    stride: int = 2
    def score(self, q, k, v):
        n = k.shape[1]
        return (torch.arange(n) % self.stride == 0).float().expand(k.shape[0], n)
"""

PRELUDE = "import sys; sys.argv = ['run.py']; import run; "


def python(code: str, *arguments: str) -> Any:
    """A fresh process, for what is global: imports, registries, Hydra's store."""
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_answers_before_torch() -> None:
    code = (
        "assert run.main(['--help']) == 0; "
        "assert run.main(['method=snapvk']) == 2; "
        "assert run.main(['method=snapkv', 'method.windwo=3']) == 2; "
        "assert run.main(['budget.kept_fraction=1.7']) == 2; "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "Groups and their choices" in done.stdout
    assert len(done.stderr.splitlines()) == 3, "one line an error"


def test_plugin_needs_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    code = (
        f"p = 'plugins=[{path}]'; "
        "assert run.main([p, 'method=every_othr']) == 2; "
        "assert run.main([p, 'method=every_other', 'method.strid=3']) == 2; "
        "from runners.plan import compose_all; "
        "found = compose_all([p, 'method=every_other', 'method.stride=3'], False)[0]; "
        "assert found.method.name == 'every_other' and found.method.stride == 3, found; "
        "swept = compose_all([p, 'method=glob(*)'], True); "
        "assert 'every_other' in [r.method.name for r in swept]"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "did you mean 'every_other'?" in done.stderr
    assert "did you mean 'stride'?" in done.stderr


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("runtime.graphs=yes", "runtime.graphs"),
        ("runtime.compile=tunde", "did you mean"),
        ("runtime.top_p=0.9", "runtime.temperature=0.0"),
        ("runtime.temperature=-1", "runtime.temperature=-1"),
    ],
)
def test_engine_settings_that_cannot_be_are_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        compose_all([override], False)


@pytest.mark.parametrize(
    ("runtime", "compile"), [("default", "off"), ("compiled", "default"), ("tuned", "tuned")]
)
def test_compiling_is_a_choice_of_runtime(runtime: str, compile: str) -> None:
    assert compose_all([f"runtime={runtime}"], False)[0].runtime.compile == compile
