"""From what lm-evaluation-harness reports to the tasks and documents of a record.

Pure functions of the library's results: they know no model and import no library. A metric that is a number
from 0 to 1 for every document, with the mean as its average, is given as scores from 0 to 100; any other
stays as the library reports it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Sample = Mapping[str, Any]
Results = Mapping[str, Any]

NORMAL_95 = 1.959964
"""Standard errors on either side of a 95% interval."""


class TaskScores(NamedTuple):
    """One task's documents and scores.

    Args:
        metric: what `score` is of, "metric,filter" as the library writes it; None if it has none.
        per_document: document id -> score from 0 to 1; None where the metric isn't a mean of such scores.
        record: the task's entry in result.json.
    """

    metric: str | None
    per_document: dict[int, float] | None
    record: dict[str, Any]


def task_scores(
    results: Results, task: str, interval: Callable[[float, int], tuple[float, float]]
) -> TaskScores:
    """Scores of a task by its first metric.

    Args:
        interval: (mean, n) of scores from 0 to 1 -> their 95% interval.
    """
    row = results["results"][task]
    numbers = metrics_of(row)
    metric = next(iter(numbers), None)
    samples = results["samples"][task]
    single = None if metric is None else _per_document(samples, metric, numbers[metric])
    record = {
        "metric": metric,
        **_score(row, metric, single, interval),
        "n": len({sample["doc_id"] for sample in samples}),
        "metrics": {**numbers, **_stderrs(row)},
        "higher_is_better": _higher(results, task, metric),
        "num_fewshot": results["n-shot"].get(task),
        "version": _plain(results["versions"].get(task)),
    }
    return TaskScores(metric, single, record)


def _score(
    row: Results,
    metric: str | None,
    single: Mapping[int, float] | None,
    interval: Callable[[float, int], tuple[float, float]],
) -> dict[str, Any]:
    """Score, its interval and its scale, `percent` or `reported`."""
    if metric is None:
        return {"score": None, "ci95": None, "scale": "reported"}
    if single is None:
        return {"score": number(row[metric]), "ci95": _interval(row, metric, 1), "scale": "reported"}
    mean = math.fsum(single.values()) / len(single)
    low, high = interval(mean, len(single))
    return {"score": 100 * mean, "ci95": [100 * low, 100 * high], "scale": "percent"}


def group_scores(results: Results, percent: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The library's own averages of groups, by their first metric.

    Args:
        percent: tasks whose scores are from 0 to 100; a group of nothing else is so too.
    """
    found = {}
    for group, row in results.get("groups", {}).items():
        metric = next(iter(metrics_of(row)), None)
        if metric is None:
            continue
        scale = 100 if set(leaves(results, group)) <= set(percent) else 1
        score, interval = number(row[metric]), _interval(row, metric, scale)
        if score is not None:
            found[group] = {
                "metric": metric,
                "score": scale * score,
                "n": int(row["sample_len"]),
                "ci95": interval,
                "scale": "percent" if scale == 100 else "reported",
            }
    return found


def leaves(results: Results, name: str) -> list[str]:
    """The tasks below a group, or the task itself."""
    children = results.get("group_subtasks", {}).get(name)
    if not children:
        return [name]
    return list(dict.fromkeys(leaf for child in children for leaf in leaves(results, child)))


def overall(
    results: Results, tasks: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Mapping[str, Any]]
) -> tuple[float | None, list[str]]:
    """The mean over groups that have an average and tasks outside of them; notes about what it leaves out.

    Numbers on another scale than 0 to 100 count only where there are no others.
    """
    inside = {name for group in groups for name in leaves(results, group)}
    nested = {name for group in groups for name in _below(results, group)}
    entries = {name: entry for name, entry in groups.items() if name not in nested}
    entries |= {name: entry for name, entry in tasks.items() if name not in inside}
    scored = {name: entry for name, entry in entries.items() if entry["score"] is not None}
    percent = {name: entry for name, entry in scored.items() if entry["scale"] == "percent"}
    chosen = percent or scored
    notes = []
    if len(chosen) < len(entries):
        others = ", ".join(
            f"{name} ({entry['metric']})" for name, entry in entries.items() if name not in chosen
        )
        notes.append(f"the score over all tasks leaves out those not from 0 to 100: {others}")
    if chosen and not percent:
        metrics = sorted({str(entry["metric"]) for entry in chosen.values()})
        notes.append(f"scores are as the library reports them, not from 0 to 100: {', '.join(metrics)}")
    if not chosen:
        return None, notes
    return math.fsum(entry["score"] for entry in chosen.values()) / len(chosen), notes


def _below(results: Results, group: str) -> Iterator[str]:
    for child in results.get("group_subtasks", {}).get(group, []):
        yield child
        yield from _below(results, child)


