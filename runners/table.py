"""The one table at the end of a command: every cell's result side by side, read from its record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich import box, get_console
from rich.console import Console
from rich.table import Table

from hcache.records import Result, setting
from runners import latency_table
from runners.latency_table import is_latency
from runners.result import KILLED

_WIDTH_WITHOUT_TERMINAL = 200
Column = tuple[str, Callable[[Result], str]]


def comparison(results: Sequence[Result]) -> Table:
    """Score per task with its 95% interval, resident KV bytes, prefill and decode time, each time against
    FullKV.

    A cell without numbers (infeasible, failed) is a row with its status and gaps.
    """
    tasks = list(dict.fromkeys(task for result in results for task in result.get("tasks", {})))
    columns = [
        *_name_columns(results),
        *(_task_column(task) for task in tasks),
        *_measured_columns(results, tasks),
    ]
    table = Table(title="Compression methods side by side", title_justify="left", caption_justify="left")
    table.box, table.padding = box.SIMPLE_HEAD, (0, 0)
    for position, (header, _) in enumerate(columns):
        # On a narrow terminal a number and its interval may go on two lines; names stay whole.
        side: Any = "left" if position == 0 else "right"
        table.add_column(header, justify=side, no_wrap=position < 2, overflow="fold")
    for result in results:
        table.add_row(*(value(result) for _, value in columns))
    table.caption = "\n".join([*_legend(results), *_notes(results)])
    return table


def show(results: Sequence[Result], console: Console | None = None) -> None:
    """Print the table, wide enough for its columns where there is no terminal to ask."""
    console = console or get_console()
    if not console.is_terminal:
        console = Console(file=console.file, width=_WIDTH_WITHOUT_TERMINAL)
    timed, scored = ([r for r in results if is_latency(r) is kind] for kind in (True, False))
    if timed:
        latency_table.show(timed, console)
    if scored:
        console.print(comparison(scored))


def _name_columns(results: Sequence[Result]) -> list[Column]:
    """Method and budget always; model, benchmark and seed where they differ."""

    def cell(key: str) -> Callable[[Result], str]:
        return lambda result: str(result["cell"][key])

    differing = [key for key in ("model", "benchmark", "seed") if len({r["cell"][key] for r in results}) > 1]
    columns: list[Column] = [("method", cell("method")), ("kept", cell("budget"))]
    columns += [(key, cell(key)) for key in differing]
    return columns + [_option_column(path) for path in _swept(results)]


def _swept(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Options by which cells differ that have the same method, or any two cells outside the method."""
    found: dict[tuple[str, ...], None] = {}
    for section in ("method", "benchmark", "model", "runtime"):
        by_name: dict[str, list[dict[tuple[str, ...], str]]] = {}
        for result in results:
            part = result["config"].get(section) or {}
            by_name.setdefault(str(part.get("name")), []).append(dict(_leaves(part, (section,))))
        for group in by_name.values():
            paths = dict.fromkeys(path for leaves in group for path in leaves)
            found.update({p: None for p in paths if len({leaves.get(p) for leaves in group}) > 1})
    hidden = {"name", "content", "source", "limit", "path"}
    return [path for path in found if path[-1] not in hidden]


def _leaves(part: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every option below a section with its path, as text."""
    if isinstance(part, dict):
        for key, value in part.items():
            yield from _leaves(value, (*path, key))
    else:
        yield path, str(part)


def _option_column(path: tuple[str, ...]) -> Column:
    def value(result: Result) -> str:
        return dict(_leaves(result["config"].get(path[0]) or {}, path[:1])).get(path, "-")

    return ".".join(path), value


def _task_column(task: str) -> Column:
    def value(result: Result) -> str:
        found = result.get("tasks", {}).get(task)
        if not found:
            return "-"
        if found["score"] is None:
            return "-"
        if found["ci95"] is None:
            return f"{found['score']:.1f}"
        low, high = found["ci95"]
        return f"{found['score']:.1f} [{low:.0f}-{high:.0f}]"

    return task, value


def _measured_columns(results: Sequence[Result], tasks: Sequence[str]) -> list[Column]:
    full = {_setting(r): r for r in results if r["cell"]["method"] == "fullkv" and r["status"] == "completed"}

    def against(*path: str) -> Callable[[Result], str]:
        def value(result: Result) -> str:
            number, base = _dig(result, path), _dig(full.get(_setting(result), {}), path)
            if number is None:
                return "-"
            ratio = f" ({number / base:.2f}x)" if base and result["cell"]["method"] != "fullkv" else ""
            return f"{number:.1f}{ratio}"

        return value

    score: list[Column] = [("all", lambda r: _format(_dig(r, ["score"]), ".1f"))] if len(tasks) > 1 else []
    return [
        *score,
        ("resident", lambda r: _format(_dig(r, ["budget", "resident_fraction"]), ".3f")),
        ("prefill ms", against("latency", "prefill_ms", "median")),
        ("decode ms /token", against("latency", "decode_ms_per_token", "median")),
        *([("status", _status)] if any(r["status"] != "completed" for r in results) else []),
    ]


def _status(result: Result) -> str:
    killed = result["status"] == "failed" and result["error"]["type"] == KILLED
    return "killed" if killed else str(result["status"])


def _setting(result: Result) -> str:
    return setting(result["config"])


def _dig(result: Result, path: Iterable[str]) -> float | None:
    value: Any = result
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _format(number: float | None, spec: str) -> str:
    return "-" if number is None else format(number, spec)


def _legend(results: Sequence[Result]) -> list[str]:
    sizes = sorted({task["n"] for result in results for task in result.get("tasks", {}).values()})
    examples = f", n = {'-'.join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))} a task" if sizes else ""
    against = "; (x) against fullkv" if any(r["cell"]["method"] == "fullkv" for r in results) else ""
    return [
        f"scores 0 to 100 [95% interval]{examples}; resident: KV bytes on the device over the full cache, "
        f"measured after prefill; times are medians{against}"
    ]


def _notes(results: Sequence[Result]) -> list[str]:
    """What a reader must know about single cells: what their methods note, and why there is a gap."""
    notes = []
    for result in results:
        name = f"{result['cell']['method']} {result['cell']['budget']}"
        notes += [f"{name}: {note}" for note in result.get("notes", [])]
        if result.get("error"):
            notes.append(f"{name}: {_status(result)}: {result['error']['message']}")
    return notes
