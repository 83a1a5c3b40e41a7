"""The records of runner=latency as lines: one a method and budget, with points by context and batch.

Parts of one sweep may lie in several cells (some contexts here, others there). Reads files only.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from analysis.cells import Cell, by_label, devices, leaves, short_tokens
from hcache.records import identity

TRANSFORMERS = ("sdpa", "flash_attention_2", "static_compile")

Place = tuple[int, int]
"""(context, batch)."""
Point = Mapping[str, Any]

_PARTS = ("contexts", "batches", "baselines", "drift", "steps", "warmup", "prefills")
"""Settings by which the parts of one sweep may differ: what is measured, and how often."""
_NAN = float("nan")


@dataclass(frozen=True)
class Line:
    """One method at one budget.

    Args:
        label: the method's name, with the options by which others of its name differ.
        method: its name.
        budget: label of the budget as in the records; full for a method without one.
        kept: the budget in words.
        points: what was measured, by context and batch.
        notes: what a reader must know.
    """

    label: str
    method: str
    budget: str
    kept: str
    points: Mapping[Place, Point]
    notes: Sequence[str]

    def numbers(self, place: Place) -> Point | None:
        """The point at a place if it has numbers."""
        point = self.points.get(place)
        return point if point is not None and point["status"] == "completed" else None


@dataclass(frozen=True)
class Sweep:
    """Everything that is shown: lines, the cells they come from, and the places that were asked for.

    apart: settings that tell it from other sweeps of its model and device; in words.
    """

    lines: Sequence[Line]
    cells: Sequence[Cell]
    apart: str = ""

    @property
    def name(self) -> str:
        """The model and where it ran, in words."""
        ran = [cell for cell in self.cells if cell.result["provenance"]["device"]]
        named = [str(self.cells[0].result["cell"]["model"]), *devices(ran), self.apart]
        return ", ".join(filter(None, named))

    @property
    def contexts(self) -> list[int]:
        return sorted({context for line in self.lines for context, _ in line.points})

    @property
    def batches(self) -> list[int]:
        return sorted({batch for line in self.lines for _, batch in line.points})

    @property
    def budgets(self) -> list[str]:
        """Budgets of methods that have one, as asked for; full alone where there is no other."""
        asked = {cell.budget: cell.order for cell in self.cells if cell.budget != "full"}
        return sorted(asked, key=lambda budget: asked[budget]) or ["full"]

    def panel(self, budget: str) -> list[Line]:
        """The lines at a budget, and those of methods without one."""
        return [line for line in self.lines if line.budget in (budget, "full")]

    def floor_ms(self, budget: str, place: Place) -> float:
        """The least time of a step at a budget, the median over runs; NaN if none knows it."""
        own = [line.points.get(place, {}) for line in self.lines if line.budget == budget]
        return median([point["floor_ms"] for point in own if "floor_ms" in point])

    def transformers(self, place: Place) -> tuple[str, float]:
        """Name and milliseconds of the fastest of transformers' own; ("", NaN) if none ran."""
        found = {name: self.baseline(name, place)["median"] for name in TRANSFORMERS}
        ran = {name: ms for name, ms in found.items() if ms == ms}
        return min(ran.items(), key=lambda item: item[1]) if ran else ("", _NAN)

    def baseline(self, name: str, place: Place) -> dict[str, float]:
        """Milliseconds (median, p10, p90) and times_floor of a baseline, medians over runs; or NaN."""
        points = self._baseline_points(name, place)
        times = {key: median([p["decode_ms"][key] for p in points]) for key in ("median", "p10", "p90")}
        return {**times, "times_floor": median([point["times_floor"] for point in points])}

    def _baseline_points(self, name: str, place: Place) -> list[Point]:
        """Completed measurements of a baseline, one a run: the cells of a run share them."""
        found: dict[Any, Point] = {}
        for line in self.lines:
            point = line.points.get(place, {})
            baseline = point.get("baselines", {}).get(name)
            if baseline and baseline["status"] == "completed":
                run = point["run"]
                found.setdefault((run["started"], run["process"]), baseline)
        return list(found.values())


