"""runner=merge: the shards of one cell as the record that a run of the whole cell would have left.

Takes the command line of the run without benchmark.shard. Either everything fits, each batch in the shard
that benchmark.shard puts it into, or nothing is written. Shards that had nothing to do leave no trace. No
model is loaded; times are those of the shards.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcache import records
from hcache.benchmarks.base import Shard
from hcache.records import Line, Predictions, Result
from runners import CellOutcome
from runners.config import ConfigError, RunConfig
from runners.lines import ReadLine, read_lines
from runners.lock import CellBusy, locked
from runners.notes import counted
from runners.plan import PlannedCell, planned
from runners.result import completed, head, requested
from runners.tracking import make_tracker

log = logging.getLogger(__name__)


class MergeError(ValueError):
    """The shards on disk are not the whole cell, once; the message says which and what to do."""


@dataclass(frozen=True)
class Part:
    """One shard's records.

    Args:
        shard: which.
        directory: where they lie.
        result: its result.json.
        lines: of its predictions.jsonl, in their order; none where it isn't completed.
    """

    shard: Shard
    directory: Path
    result: Result
    lines: Sequence[ReadLine]

    @property
    def name(self) -> str:
        """As the setting benchmark.shard."""
        return _named(self.shard)

    @property
    def is_empty(self) -> bool:
        """Whether there was nothing to do: more shards than batches."""
        return self.result["status"] == "completed" and not self.lines


def _named(shard: Shard) -> str:
    return "/".join(map(str, shard))


def run(run: RunConfig) -> CellOutcome:
    """Merge the shards of the cell; the outcome's message says how many, or why not."""
    try:
        return _merged(planned(_whole(run)))
    except CellBusy as busy:
        return CellOutcome("busy", message=f"runner=merge: {busy}")
    except (ValueError, OSError) as error:
        return CellOutcome("failed", message=f"runner=merge: {error}")
    except Exception as error:  # an outcome, never an exception, goes to the launcher
        log.exception("runner=merge failed")
        return CellOutcome("failed", message=f"runner=merge: {type(error).__name__}: {error}")


def _whole(run: RunConfig) -> RunConfig:
    if run.benchmark.shard is not None:
        raise ConfigError(
            f"benchmark.shard={run.benchmark.shard} has no effect with runner=merge, which takes all shards; "
            "leave it out"
        )
    return run


def _merged(plan: PlannedCell) -> CellOutcome:
    parts = _read(plan.directory)
    _check_same_cell(plan, parts)
    worked = [part for part in parts if not part.is_empty]
    if not worked:
        raise MergeError(f"none of the {len(parts)} shards has an example; run them again")
    if all(part.result["status"] == "infeasible" for part in worked):
        records.write_result(plan.directory, _infeasible(plan, worked))
        return CellOutcome("infeasible", plan.directory, f"infeasible in all {len(worked)} shards")
    for part in parts:
        _check_completed(part)
    lines = _in_order(worked)
    predictions = Predictions(plan.directory)
    notes, made = _notes(worked, lines), _provenance(worked, lines)
    result = {**completed(plan, lines, notes, made), "config": _config(worked)}
    tracker = make_tracker(plan.run.tracker, plan.cell, plan.directory)
    with locked(plan.directory):
        _check_standing(predictions.path, lines)
        predictions.rewrite(lines)
        records.write_result(plan.directory, result)
    tracker.start(result["config"], lines)
    tracker.finish(result, lines)
    return CellOutcome("completed", plan.directory, f"{len(lines)} examples of {len(parts)} shards merged")


