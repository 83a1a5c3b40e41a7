"""Settings of runner=latency: the section `latency` of the configuration, checked. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runners.config import ConfigError, RunConfig, one_line


class PromptKind(Enum):
    """What stands in the cache. `filled`: random keys and values, the model never sees a prompt."""

    filled = "filled"
    random = "random"
    needle = "needle"


class Drift(Enum):
    """Which windows of a method that watches for drift count as drifted."""

    natural = "natural"
    never = "never"
    tenth = "tenth"
    always = "always"


class Baseline(Enum):
    """What is timed beside the method: transformers' own three, and our FullKV."""

    sdpa = "sdpa"
    flash_attention_2 = "flash_attention_2"
    static_compile = "static_compile"
    fullkv = "fullkv"


WARMUP_ROUNDS = 5
DRIFT_EVERY = {Drift.natural: None, Drift.never: 0, Drift.tenth: 10, Drift.always: 1}
"""A decision drifts every so many windows; None where attention decides."""


@dataclass
class LatencySettings:
    """Settings of runner=latency.

    Args:
        contexts: prompt lengths, in tokens.
        batches: sequences side by side.
        steps: decode steps that are measured.
        warmup: decode steps before them; as many again, up to WARMUP_ROUNDS times, while they still compile
            or capture something.
        prompt: see PromptKind; with `filled` there is no prefill to time.
        prefills: prefills that are measured, after one for warm-up.
        drift: see Drift; None is never for random weights, else natural.
        baselines: see Baseline.
        layers: of a shape model, fewer than it has; the record says so.
    """

    contexts: list[int] = field(default_factory=lambda: [32768, 131072, 229376])
    batches: list[int] = field(default_factory=lambda: [1])
    steps: int = 50
    warmup: int = 10
    prompt: PromptKind = PromptKind.filled
    prefills: int = 3
    drift: Drift | None = None
    baselines: list[Baseline] = field(default_factory=lambda: list(Baseline))
    layers: int | None = None

    def __post_init__(self) -> None:
        for key, smallest in (("contexts", 2), ("batches", 1)):
            values = getattr(self, key)
            if not values or min(values) < smallest or len(set(values)) < len(values):
                raise ConfigError(f"latency.{key}={values} must list different numbers from {smallest} up")
        for key, smallest in (("steps", 2), ("warmup", 0), ("prefills", 1)):
            if getattr(self, key) < smallest:
                raise ConfigError(f"latency.{key}={getattr(self, key)} must be at least {smallest}")
        if self.layers is not None and self.layers < 1:
            raise ConfigError(f"latency.layers={self.layers} must be at least 1")

    def new_tokens(self) -> int:
        """Room to decode in: the measured steps, those before them, and the first token."""
        return self.steps + WARMUP_ROUNDS * self.warmup + 1


def settings_of(section: Any) -> LatencySettings:
    """The section `latency` as typed settings. Raises ConfigError for an unknown key or a wrong value."""
    if isinstance(section, LatencySettings):
        return section
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(LatencySettings), section or {}))
    except OmegaConfBaseException as error:
        raise ConfigError(f"latency: {one_line(error)}") from error
    assert isinstance(typed, LatencySettings)
    return typed


def drift_of(run: RunConfig) -> Drift | None:
    """The drift that the cell runs with; None where its method doesn't watch, or says by itself."""
    if not hasattr(run.method, "drift_every") or run.method.drift_every is not None:
        return None
    asked = settings_of(run.latency).drift
    return asked or (Drift.never if run.model.random else Drift.natural)


def check_latency(run: RunConfig) -> None:
    """Raise ConfigError for settings that don't go with the model or with this runner."""
    settings = settings_of(run.latency)
    if run.runtime.batch_size != 1:
        raise ConfigError(
            f"runtime.batch_size={run.runtime.batch_size} has no effect with runner=latency; "
            f"set latency.batches=[{run.runtime.batch_size}]"
        )
    if run.runtime.temperature != 0:
        raise ConfigError(
            f"runtime.temperature={run.runtime.temperature} has no effect with runner=latency, which decodes "
            "greedily; leave it out"
        )
    if run.model.random and settings.prompt is PromptKind.needle:
        raise ConfigError(
            "latency.prompt=needle needs a tokenizer, and random weights have none; set latency.prompt to "
            "random or filled, or choose a model with weights"
        )
    if settings.layers is not None and (run.model.shape is None or settings.layers > run.model.shape.layers):
        raise ConfigError(
            f"latency.layers={settings.layers} cuts a shape model, and model={run.model.name} "
            + ("has real weights" if run.model.shape is None else f"has {run.model.shape.layers} layers")
        )
