"""What W&B's client wrote of an offline run: its .wandb file, read with the client's own protobuf records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

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