def documents(results: Results, task: str, scores: TaskScores) -> Iterator[tuple[int, dict[str, Any]]]:
    """(document id, the part of its line that is its answer) of every document, in the library's order."""
    by_document: dict[int, list[Sample]] = {}
    for sample in results["samples"][task]:
        by_document.setdefault(sample["doc_id"], []).append(sample)
    for document, samples in by_document.items():
        score = None if scores.per_document is None else scores.per_document.get(document)
        yield (
            document,
            {
                "task": task,
                "id": str(document),
                "metric": scores.metric,
                **_answer(samples[0]),
                "score": score,
                "metrics": {
                    f"{name},{sample['filter']}": _plain(sample.get(name))
                    for sample in samples
                    for name in sample["metrics"]
                },
            },
        )


def _answer(sample: Sample) -> dict[str, Any]:
    """Prediction and answers; for log-likelihoods also those of every continuation."""
    answers, target = sample["filtered_resps"], sample["target"]
    if not answers or isinstance(_first(answers), str):
        return {"prediction": _text(answers[0] if answers else ""), "answers": _targets(target)}
    if not isinstance(_first(answers), list | tuple):  # a rolling log-likelihood
        return {"prediction": "", "answers": [], "log_likelihoods": [number(answer) for answer in answers]}
    said = [str(arguments[1]) for arguments in sample["arguments"]]
    known = said if len(set(said)) == len(said) else [str(i) for i in range(len(said))]
    values = [float(answer[0]) for answer in answers]
    best = max(range(len(values)), key=values.__getitem__)
    greedy = [bool(answer[1]) for answer in answers]
    prediction = known[best] if len(values) > 1 else known[0] if greedy[0] else ""
    return {
        "prediction": prediction.strip(),
        "answers": _targets(target, known if len(known) > 1 else ()),
        "log_likelihoods": [number(value) for value in values],
        "greedy": greedy,
    }


def _first(answers: Sequence[Any]) -> Any:
    """The first answer; of several to one request (a filter that keeps them all) the first of those."""
    first = answers[0]
    return first[0] if isinstance(first, list) and first and isinstance(first[0], str) else first


def _text(answer: Any) -> str:
    return str(answer[0]) if isinstance(answer, list) and answer else str(answer)


def _targets(target: Any, choices: Sequence[str] = ()) -> list[str]:
    """The right answers as text; the number of a choice stands for the choice."""
    listed = list(target) if isinstance(target, list | tuple) else [target]
    numbered = [
        isinstance(one, int) and not isinstance(one, bool) and 0 <= one < len(choices) for one in listed
    ]
    return [
        choices[one].strip() if is_number else str(one)
        for one, is_number in zip(listed, numbered, strict=True)
    ]


def metrics_of(row: Results) -> dict[str, float | None]:
    """The metrics in one of the library's rows, "metric,filter", in its order; None for what is no number."""
    return {key: number(value) for key, value in row.items() if "," in key and not _is_stderr(key)}


def _stderrs(row: Results) -> dict[str, float]:
    found = {key: number(value) for key, value in row.items() if "," in key and _is_stderr(key)}
    return {key: value for key, value in found.items() if value is not None}


def _is_stderr(key: str) -> bool:
    return key.split(",", 1)[0].endswith("_stderr")


def _interval(row: Results, metric: str, scale: float) -> list[float] | None:
    """95% by the library's standard error; None where it has none."""
    name, _, kind = metric.partition(",")
    value, error = number(row[metric]), number(row.get(f"{name}_stderr,{kind}"))
    if value is None or error is None:
        return None
    return [scale * (value - NORMAL_95 * error), scale * (value + NORMAL_95 * error)]


def _per_document(samples: Sequence[Sample], metric: str, reported: float | None) -> dict[int, float] | None:
    """Scores of the documents, if they are from 0 to 1 and their mean is what the library reports."""
    name, _, kind = metric.partition(",")
    found: dict[int, float] = {}
    for sample in samples:
        if sample["filter"] == kind and name in sample:
            value = number(sample[name])
            if value is None or not 0 <= value <= 1:
                return None
            found[sample["doc_id"]] = value
    if not found or reported is None:
        return None
    mean = math.fsum(found.values()) / len(found)
    return found if math.isclose(mean, reported, rel_tol=1e-9, abs_tol=1e-9) else None


def _higher(results: Results, task: str, metric: str | None) -> bool | None:
    known = results.get("higher_is_better", {}).get(task, {})
    return None if metric is None else known.get(metric.split(",", 1)[0])


def number(value: Any) -> float | None:
    """A finite number, of numpy's too; None for anything else."""
    if isinstance(value, str) or value is None:
        return None
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def _plain(value: Any) -> Any:
    """JSON data; what is none becomes its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    found = number(value)
    return str(value) if found is None else found
