"""runner=budget: what each method would keep, attend to and move at each budget, in one table; nothing runs.

The figures are planned: `Method.usage` from the model's geometry, a prompt length and the size of a number.
Tests hold those formulas to measured bytes; the records of runs have measured ones. The model is never
loaded. Takes all cells of a command together, so it sweeps without -m. Knows no method by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich import box, get_console
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hcache.budget import Budget, InfeasibleBudget
from hcache.geometry import Geometry
from hcache.methods import Method
from hcache.methods.registry import make
from hcache.models import Dtype, ModelNotFound, ModelSpec
from runners import CellOutcome
from runners.checks import asked_model
from runners.config import ConfigError, RunConfig, budget_of, geometry_of, one_line

_WIDTH_WITHOUT_TERMINAL = 240
_SHAPE = ("layers", "query heads", "KV heads", "head dim")
_LEGEND = (
    "planned, not measured: formulas that tests hold to measured bytes; records of runs have measured ones",
    "tokens: kept on average per KV head per layer; resident: KV bytes on the device over the full cache; "
    "attended: share of the prompt that a decode step reads; moved: host to device in a decode step, at most",
)


@dataclass
class BudgetTable:
    """Settings of runner=budget, the section `budget_table` of the configuration.

    Args:
        prompt_tokens: length of the prompt that is planned for.
        shape: layers, query heads, KV heads and head dim, for a model whose config can't be read here.
    """

    prompt_tokens: int = 32768
    shape: list[int] | None = None

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1:
            raise ConfigError(f"budget_table.prompt_tokens={self.prompt_tokens} must be at least 1")
        if self.shape is not None and len(self.shape) != len(_SHAPE):
            raise ConfigError(f"budget_table.shape={self.shape} must be [{', '.join(_SHAPE)}]")


@dataclass(frozen=True)
class BudgetRow:
    """One method at one budget, planned; numbers are None where there is no plan.

    Args:
        method: its name, with the options by which methods of one name differ.
        kept: the budget's label, "full" for a method that ignores it.
        tokens: the budget as tokens of this prompt, average per KV head per layer.
        parts: what the budget became, in the method's own terms.
        device_bytes, host_bytes: payload and metadata after prefill, whole model.
        moved_bytes: host to device in one decode step, at most.
        resident_fraction: device_bytes over the full cache.
        attended_fraction: prompt tokens that a decode step attends to, over all.
        notes: what a reader must know about this row.
        reason: why there is no plan; empty where there is one.
        smallest_fraction, smallest_tokens: the smallest feasible budget, where this one is not.
    """

    method: str
    kept: str
    tokens: int
    parts: Mapping[str, int | str] = field(default_factory=dict)
    device_bytes: int | None = None
    resident_fraction: float | None = None
    attended_fraction: float | None = None
    host_bytes: int | None = None
    moved_bytes: int | None = None
    notes: tuple[str, ...] = ()
    reason: str = ""
    smallest_fraction: float | None = None
    smallest_tokens: int | None = None


def budget_rows(
    methods: Sequence[Method | str],
    geometry: Geometry,
    budgets: Sequence[Budget | float | int],
    prompt_tokens: int,
    number_bytes: int,
) -> list[BudgetRow]:
    """A row per method and budget, methods in their order; one that ignores the budget has one row.

    Args:
        number_bytes: of one number of a key or value (bfloat16 2, float32 4).

    Raises:
        ValueError: an unknown method, or a budget out of range.
    """
    made = [make(method) for method in methods]
    asked = [Budget.of(budget) for budget in budgets]
    return [
        _row(label, method, budget, geometry, prompt_tokens, number_bytes)
        for label, method in zip(_labels(made), made, strict=True)
        for budget in (asked if method.uses_budget else [None])
    ]


def _row(
    label: str,
    method: Method,
    budget: Budget | None,
    geometry: Geometry,
    prompt_tokens: int,
    number_bytes: int,
) -> BudgetRow:
    kept = "full" if budget is None else budget.label
    budget = budget or Budget(kept_fraction=1.0)
    tokens = min(budget.tokens(prompt_tokens), prompt_tokens)
    try:
        usage = method.usage(geometry, budget, prompt_tokens, number_bytes)
        notes = method.notes(geometry, budget, prompt_tokens)
    except InfeasibleBudget as error:
        return BudgetRow(
            label,
            kept,
            tokens,
            reason=one_line(error),
            smallest_fraction=error.smallest_fraction,
            smallest_tokens=error.smallest_tokens,
        )
    except ValueError as error:
        return BudgetRow(label, kept, tokens, reason=one_line(error))
    return BudgetRow(
        label,
        kept,
        tokens,
        parts=usage.parts,
        device_bytes=usage.device_bytes,
        resident_fraction=usage.device_bytes / _full_bytes(geometry, prompt_tokens, number_bytes),
        attended_fraction=usage.attended_tokens / prompt_tokens,
        host_bytes=usage.host_bytes,
        moved_bytes=usage.moved_bytes,
        notes=tuple(notes),
    )


def _full_bytes(geometry: Geometry, prompt_tokens: int, number_bytes: int) -> int:
    """Keys and values of every token, head and layer."""
    return 2 * geometry.heads * geometry.head_dim * prompt_tokens * number_bytes


def _labels(methods: Sequence[Method]) -> list[str]:
    """Names, with the options by which methods of one name differ."""
    by_name: dict[str, list[dict[str, str]]] = {}
    for method in methods:
        by_name.setdefault(method.name, []).append(dict(_options(method)))
    labels = []
    for method in methods:
        alike = by_name[method.name]
        own = dict(_options(method))
        differing = [f"{key}={own[key]}" for key in own if len({other.get(key) for other in alike}) > 1]
        labels.append(" ".join([method.name, *differing]))
    return labels


def _options(settings: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every plain option below a dataclass, with its path, as text."""
    for option in dataclasses.fields(settings):
        value = getattr(settings, option.name)
        if dataclasses.is_dataclass(value):
            yield from _options(value, f"{prefix}{option.name}.")
        elif value is None or isinstance(value, (str, int, float, Enum, list, tuple)):
            yield f"{prefix}{option.name}", value.name if isinstance(value, Enum) else str(value)


