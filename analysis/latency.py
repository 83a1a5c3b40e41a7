"""Decode time against context, one line a method, and the same as Markdown tables: what runner=latency left.

`python -m analysis.latency outputs/<tag> --out docs/latency.png --table docs/latency.md` draws a panel for
each batch and budget, on logarithmic axes, with the floor of the budget and the fastest of transformers' own
three decoders of the same run. A point that could not be measured is a gap in its line and a word in the
table. Several directories may hold parts of one sweep. Reads files only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis import command, drawing
from analysis.cells import Cell, commits, devices, listed, short_tokens
from analysis.drawing import LEFT, Picture
from analysis.latency_records import TRANSFORMERS, Line, Place, Point, Sweep, collect, median, place_shown
from analysis.markdown import bullets, document, section, table
from analysis.styles import Style, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLOOR, FASTEST = "floor of the budget", "transformers, fastest measured"
_NAN = float("nan")
_LEAST, _NARROW = 1.5, 2.2
"""Inches of the narrowest panel, and below which its title is small."""
_GIB, _MIB = 2**30, 2**20


# --- the figure


def picture(cells: Sequence[Cell]) -> Picture:
    """The figure of these cells. Errors as of `collect` and `draw`."""
    sweep = collect(cells)
    return Picture(
        lambda width, foot: _draw(sweep, width, foot), pd.DataFrame(_rows(sweep)), list(_below(sweep))
    )


def _rows(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Every point of every line, then transformers' fastest and the floors."""
    for line in sweep.lines:
        for (context, batch), point in sorted(line.points.items()):
            who = {"label": line.label, "method": line.method, "kept": line.kept, "status": point["status"]}
            times = {key: point.get("decode_ms", {}).get(key, _NAN) for key in ("median", "p10", "p90")}
            yield {**who, "context": context, "batch": batch, **times}
    for place in [(context, batch) for batch in sweep.batches for context in sweep.contexts]:
        where = {"context": place[0], "batch": place[1]}
        yield {"label": FASTEST, **where, "median": sweep.transformers(place)[1]}
        for budget in sweep.budgets:
            kept = "all" if budget == "full" else _kept(sweep, budget)
            yield {"label": FLOOR, "kept": kept, **where, "median": sweep.floor_ms(budget, place)}


def draw(sweep: Sweep) -> Figure:
    """A panel for each batch (down) and budget (across), as wide as they need. Needs matplotlib.

    Raises:
        ValueError: nothing was measured.
    """
    width = max(7.0, 3.4 * len(sweep.budgets))
    return _draw(sweep, width, drawing.wrapped(_below(sweep), width))


def _draw(sweep: Sweep, width: float, foot: Sequence[str]) -> Figure:
    if not any(line.numbers(place) for line in sweep.lines for place in line.points):
        raise ValueError("no point of any cell has numbers: there is nothing to draw")
    panels, columns = _layout(sweep, width)
    rows = -(-len(panels) // columns)
    across = max(1, int(width / 1.75))
    names = len({line.label for line in sweep.lines}) + 2
    bottom = 0.85 + 0.19 * -(-names // across) + drawing.foot_inches(foot)
    height = min(2.9, 1.1 * width) * rows + bottom + 0.3
    figure = drawing.sheet(width, height)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    figure.subplots_adjust(
        left=LEFT / width, right=1 - 0.15 / width, top=1 - 0.3 / height, bottom=bottom / height, wspace=0.06
    )
    for axis, (budget, batch) in zip(axes.flat, panels, strict=True):
        _panel(axis, sweep, budget, batch, width / columns < _NARROW)
    for row in axes:
        row[0].set_ylabel("ms a decode step")
    for axis in axes[-1]:
        axis.set_xlabel("context, tokens")
    found: dict[str, Any] = {}
    for axis in axes.flat:
        found.update(dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True)))
    figure.legend(
        list(found.values()),
        list(found),
        loc="lower left",
        bbox_to_anchor=(0.55 / width, (0.07 + drawing.foot_inches(foot)) / height),
        ncols=across,
        frameon=False,
        fontsize=8,
        handlelength=3.0,
    )
    drawing.write_foot(figure, foot)
    return figure


