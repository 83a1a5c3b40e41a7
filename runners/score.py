"""runner=score: predictions scored again, under the rules of the benchmark that the command names.

Reads cells (result.json and predictions.jsonl), or prediction files of the benchmark's own scripts, and
writes one CSV: a row for each cell and task and for each of the benchmark's averages, beside what the record
says.
Needs no model and changes no record. What was generated stays what it is: only rules of scoring can differ.
"""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich import box, get_console
from rich.console import Console
from rich.table import Table

from hcache import records
from hcache.benchmarks.base import Benchmark, Tree, by_task
from hcache.metrics import bootstrap_ci, tree_ci, tree_mean, tree_size
from runners import CellOutcome
from runners.config import ConfigError, RunConfig, one_line
from runners.lines import LineError, ReadLine, read_lines
from runners.prediction_files import OWN, read_directory

log = logging.getLogger(__name__)
SEED = 0
"""Of the bootstrap."""
_WIDTH_WITHOUT_TERMINAL = 200


@dataclass
class ScoreSettings:
    """Settings of runner=score, the section `score` of the configuration.

    Args:
        source: a directory with cells, one cell, or prediction files; None takes outputs/<tag>.
        out: the CSV; None puts it into `source` if that holds cells, else into outputs/<tag>, under the name
            scores-<benchmark>-<rules>.csv.
    """

    source: str | None = None
    out: str | None = None


@dataclass(frozen=True)
class Predicted:
    """Predictions of one cell, or of one model in files of another program.

    Args:
        names: the columns of the CSV that are the same in all its rows.
        lines: what is scored.
        result: the record that the new scores are compared with; empty where there is none.
    """

    names: Mapping[str, str]
    lines: Sequence[ReadLine]
    result: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the CSV; scores and intervals are 0 to 100.

    Args:
        source: the cell's directory, below score.source.
        rules, stored_rules: those of this scoring, and those in the record.
        kind: task or aggregate.
        n: examples; None where the average is one of tasks.
        ci_low, ci_high: bootstrap interval, 95%.
        stored_score, difference: of the record, and the new score less that; None where it has none.
        changed: examples whose score is another than in the record; None for averages and without a record.
    """

    source: str
    model: str
    method: str
    budget: str
    seed: str
    config_hash: str
    benchmark: str
    rules: str
    stored_rules: str
    kind: str
    name: str
    metric: str
    n: int | None
    score: float
    ci_low: float | None
    ci_high: float | None
    stored_score: float | None
    difference: float | None
    changed: int | None


def run(run: RunConfig) -> CellOutcome:
    """Score again; the outcome's message says what was read, what changed and where the CSV lies."""
    try:
        return CellOutcome("completed", message=_rescored(run))
    except (ValueError, OSError, ImportError) as error:
        return CellOutcome("failed", message=f"runner=score: {error}")
    except Exception as error:  # an outcome, never an exception, goes to the launcher
        log.exception("runner=score failed")
        return CellOutcome("failed", message=f"runner=score: {type(error).__name__}: {error}")


def settings_of(section: Any) -> ScoreSettings:
    """The section `score` as typed settings. Raises ConfigError for an unknown key or a wrong value."""
    if isinstance(section, ScoreSettings):
        return section
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ScoreSettings), section or {}))
    except OmegaConfBaseException as error:
        raise ConfigError(f"score: {one_line(error)}") from error
    assert isinstance(typed, ScoreSettings)
    return typed


def rules_of(settings: Any) -> str:
    """The name of the rules that a benchmark, or its section in a record, scores by."""
    section = settings if isinstance(settings, Mapping) else records.plain(settings)
    return str(section.get("rules") or section.get("extraction") or section["protocol"])