# --- the runner


def run(config: RunConfig) -> CellOutcome:
    """The table of a single cell, where a sweep also has other runners; never raises."""
    try:
        compare([config])
    except ValueError as error:
        return CellOutcome("failed", message=f"runner=budget: {error}")
    return CellOutcome("completed")


def compare(runs: Sequence[RunConfig], console: Console | None = None) -> None:
    """Print one table for all cells; one for each model and prompt length where there are several.

    Raises:
        ConfigError: settings out of range, or a model whose shape can't be known here.
    """
    groups: list[tuple[ModelSpec, BudgetTable, list[RunConfig]]] = []
    for run in runs:
        settings = settings_of(run.budget_table)
        known = [group for group in groups if group[:2] == (run.model, settings)]
        if not known:
            groups.append((run.model, settings, [run]))
        else:
            known[0][2].append(run)
    for title, rows in [_planned(*group) for group in groups]:
        show(rows, title, console)


def settings_of(section: Any) -> BudgetTable:
    """The section `budget_table` as typed settings. Raises ConfigError for a wrong key or value."""
    if isinstance(section, BudgetTable):
        return section
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(BudgetTable), section or {}))
    except OmegaConfBaseException as error:
        raise ConfigError(f"budget_table: {one_line(error)}") from error
    assert isinstance(typed, BudgetTable)
    return typed


def _planned(
    spec: ModelSpec, settings: BudgetTable, runs: Sequence[RunConfig]
) -> tuple[str, list[BudgetRow]]:
    """Title and rows of one table."""
    methods: list[Method] = []
    for run in runs:
        if run.method not in methods:
            methods.append(run.method)
    budgets = list(dict.fromkeys(budget_of(run) for run in runs))
    geometry, number_bytes, tokens = _geometry(spec, settings), _number_bytes(spec), settings.prompt_tokens
    title = (
        f"Planned KV cache of {spec.name} ({geometry.layers} layers, {geometry.kv_heads} KV heads, "
        f"{geometry.head_dim} numbers of {number_bytes} bytes) for a prompt of {tokens} tokens, "
        f"{_size(_full_bytes(geometry, tokens, number_bytes))} in full"
    )
    rows = budget_rows(methods, geometry, budgets, tokens, number_bytes)
    typed_in = asked_model(spec)
    return title, [replace(row, reason=row.reason.replace("model=...", typed_in)) for row in rows]