def sweeps(cells: Sequence[Cell]) -> list[Sweep]:
    """The latency cells, those that can stand side by side together, by name; other cells are left out."""
    groups: dict[tuple[str, str | None], list[Cell]] = {}
    own = [cell for cell in cells if "points" in (cell.result.get("latency") or {})]
    for cell in sorted(own, key=lambda cell: cell.result["provenance"]["device"] is None):
        shared, device = json.dumps(_shared(cell), sort_keys=True), cell.result["provenance"]["device"]
        alike = [key for key in groups if key[0] == shared]
        key = alike[0] if device is None and alike else (shared, device)  # it never ran: no other place
        groups.setdefault(key, []).append(cell)
    found = list(map(collect, groups.values()))
    named = [replace(sweep, apart=_apart(sweep, found)) for sweep in found]
    return sorted(named, key=lambda sweep: sweep.name)


def _apart(sweep: Sweep, others: Sequence[Sweep]) -> str:
    """The settings in which sweeps of this name differ; empty for the only one."""
    alike = [dict(leaves(_shared(other.cells[0]))) for other in others if other.name == sweep.name]
    own = dict(leaves(_shared(sweep.cells[0])))
    return ", ".join(f"{path}={own[path]}" for path in own if len({other.get(path) for other in alike}) > 1)


def collect(cells: Sequence[Cell]) -> Sweep:
    """The latency cells as lines; others are left out.

    Raises:
        ValueError: no cell of runner=latency, or cells that can't stand side by side.
    """
    own = [cell for cell in cells if "points" in (cell.result.get("latency") or {})]
    if not own:
        raise ValueError("no record of runner=latency among the cells: python run.py runner=latency ...")
    _one_setting(own)
    lines = []
    for label, group in by_label(own).items():
        drifts = {cell.result["latency"].get("drift") for cell in group}
        for key in dict.fromkeys((cell.budget, cell.result["latency"].get("drift")) for cell in group):
            members = [cell for cell in group if (cell.budget, cell.result["latency"].get("drift")) == key]
            name = f"{label} (drift {key[1]})" if len(drifts) > 1 else label
            notes = list(dict.fromkeys(note for cell in members for note in cell.result.get("notes", [])))
            lines.append(
                Line(name, members[0].method, members[0].budget, members[0].kept, _joined(members), notes)
            )
    return Sweep(lines, own)


def _joined(members: Sequence[Cell]) -> dict[Place, Point]:
    """The points of all cells of one line; of a place measured twice the later one."""
    found: dict[Place, Point] = {}
    for cell in members:
        for point in cell.result["latency"]["points"]:
            place = (point["context"], point["batch"])
            if place not in found or point["started"] >= found[place]["started"]:
                found[place] = point
    return found


def _one_setting(cells: Sequence[Cell]) -> None:
    """Raise ValueError unless all are of one model, one kind of prompt and one device."""
    first = cells[0]
    for cell in cells[1:]:
        ours, theirs = _shared(first), _shared(cell)
        gaps = [f"{key} ({ours.get(key)} and {theirs.get(key)})" for key in ours if ours[key] != theirs[key]]
        if gaps:
            raise ValueError(
                f"{first.directory} and {cell.directory} can't stand side by side, they differ in "
                f"{', '.join(gaps)}; give directories of one setting"
            )
    places = devices([cell for cell in cells if cell.result["provenance"]["device"]])
    if len(places) > 1:
        raise ValueError(f"times of different devices can't stand side by side: {', '.join(places)}")


def _shared(cell: Cell) -> dict[str, Any]:
    whole = identity(cell.result["config"])
    settings = {key: value for key, value in whole["benchmark"].items() if key not in _PARTS}
    return {"model": whole["model"], "latency": settings, "runtime": whole["runtime"]}


def place_shown(place: Place) -> str:
    """`128K x 4`: context x batch."""
    context, batch = place
    return f"{short_tokens(context)} x {batch}"


def median(values: Sequence[float]) -> float:
    """The median; NaN of nothing."""
    return statistics.median(values) if values else _NAN