def _rescored(run: RunConfig) -> str:
    settings = settings_of(run.score)
    outputs = Path(run.outputs, run.tag)
    source = outputs if settings.source is None else Path(settings.source).expanduser()
    if not source.exists():
        raise ConfigError(f"score.source={source} does not exist; give a directory with cells or predictions")
    cells = find_cells(source, run.benchmark.name)
    predicted = [read_cell(source, cell) for cell in cells] if cells is not None else _foreign(run, source)
    rows = [row for one in predicted for row in score_again(run.benchmark, one)]
    name = f"scores-{run.benchmark.name}-{rules_of(run.benchmark)}.csv"
    place = (source if cells is not None else outputs) / records.safe_name(name)
    out = place if settings.out is None else Path(settings.out).expanduser()
    write_csv(out, rows)
    show(rows)
    changed = sum(row.changed or 0 for row in rows)
    examples = sum(len(one.lines) for one in predicted)
    return (
        f"{examples} predictions of {len(predicted)} {'cells' if cells is not None else 'models'} scored by "
        f"{rules_of(run.benchmark)}, {changed} have another score than before; written to {out}"
    )


# --- what is read


def find_cells(source: Path, benchmark: str) -> list[Path] | None:
    """Directories of completed cells of the benchmark in `source`; None where it holds no cell of any.

    Raises:
        ConfigError: none of the cells can be scored.
        CorruptRecord: a result that can't be read.
    """
    directories = sorted(path.parent for path in source.rglob(records.PREDICTIONS_FILE))
    if not directories:
        return None
    found, others, unfinished = [], set(), []
    for directory in directories:
        if directory.parent.name == records.SHARDS:
            continue
        result = records.read_result(directory)
        if result is None or result["status"] != "completed":
            unfinished.append(directory)
        elif result["config"]["benchmark"]["name"] == benchmark:
            found.append(directory)
        else:
            others.add(str(result["config"]["benchmark"]["name"]))
    for directory in unfinished:
        log.warning("left out %s: the cell is not completed", directory)
    if not found:
        has = f"completed cells of {', '.join(sorted(others))}" if others else "no completed cell"
        raise ConfigError(
            f"score.source={source} has {has}, and benchmark={benchmark} was asked for; shards are scored "
            "after runner=merge"
        )
    return found


def read_cell(source: Path, directory: Path) -> Predicted:
    """A completed cell's predictions and result. Raises CorruptRecord, LineError."""
    result = records.read_result(directory)
    assert result is not None
    cell, lines = result["cell"], read_lines(directory / records.PREDICTIONS_FILE)
    counted = sum(task["n"] for task in result["tasks"].values())
    if counted != len(lines):
        log.warning(
            "%s: all %d predictions are scored, the record's scores are of %d", directory, len(lines), counted
        )
    for line in lines:
        line.number("score")
    names = {
        "source": str(directory.relative_to(source)),
        **{key: str(cell[key]) for key in ("model", "method", "budget", "seed")},
        "config_hash": result["config_hash"],
        "stored_rules": rules_of(result["config"]["benchmark"]),
    }
    return Predicted(names, lines, result)


def _foreign(run: RunConfig, source: Path) -> list[Predicted]:
    blank = dict.fromkeys(("method", "budget", "seed", "config_hash", "stored_rules"), "")
    found = read_directory(run.benchmark.name, source)
    return [Predicted({"source": model, "model": model, **blank}, lines) for model, lines in found.items()]


# --- scores


def score_again(benchmark: Benchmark, predicted: Predicted) -> list[Row]:
    """A row for every task and average of one cell. Raises LineError."""
    names = {**predicted.names, "benchmark": benchmark.name, "rules": rules_of(benchmark)}
    lines = [_scored(benchmark, line) for line in predicted.lines]
    stored = predicted.result.get("tasks", {})
    rows = []
    for task, scores in by_task(lines).items():
        own = [(new, old) for new, old in zip(lines, predicted.lines, strict=True) if new["task"] == task]
        rows.append(
            _row(
                names,
                ("task", task, str(own[0][0].get("metric", ""))),
                (len(scores), 100 * tree_mean(scores), bootstrap_ci(scores, SEED)),
                stored.get(task, {}).get("score"),
                sum(new["score"] != old.values["score"] for new, old in own) if stored else None,
            )
        )
    return rows + _averages(benchmark, lines, names, predicted.result)


