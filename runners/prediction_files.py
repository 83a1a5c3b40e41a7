"""Predictions that other programs left, in the formats of the benchmarks' own scripts, as lines to be scored.

    longbench      <task>.jsonl, of LongBench-E below pred_e/: pred, answers, all_classes, length
    longbench_v2   <model>.jsonl: response (or pred, its letter), answer, difficulty, length, domain
    infinitebench  preds_<task>.jsonl: prediction, ground_truth (or answer)
    ruler          <task>.jsonl, below a directory called after the length: pred, outputs

Facts of THUDM/LongBench at 2e00731f, OpenBMB/InfiniteBench at 88b3daa6, NVIDIA/RULER at c3f5e3b4. All other
fields of a line are handed on, since scoring may need them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcache.registry import unknown_name
from runners.lines import LineError, ReadLine, read_lines

log = logging.getLogger(__name__)
OWN = ("task", "id", "metric", "prediction", "answers", "score", "example", "self")
"""Names that a line of ours gives a meaning to, or that can't be arguments of `Benchmark.score`."""
_LAYOUT = ("pred", "pred_e", "results", "synthetic")
"""Directories between the files and what is called after the model."""


@dataclass(frozen=True)
class Format:
    """How one benchmark's own scripts write predictions.

    Args:
        prediction, answers: reads them from a line.
        needs: fields that scoring needs besides.
        prefix: before the task in a file's name.
        by_model: a file holds one model's predictions for everything, and is called after the model.
    """

    prediction: Callable[[ReadLine], str]
    answers: Callable[[ReadLine], list[str]]
    needs: tuple[str, ...] = ()
    prefix: str = ""
    by_model: bool = False


def _longbench_v2(line: ReadLine) -> str:
    """The reply, or, where only its letter was kept, a sentence in which every rule finds that letter."""
    if "response" in line.values:
        return line.text("response")
    letter = line.value("response", "pred")
    return "" if letter is None else f"The correct answer is ({line.text('pred')})"


def _labels(line: ReadLine) -> list[str]:
    """A text or number, or a list of them, as texts; of a list of lists the first, as official scores do."""
    value = line.value("ground_truth", "answer")
    try:
        return _flat(value)
    except TypeError as error:
        raise line.place.error(str(error), "ground_truth or answer") from error


def _flat(value: Any) -> list[str]:
    if isinstance(value, list):
        parts = value[0] if value and isinstance(value[0], list) else value
        return [text for part in parts for text in _flat(part)]
    if isinstance(value, str):
        return [value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [str(value)]
    raise TypeError(f"must hold texts or numbers, it holds {value!r}")


FORMATS = {
    "longbench": Format(
        lambda line: line.text("pred"), lambda line: line.texts("answers"), needs=("all_classes", "length")
    ),
    "longbench_v2": Format(
        _longbench_v2,
        lambda line: [line.text("answer")],
        needs=("difficulty", "length", "domain"),
        by_model=True,
    ),
    "infinitebench": Format(lambda line: line.text("prediction"), _labels, prefix="preds_"),
    "ruler": Format(lambda line: line.text("pred"), lambda line: line.texts("outputs")),
}


def read_directory(benchmark: str, source: Path) -> dict[str, list[ReadLine]]:
    """Lines to score of every model, in the order of the files; the model is called after file or directory.

    Raises:
        LineError: no such format, no such files, or a line that is not as it should be.
    """
    if benchmark not in FORMATS:
        raise LineError(f"prediction files: {unknown_name('benchmark', benchmark, FORMATS)}")
    form = FORMATS[benchmark]
    files = sorted(source.glob(f"{form.prefix}*.jsonl")) if source.is_dir() else [source]
    if not files:
        raise LineError(
            f"score.source={source} holds neither cells (predictions.jsonl) nor files "
            f"{form.prefix}<{'model' if form.by_model else 'task'}>.jsonl of {benchmark}"
        )
    found: dict[str, list[ReadLine]] = {}
    for path in files:
        model = path.stem if form.by_model else _model(path)
        task = benchmark if form.by_model else path.stem.removeprefix(form.prefix)
        if benchmark == "longbench" and path.resolve().parent.parent.name == "pred_e":
            task = f"{task.removesuffix('_e')}_e"
        lines = read_lines(path)
        if benchmark == "ruler":
            task, lines = _of_length(path, task, lines)
        if form.by_model and not any("response" in line.values for line in lines):
            log.warning("%s has no replies, only the letters that were found in them", path)
        found.setdefault(model, []).extend(_converted(form, task, line) for line in lines)
    log.info("%s: %d files in the format of %s's own scripts", source, len(files), benchmark)
    return found


def _model(path: Path) -> str:
    """The nearest directory's name that isn't a part of the scripts' own layout."""
    names = [parent.name for parent in path.resolve().parents]
    return next((name for name in names if name not in _LAYOUT and not name.isdecimal()), "")


def _of_length(path: Path, task: str, lines: list[ReadLine]) -> tuple[str, list[ReadLine]]:
    """Task and lines with the nominal length, which a directory says: a line has its own prompt's."""
    names = [parent.name for parent in path.resolve().parents][:2]
    length = next((name for name in names if name.isdecimal()), None)
    own = {} if length is None else {"length": int(length)}
    with_it = [ReadLine(line.place, {**line.rest("length"), **own}) for line in lines]
    return (task if length is None else f"{task}_{length}"), with_it


def _converted(form: Format, task: str, line: ReadLine) -> ReadLine:
    """Raises LineError."""
    for name in form.needs:
        line.value(name)
    values = {
        **line.rest(*OWN),
        "task": task,
        "id": str(line.values.get("_id", line.values.get("id", line.place.number))),
        "metric": "",
        "prediction": form.prediction(line),
        "answers": form.answers(line),
    }
    return ReadLine(line.place, values)
