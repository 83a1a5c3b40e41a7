"""What runner=latency measured as the fields of tables, for every format alike.

`every_point` has a row a point, to be sorted; `by_context` the medians of one batch, a row a method and
budget and a column a context, as papers have them. Knows no format.
"""

from __future__ import annotations

from collections.abc import Iterator

from analysis.cells import short_tokens
from analysis.columns import Field
from analysis.latency_records import TRANSFORMERS, Line, Place, Point, Sweep

POINTS = (
    *("method", "kept", "context", "batch", "ms a step", "times its floor", "times faster than transformers"),
    *("tokens/s", "prefill ms", "peak GiB", "host GiB", "MiB moved/step"),
)
"""Headings of `every_point`; transformers: the fastest of its own decoders that ran at this point."""
FLOOR = (
    "the floor: weights without the embedding and the KV bytes that the budget allows, at the read bandwidth "
    "measured in the same run."
)
OF_POINTS = f"A step is that of the whole batch: median [p10, p90]; {FLOOR}"
OF_CONTEXTS = f"A step is that of the whole batch: median, and in brackets how many times its floor; {FLOOR}"
"""What is said beside `every_point` and `by_context`."""
_GIB, _MIB = 2**30, 2**20


def every_point(sweep: Sweep) -> Iterator[list[Field]]:
    """A row a point of every line, then those of transformers' own decoders."""
    for line in sweep.lines:
        for place, point in sorted(line.points.items()):
            yield [Field(line.label), Field(line.kept), *_where(place), *_measured(point)]
    for name in TRANSFORMERS:
        for place in _places(sweep):
            if (times := sweep.baseline(name, place))["median"] == times["median"]:
                spread = f"[{times['p10']:.2f}, {times['p90']:.2f}]"
                shown = [_number(times["median"], ".2f", spread), _number(times["times_floor"], ".2f")]
                rest = [Field()] * (len(POINTS) - 6)
                yield [Field(f"transformers, {name}"), Field("all"), *_where(place), *shown, *rest]


def by_context(sweep: Sweep, batch: int) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of one batch: medians in ms, and in brackets how many times the floor."""
    lines = [line for line in sweep.lines if any(place[1] == batch for place in line.points)]
    rows = [[line.label, line.kept, *(_median(line, (c, batch)) for c in sweep.contexts)] for line in lines]
    for name in TRANSFORMERS:
        found = [sweep.baseline(name, (context, batch)) for context in sweep.contexts]
        if any(times["median"] == times["median"] for times in found):
            rows.append(
                [f"transformers, {name}", "all", *(_times(t["median"], t["times_floor"]) for t in found)]
            )
    return ["method", "kept", *map(short_tokens, sweep.contexts)], rows


def _places(sweep: Sweep) -> list[Place]:
    return [(context, batch) for context in sweep.contexts for batch in sweep.batches]


def _where(place: Place) -> Iterator[Field]:
    context, batch = place
    yield Field(short_tokens(context), context)
    yield Field(str(batch), batch)


def _measured(point: Point) -> Iterator[Field]:
    if point["status"] != "completed":
        yield Field(str(point["status"]).replace("_", " "))
        yield from [Field()] * (len(POINTS) - 5)
        return
    spread, prefill = point["decode_ms"], point["prefill_ms"] or {}
    yield _number(spread["median"], ".2f", f"[{spread['p10']:.2f}, {spread['p90']:.2f}]")
    yield _number(point["times_floor"], ".2f")
    yield _number(point["speedup"], ".1f")
    yield _number(point["tokens_per_s"], ".0f")
    yield _number(prefill.get("median"), ".0f")
    yield _number(point["peak_device_bytes"], ".1f", unit=_GIB)
    yield _number(point["host_kv_bytes"], ".1f", unit=_GIB)
    yield _number(point["host_to_device_bytes_per_step"], ".2f", unit=_MIB)


def _number(value: float | None, spec: str, aside: str = "", unit: float = 1) -> Field:
    return Field() if value is None else Field(format(value / unit, spec), value, aside)


def _median(line: Line, place: Place) -> str:
    point = line.points.get(place)
    if point is None:
        return "-"
    if point["status"] != "completed":
        return str(point["status"]).replace("_", " ")
    return _times(point["decode_ms"]["median"], point["times_floor"])


def _times(ms: float, times_floor: float) -> str:
    return f"{ms:.2f} ({times_floor:.2f})" if ms == ms else "-"