def _scored(benchmark: Benchmark, line: ReadLine) -> dict[str, Any]:
    """The line with its new score. Raises LineError for what the benchmark can't score.

    What a line holds under the name of a setting is the setting of the run; here the command's counts.
    """
    task, prediction, answers = line.text("task"), line.text("prediction"), line.texts("answers")
    extra = line.rest(*OWN, *(setting.name for setting in fields(benchmark)))
    try:
        score = float(benchmark.score(task, prediction, answers, **extra))
    except (ValueError, TypeError, LookupError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise line.place.error(f"can't be scored as task {task} of {benchmark.name} ({reason})") from error
    if not 0 <= score <= 1:
        raise line.place.error(f"benchmark '{benchmark.name}' scores it {score}, which is not from 0 to 1")
    own = {"task": task, "id": line.text("id"), "metric": line.value("metric"), "score": score}
    return {**extra, **own, "prediction": prediction, "answers": answers}


def _averages(
    benchmark: Benchmark,
    lines: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    result: Mapping[str, Any],
) -> list[Row]:
    """The benchmark's averages of examples, and its one average of tasks, `score` in the record."""
    try:
        trees = benchmark.aggregates(lines)
    except LookupError as error:
        reason = f"{names['source']}: the averages of {benchmark.name} need field {error}, which lines lack"
        if result:
            raise LineError(reason) from error
        log.warning("%s; they are left out", reason)
        trees = {}
    stored = result.get("aggregates", {})
    rows = [
        _row(names, ("aggregate", name, ""), _of_tree(tree), stored.get(name, {}).get("score"))
        for name, tree in trees.items()
    ]
    tasks = {task: 100 * tree_mean(scores) for task, scores in by_task(lines).items()}
    overall = ("aggregate", "score", "")
    return [*rows, _row(names, overall, (None, benchmark.aggregate(tasks), None), result.get("score"))]


def _of_tree(tree: Tree) -> tuple[int, float, tuple[float, float]]:
    return tree_size(tree), 100 * tree_mean(tree), tree_ci(tree, SEED)


def _row(
    names: Mapping[str, str],
    called: tuple[str, str, str],
    found: tuple[int | None, float, tuple[float, float] | None],
    stored: float | None,
    changed: int | None = None,
) -> Row:
    kind, name, metric = called
    n, score, ci = found
    low, high = (None, None) if ci is None else (100 * ci[0], 100 * ci[1])
    difference = None if stored is None else score - stored
    return Row(
        **names,
        kind=kind,
        name=name,
        metric=metric,
        n=n,
        score=score,
        ci_low=low,
        ci_high=high,
        stored_score=stored,
        difference=difference,
        changed=changed,
    )


# --- what is written and shown


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write the rows, atomically: a reader sees the old file or the new one."""
    columns = [column.name for column in fields(Row)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(getattr(row, column)) for column in columns] for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text.getvalue(), encoding="utf-8")
    os.replace(temporary, path)


def _cell(value: Any) -> str:
    """A number in four decimals, nothing for None."""
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def show(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print the scores beside those of the records."""
    console = console or get_console()
    if not console.is_terminal:
        console = Console(file=console.file, width=_WIDTH_WITHOUT_TERMINAL)
    table = Table(title="Scored again", title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    for header in ("cell", "task or average", "n", "score [95%]", "in the record", "difference", "changed"):
        table.add_column(header, justify="left" if header in ("cell", "task or average") else "right")
    for row in rows:
        interval = "" if row.ci_low is None else f" [{row.ci_low:.1f}-{row.ci_high:.1f}]"
        rest = [_shown(row.stored_score, ".2f"), _shown(row.difference, "+.2f"), _shown(row.changed, "d")]
        table.add_row(row.source, row.name, _shown(row.n, "d"), f"{row.score:.2f}{interval}", *rest)
    table.caption = (
        "scores 0 to 100 with bootstrap intervals; changed: examples with another score than before"
    )
    console.print(table)


def _shown(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