def _layout(sweep: Sweep, width: float) -> tuple[list[tuple[str, int]], int]:
    """(budget, batch) of the panels row by row, and how many stand in one: budgets if there is room for
    them, else batches, else one.
    """
    budgets, batches = sweep.budgets, sweep.batches
    if width / len(budgets) >= _LEAST:
        return [(budget, batch) for batch in batches for budget in budgets], len(budgets)
    columns = len(batches) if width / len(batches) >= _LEAST else 1
    return [(budget, batch) for budget in budgets for batch in batches], columns


def _panel(axis: Axes, sweep: Sweep, budget: str, batch: int, is_narrow: bool) -> None:
    places = [(context, batch) for context in sweep.contexts]
    looks = styles({line.label: line.method for line in sorted(sweep.lines, key=lambda line: line.label)})
    _scales(axis, sweep.contexts)
    for line in sweep.panel(budget):
        _line(axis, line, places, looks[line.label])
    fastest = [sweep.transformers(place)[1] for place in places]
    axis.plot(sweep.contexts, fastest, label=FASTEST, color="0.45", linewidth=2.2, linestyle=":")
    floor = [sweep.floor_ms(budget, place) for place in places]
    axis.plot(sweep.contexts, floor, label=FLOOR, color="0.45", linewidth=1.2)
    title = "everything kept" if budget == "full" else f"{_kept(sweep, budget)} kept"
    axis.set_title(f"{title}, batch {batch}", fontsize=7.5 if is_narrow else 9, loc="left")