def _read(cell: Path) -> list[Part]:
    """All shards of the cell, by number. Raises MergeError for none, gaps, or those of different counts."""
    place = cell / records.SHARDS
    found: dict[Shard, Path] = {}
    for directory in sorted(place.iterdir()) if place.is_dir() else []:
        match = re.fullmatch(r"(\d+)of(\d+)", directory.name)
        if match is None:
            raise MergeError(f"{directory} is no shard (they are called <i>of<n>); move it away")
        found[Shard(int(match[1]), int(match[2]))] = directory
    if not found:
        raise MergeError(
            f"there are no shards in {place}; run the same command with runner=evaluate and "
            "benchmark.shard=0/2, then 1/2, or check that model, method, budget and benchmark are the run's"
        )
    _check_count(place, list(found))
    return [_part(shard, found[shard]) for shard in sorted(found)]


def _check_count(place: Path, shards: Sequence[Shard]) -> None:
    counts = sorted({count for _, count in shards})
    if len(counts) > 1:
        names = " and ".join(f"<i>of{count}" for count in counts)
        raise MergeError(f"{place} holds shards of different counts ({names}); move away those of one")
    missing = [_named(shard) for i in range(counts[0]) if (shard := Shard(i, counts[0])) not in shards]
    if missing:
        raise MergeError(
            f"{place} lacks {len(missing)} of {counts[0]} shards: run benchmark.shard={', '.join(missing)}"
        )


def _part(shard: Shard, directory: Path) -> Part:
    """Raises MergeError for a shard without a result, CorruptRecord, LineError."""
    result = records.read_result(directory)
    name = _named(shard)
    if result is None:
        raise MergeError(f"shard {name} has no result in {directory}; run benchmark.shard={name} to its end")
    own = result["config"]["benchmark"].get("shard")
    if own != name:
        raise MergeError(f"{directory / records.RESULT_FILE} says shard {own}, its directory says {name}")
    return Part(shard, directory, result, _lines(directory, result))


def _lines(directory: Path, result: Result) -> list[ReadLine]:
    """None of a shard that isn't completed, or that neither counts nor holds any. Raises LineError."""
    path = directory / records.PREDICTIONS_FILE
    if result["status"] != "completed" or not (result["tasks"] or _holds_lines(path)):
        return []
    return read_lines(path)


def _holds_lines(path: Path) -> bool:
    return path.exists() and bool(path.read_bytes().strip())


def _check_same_cell(plan: PlannedCell, parts: Sequence[Part]) -> None:
    """Raises MergeError for a shard of another configuration or with another limit."""
    limit = plan.run.benchmark.limit
    for part in parts:
        config = part.result["config"]
        if part.result["config_hash"] != plan.cell.config_hash:
            raise MergeError(
                f"shard {part.name} in {part.directory} is of another configuration, hash "
                f"{part.result['config_hash'][:8]} and not {plan.cell.config_hash[:8]}; run it again"
            )
        if config["benchmark"]["limit"] != limit:
            raise MergeError(
                f"shard {part.name} ran with benchmark.limit={_setting(config['benchmark']['limit'])}, the "
                f"command says {_setting(limit)}; all shards and this command need the same"
            )


def _setting(value: Any) -> str:
    return "null" if value is None else str(value)


def _check_completed(part: Part) -> None:
    """Raises MergeError for a shard that isn't completed, or whose lines are not those of its result."""
    status = part.result["status"]
    if status != "completed":
        reason = part.result.get("error", {}).get("message", "")
        raise MergeError(
            f"shard {part.name} is {status} ({reason}); run benchmark.shard={part.name} until it is completed"
        )
    counted_there = {task: found["n"] for task, found in part.result["tasks"].items()}
    counted_here: dict[str, int] = {}
    for line in part.lines:
        counted_here[line.text("task")] = counted_here.get(line.text("task"), 0) + 1
    for task in sorted({*counted_there, *counted_here}):
        here, there = counted_here.get(task, 0), counted_there.get(task, 0)
        if here != there:
            raise MergeError(
                f"shard {part.name} has {here} lines of task {task}, its result counts {there}; "
                f"move {part.directory} away and run benchmark.shard={part.name} again"
            )


