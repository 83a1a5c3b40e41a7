"""Telling W&B about a run, through its own client; a tracker that fails is dropped with a warning, never
the result.

The records are the truth and this is a copy of them: everything logged can be logged again from
predictions.jsonl. The client can't resume a run offline, so a resumed offline run is logged again from the
start into a fresh directory and the older one is removed when that one is complete.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hcache.records import SHARDS, Cell, Line, Result
from runners.config import TrackerConfig

log = logging.getLogger(__name__)
_TABLE = (
    "task",
    "id",
    "prediction",
    "answers",
    "score",
    "prompt_tokens",
    "new_tokens",
    "prefill_ms",
    "decode_ms",
)


class Tracker(Protocol):
    """What the evaluation tells as it goes."""

    def start(self, config: Mapping[str, Any], finished: Sequence[Line]) -> None:
        """The run begins, or goes on after the `finished` examples of an earlier part."""

    def example(self, line: Line) -> None:
        """One more example is done."""

    def finish(self, result: Result | None, lines: Sequence[Line]) -> None:
        """The run is over; no result if it was interrupted."""


class NoTracker:
    """Tells nobody."""

    def start(self, config: Mapping[str, Any], finished: Sequence[Line]) -> None:
        """Nothing."""

    def example(self, line: Line) -> None:
        """Nothing."""

    def finish(self, result: Result | None, lines: Sequence[Line]) -> None:
        """Nothing."""


class WandbTracker:
    """One W&B run a cell: its id is tag and config hash, its group is the tag.

    A shard is a run of its own, in the group `<tag>-shards`, so that no comparison of a group takes it for a
    cell; runner=merge tells of the whole.
    """

    def __init__(self, settings: TrackerConfig, cell: Cell, directory: Path) -> None:
        self._settings, self._directory = settings, directory
        self._id, self._name, self._group = run_id(cell), directory.name, cell.tag
        if directory.parent.name == SHARDS:
            self._id, self._group = f"{self._id}-{directory.name}", f"{cell.tag}-{SHARDS}"
            self._name = f"{directory.parent.parent.name}-{directory.name}"
        self._count = 0

    @property
    def mode(self) -> str:
        """tracker.mode, else WANDB_MODE, else offline."""
        mode = self._settings.mode
        return mode.value if mode else os.environ.get("WANDB_MODE", "offline")

    def start(self, config: Mapping[str, Any], finished: Sequence[Line]) -> None:
        """Open the run and log what earlier parts finished, as far as the server hasn't got it."""
        import wandb

        self._directory.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=self._settings.project,
            entity=self._settings.entity,
            id=self._id,
            name=self._name,
            group=self._group,
            config=dict(config),
            dir=str(self._directory),
            mode=self.mode,  # type: ignore[arg-type]  # the environment may say anything; the client checks
            resume="allow" if self.mode == "online" else None,
            reinit="finish_previous",  # never go on in a run that an error left open
            settings=wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True),
        )
        for line in finished:
            self.example(line)

    def example(self, line: Line) -> None:
        """Log one example's scores and times."""
        self._row(example_metrics(line))

    def finish(self, result: Result | None, lines: Sequence[Line]) -> None:
        """Log points of runner=latency, the table of predictions and the summary; close the run, remove what
        it replaces.
        """
        import wandb

        for point in points(result):
            self._row(point_metrics(point))
        if lines:
            rows = [[_cell_text(line[key]) for key in _TABLE] for line in lines]
            self._run.log({"predictions": wandb.Table(columns=list(_TABLE), data=rows)})
        if result is not None:
            self._run.summary.update(summary_metrics(result))
        current = Path(self._run.dir).parent
        self._run.finish(exit_code=0 if result is not None and result["status"] != "failed" else 1)
        if self.mode == "offline":
            self._remove_older(current)

    def _row(self, metrics: Mapping[str, float]) -> None:
        """Log one step; one that the server has already is passed over."""
        if self._count >= self._run.step:
            self._run.log(dict(metrics), step=self._count)
        self._count += 1

    def _remove_older(self, current: Path) -> None:
        for old in (self._directory / "wandb").glob(f"offline-run-*-{self._id}"):
            if old.resolve() != current.resolve():
                shutil.rmtree(old)


class SafeTracker:
    """Another tracker, dropped with one warning at its first error."""

    def __init__(self, inner: Tracker) -> None:
        self._inner: Tracker = inner

    def start(self, config: Mapping[str, Any], finished: Sequence[Line]) -> None:
        """As the inner tracker."""
        self._guard("start", config, finished)

    def example(self, line: Line) -> None:
        """As the inner tracker."""
        self._guard("example", line)

    def finish(self, result: Result | None, lines: Sequence[Line]) -> None:
        """As the inner tracker."""
        self._guard("finish", result, lines)

    def _guard(self, call: str, *arguments: Any) -> None:
        try:
            getattr(self._inner, call)(*arguments)
        except Exception as error:
            log.warning("tracking stopped (%s failed: %s); the records are not affected", call, error)
            self._inner = NoTracker()


def make_tracker(settings: TrackerConfig, cell: Cell, directory: Path) -> Tracker:
    """The tracker that the configuration names. Raises ValueError for an unknown one."""
    if settings.name == "none":
        return NoTracker()
    if settings.name == "wandb":
        return SafeTracker(WandbTracker(settings, cell, directory))
    raise ValueError(f"tracker.name={settings.name} is unknown; use wandb or none")


def run_id(cell: Cell) -> str:
    """W&B id of a cell: tag and config hash. A tag is a safe file name, so W&B allows it."""
    return f"{cell.tag}-{cell.config_hash[:16]}"


def example_metrics(line: Line) -> dict[str, float]:
    """What is plotted over the examples."""
    memory, steps = line["memory"], line["decode_steps"]
    metrics = {
        f"score/{line['task']}": 100 * line["score"],
        "score/all": 100 * line["score"],
        "prompt_tokens": line["prompt_tokens"],
        "new_tokens": line["new_tokens"],
        "prefill_ms": line["prefill_ms"],
        "device_kv_bytes": memory["device_payload"] + memory["device_metadata"],
    }
    return {**metrics, **({"decode_ms_per_token": line["decode_ms"] / steps} if steps else {})}


def points(result: Result | None) -> Sequence[Mapping[str, Any]]:
    """The contexts and batches of a record of runner=latency; none of any other."""
    found: Sequence[Mapping[str, Any]] = ((result or {}).get("latency") or {}).get("points") or []
    return found


def point_metrics(point: Mapping[str, Any]) -> dict[str, float]:
    """What is plotted over contexts: the numbers of a point, and the medians of its times.

    The summary holds points as well, but as a list, which W&B can't plot. A step's time also has a key of
    its batch, so that a line over contexts is of one batch.
    """
    medians = {key: value["median"] for key, value in point.items() if _has_median(value)}
    flat = {**point, **medians, f"decode_ms_batch_{point['batch']}": medians.get("decode_ms")}
    return {f"latency/{key}": value for key, value in flat.items() if _is_number(value)}


def summary_metrics(result: Result) -> dict[str, Any]:
    """A record as W&B's summary: all of it but the configuration, which is the run's own."""
    return {key: value for key, value in result.items() if key != "config" and value is not None}


def _has_median(value: Any) -> bool:
    return isinstance(value, Mapping) and _is_number(value.get("median"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell_text(value: Any) -> Any:
    return " | ".join(map(str, value)) if isinstance(value, list) else value
