"""Small real runs with W&B offline, and what the client wrote of them: protobuf records in a .wandb file."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

from hcache.benchmarks import BENCHMARKS
from hcache.records import Line, Predictions, Result, read_result
from runners import evaluate, interrupt
from runners.config import RunConfig, TrackerConfig, TrackerMode, register
from runners.plan import planned
from tests.cells import cell, write_checkpoint

OFFLINE = TrackerConfig(name="wandb", mode=TrackerMode.offline)
NEEDLE = {"lengths": (700, 800), "depths": (0.0, 50.0, 100.0), "limit": 3}
BLOCK, HEADER, FILE_HEADER = 32768, 7, 7


def fragments(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, data) of a file in LevelDB's log format, whose file header counts as part of the first block."""
    at = FILE_HEADER
    while at + HEADER <= len(content):
        room = BLOCK - at % BLOCK
        if room < HEADER:
            at += room
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        yield kind, content[at + HEADER : at + HEADER + size]
        at += HEADER + size


def logged(directory: Path) -> list[Any]:
    """The protobuf records of the one offline run under `directory`."""
    (file,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    found, parts = [], b""
    for kind, data in fragments(file.read_bytes()):
        parts = data if kind in (1, 2) else parts + data
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
    return found


def the_run(records: list[Any]) -> Any:
    """The record that names the run: its id, group and project."""
    return next(record.run for record in records if record.HasField("run"))


def config(records: list[Any]) -> dict[str, Any]:
    """The run's configuration, without what the client adds of its own."""
    found = {_key(item): json.loads(item.value_json) for item in the_run(records).config.update}
    found.pop("_wandb", None)
    return found


def history(records: list[Any]) -> list[dict[str, Any]]:
    """The logged rows; parts of a nested value (a table) have a key each, with slashes."""
    rows = [record.history for record in records if record.HasField("history")]
    return [{_key(item): json.loads(item.value_json) for item in row.item} for row in rows]


def summary(records: list[Any]) -> dict[str, Any]:
    """The summary in the end."""
    found: dict[str, Any] = {}
    for record in records:
        if record.HasField("summary"):
            for item in record.summary.update:
                *above, last = item.nested_key or [item.key]
                place = found
                for name in above:
                    place = place.setdefault(name, {})
                place[last] = json.loads(item.value_json)
            assert not record.summary.remove
    return found


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


# --- runs


@dataclass(frozen=True)
class Tracked:
    """A run's place, its record and lines, and what the tracker's file holds of it."""

    directory: Path
    result: Result
    lines: list[Line]
    group: str
    config: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]


def tracked(run: RunConfig) -> Tracked:
    """Of a cell that has ended, with its one offline run."""
    place = planned(run).directory
    result = read_result(place)
    assert result is not None
    found = logged(place)
    parts = the_run(found).run_group, config(found), history(found), summary(found)
    return Tracked(place, result, Predictions(place).load(), *parts)


def needle_run(place: Path, method: str) -> Tracked:
    """A benchmark with averages of its own, as runner=evaluate runs it; two tasks of three examples."""
    run = cell(write_checkpoint(place / "model"), place / "out", method, kept_fraction=0.5)
    run = replace(run, benchmark=BENCHMARKS.get("needle")(**NEEDLE), tracker=OFFLINE)
    scores = itertools.cycle((0.25, 1.0, 0.75))
    with pytest.MonkeyPatch.context() as patch:  # random weights answer nothing: a zero would show little
        patch.setattr(BENCHMARKS.get("needle"), "score", lambda *args: next(scores))
        assert evaluate.run(run).status == "completed"
    return tracked(run)


@contextmanager
def without_account(home: Path) -> Iterator[None]:
    """W&B's client with a home of its own in which nobody is logged in."""
    register()
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR", "WANDB_RUN_ID"):
            patch.delenv(variable, raising=False)
        for variable in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "NETRC"):
            patch.setenv(variable, str(home / variable.lower()))
        yield
    interrupt.forget()
