"""Everything runs left as tidy pandas frames: of cells, of their tasks, of their examples.

`python -m analysis.frame cells outputs/a outputs/b --out cells.csv` writes one of them as CSV; `cells`,
`tasks`, `examples` and `points` give them to a notebook, from `analysis.cells.read`. All begin with the same
columns (WHO), and `directory` joins them. Scores are 0 to 100; what a record doesn't have is missing (NaN,
None), never 0. Reads files only.

| frame | a row is | columns beside WHO |
|---|---|---|
| cells | a cell, whatever its status | score, n, error, smallest_fraction, MEASURED, PLACE |
| tasks | a task of a completed cell, or a benchmark's average | task, kind, metric, score, low, high, n |
| examples | a line of predictions.jsonl of a completed cell | task, id, metric, score, EXAMPLE |
| points | a context and batch of runner=latency | POINT |
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis import command
from analysis.cells import Cell, by_label, family, read, unfinished
from hcache.records import PREDICTIONS_FILE, setting

WHO = (
    "directory",
    "tag",
    "model",
    "benchmark",
    "method",
    "label",
    "budget",
    "kept",
    "seed",
    "benchmark_seed",
    "shard",
    "status",
    "config_hash",
    "setting",
    "family",
)
"""Columns that every frame begins with.

label: the method, with the options by which several settings of it differ within a family.
budget, kept: the budget's label (f0.25, t128, full), and the same in words.
setting: equal where cells differ in method and budget alone; family: where seeds may differ as well.
"""

MEASURED: Mapping[str, tuple[str, ...]] = {
    "requested_fraction": ("budget", "requested_fraction"),
    "requested_tokens": ("budget", "requested_tokens"),
    "resident_fraction": ("budget", "resident_fraction"),
    "attended_fraction": ("budget", "attended_fraction"),
    "adjusted_examples": ("budget", "adjusted_examples"),
    "device_kv_bytes": ("memory", "device_kv_bytes"),
    "full_kv_bytes": ("memory", "full_kv_bytes"),
    "host_kv_bytes": ("memory", "host_kv_bytes"),
    "peak_device_bytes": ("memory", "peak_device_bytes"),
    "prefill_ms": ("latency", "prefill_ms", "median"),
    "prefill_ms_p10": ("latency", "prefill_ms", "p10"),
    "prefill_ms_p90": ("latency", "prefill_ms", "p90"),
    "decode_ms_per_token": ("latency", "decode_ms_per_token", "median"),
    "decode_ms_per_token_p10": ("latency", "decode_ms_per_token", "p10"),
    "decode_ms_per_token_p90": ("latency", "decode_ms_per_token", "p90"),
    "tokens_per_s": ("latency", "tokens_per_s"),
    "host_to_device_bytes_per_token": ("latency", "host_to_device_bytes_per_token"),
    "windows": ("counters", "windows"),
    "triggers": ("counters", "triggers"),
}
"""Numeric columns of the cells frame, and where a record has them."""

PLACE: Mapping[str, tuple[str, ...]] = {
    "engine": ("engine", "name"),
    "backend": ("engine", "backend"),
    "git": ("provenance", "git"),
    "dirty": ("provenance", "dirty"),
    "device": ("provenance", "device"),
    "started": ("provenance", "started"),
    "seconds": ("provenance", "seconds"),
    "torch": ("provenance", "versions", "torch"),
    "transformers": ("provenance", "versions", "transformers"),
}
"""Columns of the cells frame that say where and how."""

EXAMPLE = ("prompt_tokens", "new_tokens", "prefill_ms", "decode_ms", "decode_steps", "length", "depth")
"""Columns of the examples frame beside its names and score."""

POINT: Mapping[str, tuple[str, ...]] = {
    "context": ("context",),
    "batch": ("batch",),
    "point_status": ("status",),
    "decode_ms": ("decode_ms", "median"),
    "decode_ms_p10": ("decode_ms", "p10"),
    "decode_ms_p90": ("decode_ms", "p90"),
    "decode_ms_mean": ("decode_ms", "mean"),
    "prefill_ms": ("prefill_ms", "median"),
    "floor_ms": ("floor_ms",),
    "times_floor": ("times_floor",),
    "fastest_baseline": ("fastest_baseline",),
    "speedup": ("speedup",),
    "tokens_per_s": ("tokens_per_s",),
    "full_kv_bytes": ("full_kv_bytes",),
    "resident_kv_bytes": ("resident_kv_bytes",),
    "attended_kv_bytes": ("attended_kv_bytes",),
    "host_kv_bytes": ("host_kv_bytes",),
    "host_to_device_bytes_per_step": ("host_to_device_bytes_per_step",),
    "peak_device_bytes": ("peak_device_bytes",),
    "drift_rate": ("drift_rate",),
    "engine": ("engine", "name"),
}
"""Columns of the points frame, and where a point of a record has them; ms are those of the whole batch."""
_WORDS = ("point_status", "fastest_baseline", "engine")

_LEAF = re.compile(r"(?P<method>.+)-(?P<budget>full|f[\d.e-]+|t\d+)-s(?P<seed>\d+)-(?P<hash>[0-9a-f]{8})")


def cells(found: Sequence[Cell], begun: Iterable[Path] = ()) -> pd.DataFrame:
    """One row a cell.

    begun: directories of cells without a record yet (analysis.cells.unfinished); their path is all that is
    known of them, and their status is `unfinished`.
    """
    rows = [_cell_row(cell, who) for cell, who in _named(found)]
    rows += [row for path in begun if (row := _begun_row(path))]
    columns = [*WHO, "score", "n", "error", "smallest_fraction", *MEASURED, *PLACE]
    return _numeric(pd.DataFrame(rows, columns=columns), ["score", "n", "smallest_fraction", *MEASURED])


def tasks(found: Sequence[Cell]) -> pd.DataFrame:
    """One row for each task of a completed cell, and for each average that its benchmark has."""
    rows = [row for cell, who in _named(found) if cell.completed for row in _task_rows(cell, who)]
    columns = [*WHO, "task", "kind", "metric", "score", "low", "high", "n"]
    return _numeric(pd.DataFrame(rows, columns=columns), ["score", "low", "high", "n"])


def examples(found: Sequence[Cell]) -> pd.DataFrame:
    """One row for each example of a completed cell; a metric of whole tasks has no score of one."""
    rows = [row for cell, who in _named(found) if cell.completed for row in _example_rows(cell, who)]
    columns = [*WHO, "task", "id", "metric", "score", *EXAMPLE]
    return _numeric(pd.DataFrame(rows, columns=columns), ["score", *EXAMPLE])


def points(found: Sequence[Cell]) -> pd.DataFrame:
    """One row for each context and batch that runner=latency measured, or could not."""
    rows = [
        {**who, **{name: _dig(point, path) for name, path in POINT.items()}}
        for cell, who in _named(found)
        for point in (cell.result.get("latency") or {}).get("points", [])
    ]
    frame = pd.DataFrame(rows, columns=[*WHO, *POINT])
    return _numeric(frame, [name for name in POINT if name not in _WORDS])


def _named(found: Sequence[Cell]) -> list[tuple[Cell, dict[str, Any]]]:
    """Each cell with its WHO, in their order."""
    families = [family(cell) for cell in found]
    members: dict[str, list[Cell]] = {}
    for cell, own in zip(found, families, strict=True):
        members.setdefault(own, []).append(cell)
    labels = {
        id(cell): label
        for group in members.values()
        for label, labelled in by_label(group).items()
        for cell in labelled
    }
    return [(cell, _who(cell, labels[id(cell)], own)) for cell, own in zip(found, families, strict=True)]


def _who(cell: Cell, label: str, own: str) -> dict[str, Any]:
    names, config = cell.result["cell"], cell.result["config"]
    return {
        "directory": str(cell.directory),
        **{key: names.get(key) for key in ("tag", "model", "benchmark", "seed")},
        "method": cell.method,
        "label": label,
        "budget": cell.budget,
        "kept": cell.kept,
        "benchmark_seed": config["benchmark"].get("seed"),
        "shard": config["benchmark"].get("shard"),
        "status": cell.result["status"],
        "config_hash": cell.result.get("config_hash"),
        "setting": setting(config),
        "family": own,
    }


def _cell_row(cell: Cell, who: Mapping[str, Any]) -> dict[str, Any]:
    error = cell.result.get("error") or {}
    own = cell.result.get("tasks", {}).values()
    return {
        **who,
        "score": cell.result.get("score"),
        "n": sum(task["n"] for task in own) if cell.completed else None,
        "error": error.get("message"),
        "smallest_fraction": error.get("smallest_fraction"),
        **{name: _dig(cell.result, path) for name, path in (*MEASURED.items(), *PLACE.items())},
    }


def _begun_row(path: Path) -> dict[str, Any] | None:
    """From a directory's name alone; None where it isn't a cell's."""
    leaf = _LEAF.fullmatch(path.name)
    if leaf is None or len(path.parts) < 4:
        return None
    tag, model, benchmark = path.parts[-4:-1]
    return {
        "directory": str(path),
        "tag": tag,
        "model": model,
        "benchmark": benchmark,
        "method": leaf["method"],
        "label": leaf["method"],
        "budget": leaf["budget"],
        "seed": int(leaf["seed"]),
        "config_hash": leaf["hash"],
        "status": "unfinished",
        "n": (path / PREDICTIONS_FILE).read_bytes().count(b"\n"),
    }