def _in_order(parts: Sequence[Part]) -> list[Line]:
    """All lines, by batch and then as they stand. Raises MergeError for overlaps and gaps, LineError."""
    seen: dict[tuple[str, str], Part] = {}
    owner: dict[int, Part] = {}
    lines: list[Line] = []
    for part in parts:
        for line in part.lines:
            key, batch = (line.text("task"), line.text("id")), line.whole("batch")
            if key in seen:
                raise MergeError(
                    f"example {key[1]} of task {key[0]} is in shard {seen[key].name} and again in shard "
                    f"{part.name} ({line.place.path} line {line.place.number}); run one of them again"
                )
            seen[key] = part
            if owner.setdefault(batch, part) is not part:
                raise MergeError(f"batch {batch} is in shard {owner[batch].name} and in shard {part.name}")
            lines.append(dict(line.values))
    _check_places(owner)
    return sorted(lines, key=lambda line: line["batch"])


def _check_places(owner: Mapping[int, Part]) -> None:
    """A batch that is missing moves all later ones to another place, and so out of their shards.

    Raises:
        MergeError: the batches are not dealt out in turn.
    """
    for place, batch in enumerate(sorted(owner)):
        part = owner[batch]
        if not part.shard.takes(place):
            raise MergeError(
                f"batch {batch} of shard {part.name} is number {place} of all that are here, and that is for "
                "another shard: a batch before it is missing or not the cell's; run the shards again"
            )


def _check_standing(path: Path, lines: Sequence[Line]) -> None:
    """Raises MergeError where the cell holds lines that the shards lack: those of a run of its own."""
    if not _holds_lines(path):
        return
    merged = {(line["task"], line["id"]): line for line in lines}
    for line in read_lines(path):
        if merged.get((line.text("task"), line.text("id"))) != line.values:
            raise MergeError(
                f"{path} holds lines that no shard has (line {line.place.number}): the whole cell was run as "
                f"well; move {path.name} and {records.RESULT_FILE} away to merge"
            )


def _infeasible(plan: PlannedCell, parts: Sequence[Part]) -> Result:
    """With the smallest budget that would do for all shards."""
    worst = max((part.result["error"] for part in parts), key=lambda error: error["smallest_fraction"])
    return {
        **head(plan, "infeasible"),
        "config": _config(parts),
        "error": worst,
        "budget": requested(plan),
        "provenance": parts[0].result["provenance"],
    }


def _config(parts: Sequence[Part]) -> dict[str, Any]:
    """That of a run of the whole cell, not this command's."""
    config = parts[0].result["config"]
    return {**config, "benchmark": {**config["benchmark"], "shard": None}}


def _notes(parts: Sequence[Part], lines: Sequence[Line]) -> list[str]:
    """Each shard's notes once; those that count, counted again over all."""
    found: list[str] = []
    for part in parts:
        own = counted([dict(line.values) for line in part.lines])
        found += [note for note in part.result["notes"] if note not in own]
    return list(dict.fromkeys([*found, *counted(lines), *_versions(parts)]))


def _versions(parts: Sequence[Part]) -> list[str]:
    """A note where shards ran on different code or packages."""
    by_version: dict[str, list[str]] = {}
    for part in parts:
        made = part.result["provenance"]
        packages = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
        by_version.setdefault(f"git {made['git']}, {packages}", []).append(part.name)
    if len(by_version) == 1:
        return []
    named = "; ".join(f"{', '.join(names)} on {version}" for version, names in by_version.items())
    return [f"shards ran on different versions: {named}"]


def _provenance(parts: Sequence[Part], lines: Sequence[Line]) -> dict[str, Any]:
    """Of the first shard, with every device that took part and the seconds of all."""
    made = [part.result["provenance"] for part in parts]
    return {
        **made[0],
        "dirty": any(one["dirty"] for one in made) if made[0]["dirty"] is not None else None,
        "device": " + ".join(dict.fromkeys(str(one["device"]) for one in made)),
        "started": min(line["started"] for line in lines),
        "seconds": round(sum(line["seconds"] for line in lines), 3),
    }
