"""From a command line to the cells it asks for: every job of a sweep composed and checked before the first
one runs.

Hydra composes each job again when it launches it, here or on another machine; this list is what the checks
before any model loads and the table at the end go by.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from hcache.benchmarks.base import shard_of
from hcache.records import SHARDS, Cell
from runners.config import CONF, ConfigError, RunConfig, cell_of, one_line, plain_config, typed


@dataclass(frozen=True)
class PlannedCell:
    """One job: its typed configuration, the same as plain data, and its place."""

    run: RunConfig
    config: dict[str, Any]
    cell: Cell

    @property
    def directory(self) -> Path:
        """Where its records go; those of a shard below the cell's."""
        whole = self.cell.directory(self.run.outputs)
        shard = shard_of(getattr(self.run.benchmark, "shard", None))
        return whole if shard is None else whole / SHARDS / shard.label


def planned(run: RunConfig) -> PlannedCell:
    """`run` with what follows from it."""
    config = plain_config(run)
    return PlannedCell(run, config, cell_of(run, config))


def compose_all(overrides: Sequence[str], multirun: bool) -> list[RunConfig]:
    """The typed configuration of every job, in the order Hydra will launch them.

    Raises:
        ConfigError: any of them can't be composed.
    """
    with hydra_here():
        jobs = _sweep(overrides) if multirun else [list(overrides)]
        return [typed(_compose(job)) for job in jobs]


@contextmanager
def hydra_here() -> Iterator[None]:
    """Hydra ready to compose. One that is at work is put aside: a launcher composes jobs, too."""
    current = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3", job_name="run"):
            yield
    finally:
        GlobalHydra.instance().hydra = current


def _sweep(overrides: Sequence[str]) -> list[list[str]]:
    """The jobs of a sweep, split as by Hydra's basic sweeper."""
    batches = BasicSweeper.split_arguments(swept(overrides), max_batch_size=None)
    return [list(job) for job in batches[0]]


def swept(overrides: Sequence[str]) -> list[Override]:
    """What a sweep runs over, inside Hydra: its experiment's params, then the command line, which wins."""
    loader = GlobalHydra.instance().config_loader()
    parser = OverridesParser.create(config_loader=loader)
    fixed = [o.input_line for o in parser.parse_overrides(list(overrides)) if not o.is_sweep_override()]
    params = (
        _compose([line for line in fixed if line is not None], hydra=True).hydra.sweeper.get("params") or {}
    )
    lines = [f"{key}={value}" for key, value in params.items()]
    return list(parser.parse_overrides([*lines, *overrides]))


def _compose(overrides: list[str], hydra: bool = False) -> DictConfig:
    try:
        return compose("config", overrides=overrides, return_hydra_config=hydra)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error)) from error


def _explain(error: BaseException) -> str:
    """Hydra's message and the reason under it, which it leaves in the cause."""
    reasons = [one_line(error)]
    while error.__cause__ is not None:
        error = error.__cause__
        if one_line(error) not in reasons[0]:
            reasons.append(one_line(error))
    # Hydra's advice to append with + leads nowhere: the schema refuses unknown keys either way.
    return re.sub(r" To append to your config use \S+", "", ": ".join(reasons))