def _geometry(spec: ModelSpec, settings: BudgetTable) -> Geometry:
    if settings.shape is not None:
        layers, query_heads, kv_heads, head_dim = settings.shape
        try:
            return Geometry(layers, query_heads, kv_heads, head_dim)
        except ValueError as error:
            raise ConfigError(f"budget_table.shape={settings.shape}: {error}") from error
    try:
        return geometry_of(spec)
    except ModelNotFound as error:
        raise ConfigError(f"{error}, or give its budget_table.shape=[{', '.join(_SHAPE)}]") from error


def _number_bytes(spec: ModelSpec) -> int:
    """Bytes of a number in the cache; `auto` is the checkpoint's own format, from its config."""
    if spec.dtype is not Dtype.auto:
        return int(getattr(torch, spec.dtype.value).itemsize)
    from hcache.models.loading import load_config

    advice = "model.dtype=auto says no number size here; set model.dtype=bfloat16 or another"
    try:
        found = load_config(spec).dtype
    except ModelNotFound as error:
        raise ConfigError(f"{advice} ({error})") from error
    if found is None:
        raise ConfigError(f"{advice} (its config names no dtype)")
    return int(found.itemsize if isinstance(found, torch.dtype) else getattr(torch, found).itemsize)


# --- what is shown


def show(rows: Sequence[BudgetRow], title: str, console: Console | None = None) -> None:
    """Print the table and below it what its figures are and what the methods note."""
    console = console or get_console()
    if not console.is_terminal:
        console = Console(file=console.file, width=_WIDTH_WITHOUT_TERMINAL)
    console.print(Text(title))
    console.print(table(rows))
    for line in [*_LEGEND, *_notes(rows)]:
        console.print(Text(line), soft_wrap=True)


def table(rows: Sequence[BudgetRow]) -> Table:
    """The rows side by side; one without a plan says in its last column why."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names = ("method", "kept", "tokens", "resident", "attended", "host", "moved / step", "parts")
    for position, name in enumerate(names):
        text = position in (0, len(names) - 1)
        shown.add_column(name, justify="left" if text else "right", no_wrap=position < 2, overflow="fold")
    for row in rows:
        cells = (
            row.method,
            row.kept,
            str(row.tokens),
            _fraction(row.resident_fraction),
            _fraction(row.attended_fraction),
            _size(row.host_bytes),
            _size(row.moved_bytes),
            _detail(row),
        )
        shown.add_row(*(Text(cell) for cell in cells))
    return shown


def _detail(row: BudgetRow) -> str:
    if row.smallest_fraction is not None:
        return f"infeasible: needs kept_fraction={row.smallest_fraction} (kept_tokens={row.smallest_tokens})"
    if row.reason:
        return row.reason.partition(";")[0]  # what to do about it is below the table
    # Where the budget is nothing but tokens, they have their column.
    parts = [(name, value) for name, value in row.parts.items() if (name, value) != ("tokens", row.tokens)]
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in parts)


def _fraction(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _size(count: int | None) -> str:
    """Bytes in the largest unit of which there is at least one."""
    if not count:
        return "-" if count is None else "0"
    power = min(3, int(math.log2(count)) // 10)
    return f"{count / 1024**power:.2f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def _notes(rows: Sequence[BudgetRow]) -> list[str]:
    """Each note, and each reason that is no shortage of budget, once, with the rows it is about."""
    about: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        unplanned = [row.reason] if row.reason and row.smallest_fraction is None else []
        for note in [*row.notes, *unplanned]:
            about.setdefault((row.method, note), []).append(row.kept)
    return [f"{method} {', '.join(kept)}: {note}" for (method, note), kept in about.items()]
