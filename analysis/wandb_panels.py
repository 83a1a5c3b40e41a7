"""The parts of a W&B report of several methods and budgets, made with the library wandb-workspaces.

Builds only: nothing here asks the server. The library is W&B's and in public preview; all that is known of
it stands in this module. Run sets have no project of their own, so that they are those of the report's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import wandb_workspaces.reports.v2 as wr

from analysis import wandb_keys as keys
from analysis.wandb_keys import Key

COLUMNS = 24
"""Units of a grid's width."""

_TITLE = 128  # the longest that the library takes


def report(entity: str, project: str, tags: Sequence[str], tasks: Sequence[str], records: str = "") -> Any:
    """The report, not saved.

    tasks: those that get a panel each; none: one panel of all there are. records: Markdown of records on
    this machine, shown as it is.
    """
    named = ", ".join(tags)
    shown: list[Any] = [wr.H2("From the records"), wr.MarkdownBlock(records)] if records else []
    return wr.Report(
        entity=entity,
        project=project,
        title=_cut(f"KV-cache compression: {named}", _TITLE),
        description=f"Methods and budgets of the runs in {'group' if len(tags) == 1 else 'groups'} {named}.",
        width="fluid",
        blocks=[
            *_introduction(tags),
            *shown,
            *_methods(tags),
            *_trade(tags),
            *_curves(tags),
            *_tasks(tags, tasks),
            *_latency(tags),
            *_cells(tags),
        ],
    )


def plain(report: Any) -> dict[str, Any]:
    """The report as JSON data, as it would be saved; ids of panels and run sets are random."""
    found: dict[str, Any] = json.loads(report._to_model().model_dump_json(by_alias=True, exclude_none=True))
    return found


# --- sections


def _introduction(tags: Sequence[str]) -> list[Any]:
    listed = ", ".join(f"`{tag}`" for tag in tags)
    return [
        wr.MarkdownBlock(
            f"Compression methods for the KV cache, by budget. Compared are the runs of {listed}: a run is "
            "one model, benchmark, method, budget and seed, and its group is its tag. A budget is what is "
            "**kept**. Scores, bytes and times are measured in the same run. A cell without a score is "
            "infeasible or failed (its status, where it has a run): result.json says why.\n\n"
            "Bars and points of a grouped run set are means of its runs: where groups mix models, benchmarks "
            "or seeds, filter them apart first. Intervals of 95% are in each run's summary "
            "(`tasks.<task>.ci95`, `aggregates`)."
        ),
        wr.MarkdownBlock(keys.explained()),
        wr.TableOfContents(),
    ]


def _methods(tags: Sequence[str]) -> list[Any]:
    bars = [
        _bars(keys.SCORE, "Score (0 to 100, higher is better)"),
        _bars(keys.DECODE, "Decoding, ms a token (lower is better)"),
        _bars(keys.RESIDENT, "KV bytes on the device over the full cache (lower is better)"),
        _bars(keys.PREFILL, "Prefill, ms (lower is better)"),
    ]
    return [
        wr.H2("Methods by budget"),
        wr.P("Below the bars, each run set is a table: one group a budget, in it one a method."),
        _grid(tags, [*keys.BUDGET, keys.METHOD], bars),
    ]


def _trade(tags: Sequence[str]) -> list[Any]:
    points = [
        _scatter(keys.DEVICE_BYTES, keys.SCORE, "Score against KV bytes kept on the device"),
        _scatter(keys.FRACTION, keys.SCORE, "Score over the budget, as a share (1: all is kept)"),
        _scatter(keys.TOKENS, keys.SCORE, "Score over the budget in tokens"),
        _scatter(keys.ATTENDED, keys.SCORE, "Score against the share of the prompt read in a step"),
        _scatter(keys.DECODE, keys.SCORE, "Score against decoding, ms a token"),
        _scatter(keys.DEVICE_BYTES, keys.DECODE, "Decoding, ms a token, against KV bytes on the device"),
    ]
    return [
        wr.H2("What the budget buys"),
        wr.P("A point is a method at a budget."),
        _grid(tags, [keys.METHOD, *keys.BUDGET], points),
    ]