def _scales(axis: Axes, contexts: Sequence[int]) -> None:
    from matplotlib.ticker import FixedFormatter, FixedLocator, LogLocator, NullLocator, ScalarFormatter

    axis.set_xscale("log")
    axis.set_yscale("log")
    drawing.quiet(axis)
    axis.xaxis.set_major_locator(FixedLocator(contexts))
    axis.xaxis.set_major_formatter(FixedFormatter([short_tokens(context) for context in contexts]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.tick_params(axis="x", labelrotation=90)
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_locator(NullLocator())


def _line(axis: Axes, line: Line, places: Sequence[Place], look: Style) -> None:
    """Medians, and a band from p10 to p90; a place without numbers breaks both."""
    contexts = [context for context, _ in places]
    spreads = [(line.numbers(place) or {}).get("decode_ms", {}) for place in places]
    times = {key: [spread.get(key, _NAN) for spread in spreads] for key in ("median", "p10", "p90")}
    axis.plot(
        contexts,
        times["median"],
        label=line.label,
        color=look.colour,
        marker=look.marker or "o",
        linestyle=look.dashes,
        linewidth=1.3,
        markersize=4.5,
        markeredgecolor="white",
        markeredgewidth=0.4,
    )
    axis.fill_between(contexts, times["p10"], times["p90"], color=look.colour, alpha=0.12, linewidth=0)


def _kept(sweep: Sweep, budget: str) -> str:
    return next(line.kept for line in sweep.lines if line.budget == budget)


def _below(sweep: Sweep) -> Iterator[str]:
    """Under the figure: gaps, and where it was measured."""
    gaps = [gap for line in sweep.lines for gap in _gaps(line)]
    if gaps:
        yield f"Gaps: {'; '.join(gaps)}."
    yield (
        f"{sweep.cells[0].result['cell']['model']}; {listed(devices(_ran(sweep)))}; commit "
        f"{listed(commits(sweep.cells))}; {', '.join(_days(sweep))}. Medians, bands from p10 to p90. Floor: "
        "weights and the budget's KV bytes at the read bandwidth of the same run."
    )


def _ran(sweep: Sweep) -> list[Cell]:
    return [cell for cell in sweep.cells if cell.result["provenance"]["device"]] or list(sweep.cells)


def _days(sweep: Sweep) -> list[str]:
    starts = {point["started"][:10] for line in sweep.lines for point in line.points.values()}
    return sorted(starts)


def _gaps(line: Line) -> Iterator[str]:
    """Where a line has no numbers, by reason."""
    by_reason: dict[str, list[Place]] = {}
    for place, point in sorted(line.points.items()):
        if point["status"] != "completed":
            by_reason.setdefault(_reason(point), []).append(place)
    for reason, places in by_reason.items():
        where = "" if len(places) == len(line.points) else f" at {', '.join(map(place_shown, places))}"
        yield f"{line.label} {line.kept}{where}: {reason}"


def _reason(point: Point) -> str:
    smallest = point.get("smallest_fraction")
    # Rounded up to a hundredth: the exact number depends on the context.
    needs = f" (needs >= {-(-smallest // 0.01) / 100:.2f})" if smallest else ""
    return point["status"].replace("_", " ") + needs


# --- the tables


def markdown(sweep: Sweep) -> str:
    """A table of times for each batch and budget, one of memory and traffic for each batch, and notes."""
    parts = [
        _heading(sweep),
        *(_times(sweep, budget, batch) for batch in sweep.batches for budget in sweep.budgets),
        *(_memory(sweep, batch) for batch in sweep.batches),
        section("Notes", _notes(sweep)),
    ]
    return document(parts)


def _heading(sweep: Sweep) -> str:
    first = _ran(sweep)[0]
    settings = first.result["config"]["benchmark"]
    said = [
        f"Date: {', '.join(_days(sweep))}. Commit: {listed(commits(sweep.cells))}. Device: "
        f"{listed(devices(_ran(sweep)))}.",
        f"Versions: {first.versions}.",
        f"{settings['steps']} steps after {settings['warmup']} for warm-up; prompt: "
        f"{settings['prompt']}. Measured ceilings: {_ceilings(sweep)}.",
        "A field: median ms of a decode step of the whole batch [p10, p90], times the floor, **speed "
        "over the fastest of transformers' own three that was measured at this point** in the same run.",
        "The floor: weights without the embedding and the KV bytes that the budget allows, at the "
        "measured read bandwidth; for transformers and fullkv all KV bytes.",
    ]
    return f"# Decode latency of {first.result['cell']['model']}\n\n{bullets(said)}"


def _ceilings(sweep: Sweep) -> str:
    names = {
        "read_bytes_per_s": "read",
        "copy_bytes_per_s": "device copy",
        "host_to_device_bytes_per_s": "host to device",
        "device_to_host_bytes_per_s": "device to host",
    }
    points = [point for line in sweep.lines for point in line.points.values() if "ceilings" in point]
    found = {
        name: median([point["ceilings"][key]["median"] for point in points if point["ceilings"][key]])
        for key, name in names.items()
    }
    return ", ".join(f"{name} {rate / 1e9:.0f} GB/s" for name, rate in found.items() if rate == rate)


def _times(sweep: Sweep, budget: str, batch: int) -> str:
    contexts = sweep.contexts
    kept = "everything" if budget == "full" else _kept(sweep, budget)
    rows = [
        [name, *(_baseline(sweep, name, (context, batch)) for context in contexts)]
        for name in _measured(sweep)
    ]
    rows += [
        [line.label, *(_time(line.points.get((context, batch))) for context in contexts)]
        for line in sweep.panel(budget)
    ]
    floors = [sweep.floor_ms(budget, (context, batch)) for context in contexts]
    rows.append(["floor, ms", *(f"{floor:.2f}" if floor == floor else "-" for floor in floors)])
    return f"## Batch {batch}, {kept} kept\n\n" + table(["", *map(short_tokens, contexts)], rows)


def _measured(sweep: Sweep) -> list[str]:
    """transformers' own that any run was asked for."""
    asked = {
        name for line in sweep.lines for point in line.points.values() for name in point.get("baselines", {})
    }
    return [name for name in TRANSFORMERS if name in asked]


def _baseline(sweep: Sweep, name: str, place: Place) -> str:
    times = sweep.baseline(name, place)
    if times["median"] == times["median"]:
        return _field(times, times["times_floor"], None)
    for line in sweep.lines:
        found = line.points.get(place, {}).get("baselines", {}).get(name)
        if found:
            return str(found["status"]).replace("_", " ")
    return "-"


def _time(point: Point | None) -> str:
    if point is None:
        return "-"
    if point["status"] != "completed":
        return _reason(point)
    return _field(point["decode_ms"], point["times_floor"], point["speedup"])


def _field(spread: Mapping[str, float], times_floor: float, speedup: float | None) -> str:
    fast = "" if speedup is None else f", **{speedup:.1f}x**"
    return f"{spread['median']:.2f} [{spread['p10']:.2f}, {spread['p90']:.2f}], {times_floor:.2f}{fast}"


def _memory(sweep: Sweep, batch: int) -> str:
    """What lies and moves where, at the longest context of each line that has numbers."""
    rows = []
    for line in sweep.lines:
        places = [place for place in line.points if place[1] == batch and line.numbers(place)]
        if places:
            place = max(places)
            rows.append([line.label, line.kept, short_tokens(place[0]), *_figures(line.points[place])])
    if not rows:
        return ""
    header = ["", "kept", "context", "tokens/s", "mean ms", "resident", "attended", "peak GiB", "host GiB"]
    header += ["host MiB/step", "drifted windows", "prefill ms", "engine"]
    return f"## Batch {batch}, memory and traffic at the longest context measured\n\n" + table(header, rows)


def _figures(point: Point) -> Iterator[str]:
    full = point["full_kv_bytes"]
    peak, drift, prefill = point["peak_device_bytes"], point.get("drift_rate"), point["prefill_ms"]
    yield f"{point['tokens_per_s']:.0f}"
    yield f"{point['decode_ms']['mean']:.2f}"
    yield f"{point['resident_kv_bytes'] / full:.3f}"
    yield f"{point['attended_kv_bytes'] / full:.3f}"
    yield "-" if peak is None else f"{peak / _GIB:.1f}"
    yield f"{point['host_kv_bytes'] / _GIB:.1f}"
    yield f"{point['host_to_device_bytes_per_step'] / _MIB:.2f}"
    yield "-" if drift is None else f"{drift:.2f}"
    yield "-" if prefill is None else f"{prefill['median']:.0f} [{prefill['p10']:.0f}, {prefill['p90']:.0f}]"
    engine = point["engine"]
    yield f"{engine['name']}{'' if engine.get('compile', 'off') == 'off' else ', ' + engine['compile']}"


def _notes(sweep: Sweep) -> Iterator[str]:
    """Gaps, drift, and what methods say of themselves."""
    for line in sweep.lines:
        yield from (f"{line.label} at {line.kept}: {note}" for note in line.notes)
    for cell in sweep.cells:
        yield from _notes_of_cell(cell)
    for line in sweep.lines:
        for place, point in sorted(line.points.items()):
            yield from _notes_of_point(line, place, point)


def _notes_of_cell(cell: Cell) -> Iterator[str]:
    drift = cell.result["latency"].get("drift")
    if drift:
        yield f"{cell.method}: drift triggers: {drift}"
    if cell.result.get("error") and not cell.result["latency"]["points"]:
        yield f"{cell.method} at {cell.kept}: {cell.result['status']}: {cell.result['error']['message']}"


def _notes_of_point(line: Line, place: Place, point: Point) -> Iterator[str]:
    if point["status"] in ("failed", "out_of_memory"):
        yield f"{line.label} at {line.kept}, {place_shown(place)}: {point['message']}"
    reason = point.get("engine", {}).get("reason")
    if reason:
        yield f"eager steps: {reason}"
    for name, baseline in point.get("baselines", {}).items():
        if baseline["status"] != "completed":
            where = "" if baseline["status"] == "not_available" else f" at {place_shown(place)}"
            yield f"{name}{where}: {baseline['message']}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    asking = command.parser("latency", __doc__)
    asking.add_argument("directories", type=Path, nargs="+", help="outputs/<tag>, or parts of one sweep")
    return command.figure_and_tables(asking, arguments, collect, draw, markdown)


if __name__ == "__main__":
    sys.exit(main())
