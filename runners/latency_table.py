"""Latency cells as a table: a row for each context and batch, from the records alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box, get_console
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hcache.records import Result

_WIDTH_WITHOUT_TERMINAL = 200
_COLUMNS = (
    "method",
    "kept",
    "context",
    "batch",
    "prefill ms",
    "decode ms [p10, p90]",
    "mean",
    "tokens/s",
    "floor ms",
    "x floor",
    "vs transformers",
    "vs fullkv",
    "peak GiB",
    "host MiB/step",
    "engine",
)
_LEGEND = (
    "decode ms: medians of a step of the whole batch; floor: (weights without the embedding + the budget's "
    "KV bytes) at the read bandwidth measured in the same run",
    "vs transformers: how many times faster than the fastest of its own three, of the same run and named; "
    "vs fullkv: than our full cache",
)
Point = Mapping[str, Any]


def show_cell(result: Result) -> None:
    """Print the table of one cell."""
    show([result])


def show(results: Sequence[Result], console: Console | None = None) -> None:
    """Print the table, wide enough for its columns where there is no terminal to ask."""
    console = console or get_console()
    if not console.is_terminal:
        console = Console(file=console.file, width=_WIDTH_WITHOUT_TERMINAL)
    console.print(latency_table(results))
    for line in [*_LEGEND, *_notes(results)]:
        console.print(Text(line), soft_wrap=True)


def is_latency(result: Result) -> bool:
    """Whether a record is one of runner=latency."""
    return "points" in (result.get("latency") or {})


def latency_table(results: Sequence[Result]) -> Table:
    """A row a point; those without numbers say why, in short."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=_title(results), title_justify="left")
    for position, name in enumerate(_COLUMNS):
        table.add_column(name, justify="left" if position == 0 else "right", overflow="fold")
    for result in results:
        cell = result["cell"]
        for point in result["latency"]["points"]:
            table.add_row(*(Text(text) for text in (cell["method"], cell["budget"], *_row(point))))
        if not result["latency"]["points"]:
            table.add_row(cell["method"], cell["budget"], "-", "-", "-", result["status"])
    return table


def _title(results: Sequence[Result]) -> str:
    models = ", ".join(dict.fromkeys(result["cell"]["model"] for result in results))
    devices = dict.fromkeys(str(result["provenance"]["device"]) for result in results)
    return f"Decode latency of {models} on {', '.join(devices)}"


def _row(point: Point) -> Iterator[str]:
    yield from (str(point["context"]), str(point["batch"]))
    if point["status"] != "completed":
        smallest = point.get("smallest_fraction")
        needs = f", needs >= {smallest:g}" if smallest else ""
        yield from ("-", point["status"].replace("_", " ") + needs)
        return
    decode, prefill = point["decode_ms"], point["prefill_ms"]
    yield "-" if prefill is None else f"{prefill['median']:.0f}"
    yield f"{decode['median']:.2f} [{decode['p10']:.2f}, {decode['p90']:.2f}]"
    yield f"{decode['mean']:.2f}"
    yield f"{point['tokens_per_s']:.1f}"
    yield f"{point['floor_ms']:.2f}"
    yield f"{point['times_floor']:.2f}"
    yield _against(point.get("speedup"), point.get("fastest_baseline"))
    full = point["baselines"].get("fullkv", {})
    known = full.get("status") == "completed"
    yield _against(full["decode_ms"]["median"] / decode["median"] if known else None)
    peak = point["peak_device_bytes"]
    yield "-" if peak is None else f"{peak / 2**30:.1f}"
    yield f"{point['host_to_device_bytes_per_step'] / 2**20:.2f}"
    yield str(point["engine"].get("name", "-"))


def _against(ratio: float | None, name: str | None = None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x" + (f" ({name})" if name else "")


def _notes(results: Sequence[Result]) -> list[str]:
    """What a reader must know: notes of methods, drift, why points and baselines have no numbers."""
    notes: dict[str, None] = {}
    for result in results:
        name = f"{result['cell']['method']} {result['cell']['budget']}"
        drift = result["latency"].get("drift")
        if drift:
            notes[f"{name}: drift triggers: {drift}"] = None
        notes.update({f"{name}: {note}": None for note in result.get("notes", [])})
        if not result["latency"]["points"]:
            notes[f"{name}: {result['status']}: {result['error']['message']}"] = None
        for point in result["latency"]["points"]:
            place = f"{point['context']} x {point['batch']}"
            if point["status"] in ("failed", "out_of_memory"):
                notes[f"{name} at {place}: {point['status']}: {point['message']}"] = None
            for other, baseline in point["baselines"].items():
                if baseline["status"] != "completed":
                    notes[_baseline_note(other, place, baseline)] = None
    return list(notes)


def _baseline_note(name: str, place: str, baseline: Point) -> str:
    where = "" if baseline["status"] == "not_available" else f" at {place}"
    return f"baseline {name}{where}: {baseline['status'].replace('_', ' ')}: {baseline['message']}"