def _curves(tags: Sequence[str]) -> list[Any]:
    panels = [
        wr.LinePlot(
            title="Score of the examples, smoothed (0 to 100, higher is better)",
            y=[keys.SCORE_OF_EXAMPLE.name],
            title_x="example",
            smoothing_type="exponentialTimeWeighted",
            smoothing_factor=0.9,
            smoothing_show_original=False,
        ),
        wr.LinePlot(
            title="Decoding of the examples, ms a token (lower is better)",
            y=[keys.DECODE_OF_EXAMPLE.name],
            title_x="example",
        ),
    ]
    return [
        wr.H2("Over the examples"),
        wr.P(
            "All runs of a benchmark take the examples in the same order, so curves can be held side by side."
        ),
        _grid(tags, [keys.METHOD, *keys.BUDGET], panels),
    ]


def _tasks(tags: Sequence[str], tasks: Sequence[str]) -> list[Any]:
    panels = [_bars(keys.of_task(task), f"{task} (0 to 100, higher is better)") for task in tasks]
    curves = wr.LinePlot(
        title="Scores of the examples by task (0 to 100, higher is better)",
        metric_regex=keys.SCORE_IN_TASK.name.replace("<task>", ".*"),
        title_x="example",
    )
    return [wr.H2("Tasks"), _grid(tags, [*keys.BUDGET, keys.METHOD], [*panels, curves])]


def _latency(tags: Sequence[str]) -> list[Any]:
    panel = wr.LinePlot(
        title="A decode step of runner=latency by batch, ms (lower is better)",
        x=keys.CONTEXT.name,
        metric_regex=keys.STEP_TIME.name.replace("<n>", "[0-9]+"),
        title_x="tokens of context",
    )
    return [
        wr.H2("Decoding against context"),
        wr.P("Empty unless these tags hold runs of runner=latency."),
        _grid(tags, [keys.METHOD, *keys.BUDGET], [panel]),
    ]


def _cells(tags: Sequence[str]) -> list[Any]:
    comparer = wr.RunComparer(diff_only="split", layout=wr.Layout(w=COLUMNS, h=12))
    return [
        wr.H2("Every run"),
        wr.P("What differs between runs, configuration and figures; below it every run as a row."),
        wr.PanelGrid(runsets=_run_sets(tags, []), panels=[comparer]),
    ]


# --- run sets and panels


def _run_sets(tags: Sequence[str], grouping: Sequence[Key]) -> list[Any]:
    """One a tag, which is the group of its runs. Columns are those of a table of methods and budgets."""
    return [
        wr.Runset(
            name=tag,
            filters=_in_group(tag),
            groupby=[f"{key.where}.{key.name}" for key in grouping],
            order=[wr.OrderBy(wr.SummaryMetric(keys.SCORE.name), ascending=False)],
            pinned_columns=[_column(key) for key in keys.WHO],
            visible_columns=[_column(key) for key in keys.CELL],
            lock_columns=True,
        )
        for tag in tags
    ]


def _in_group(tag: str) -> str:
    """The filter of a tag's runs. A tag may hold an =, which the library would double if it stood bare."""
    return "Metric('Group') == '{}'".format(tag.replace("=", r"\x3d"))


def _column(key: Key) -> str:
    """A key as the table of runs names its columns."""
    if key.where == keys.CONFIG:
        first, _, rest = key.name.partition(".")
        return f"config:{first}.value.{rest}"
    return f"{key.where}:{key.name}"


def _grid(tags: Sequence[str], grouping: Sequence[Key], panels: Iterable[Any], across: int = 2) -> Any:
    """Panels of one size, `across` in a row, over the run sets of the tags."""
    width, height = COLUMNS // across, 9
    placed = list(panels)
    for number, panel in enumerate(placed):
        row, column = divmod(number, across)
        panel.layout = wr.Layout(x=column * width, y=row * height, w=width, h=height)
    return wr.PanelGrid(runsets=_run_sets(tags, grouping), panels=placed)


def _bars(key: Key, title: str) -> Any:
    """A bar for every group of the run set."""
    return wr.BarPlot(title=title, metrics=[key.name])


def _scatter(x: Key, y: Key, title: str) -> Any:
    return wr.ScatterPlot(title=title, x=wr.SummaryMetric(x.name), y=wr.SummaryMetric(y.name))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