def _task_rows(cell: Cell, who: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    kinds = {"task": cell.result.get("tasks", {}), "average": cell.result.get("aggregates", {})}
    for kind, entries in kinds.items():
        for name, entry in entries.items():
            low, high = entry.get("ci95") or (None, None)
            known = {key: entry.get(key) for key in ("metric", "score", "n")}
            yield {**who, "task": name, "kind": kind, **known, "low": low, "high": high}


def _example_rows(cell: Cell, who: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for line in cell.lines():
        score = None if line["score"] is None else 100 * line["score"]
        known = {key: line.get(key) for key in ("metric", *EXAMPLE)}
        yield {**who, "task": line["task"], "id": str(line["id"]), **known, "score": score}


def _dig(part: Any, path: Sequence[str]) -> Any:
    for key in path:
        part = part.get(key) if isinstance(part, Mapping) else None
    return part


def _numeric(frame: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The frame with floats in these columns, NaN where there is no number."""
    return frame.astype(dict.fromkeys(columns, "float64"))


FRAMES: Mapping[str, Callable[[Sequence[Cell]], pd.DataFrame]] = {
    "tasks": tasks,
    "examples": examples,
    "points": points,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = command.parser("frame", __doc__)
    parser.add_argument("frame", choices=("cells", *FRAMES))
    parser.add_argument("directories", type=Path, nargs="+", help=command.DIRECTORIES)
    parser.add_argument("--out", type=Path, metavar="FILE", help="a csv file; default: print it")
    asked = parser.parse_args(arguments)

    def show() -> None:
        found = read(asked.directories)
        begun = unfinished(asked.directories)
        frame = cells(found, begun) if asked.frame == "cells" else FRAMES[asked.frame](found)
        command.tell(frame.to_csv(index=False), asked.out)

    return command.answered(show)


if __name__ == "__main__":
    sys.exit(main())
