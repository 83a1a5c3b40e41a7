"""RULER's prompts as kvpress prepared them: rows of simonjegou/ruler, or of files like its.

One configuration a length (4096, 8192, 16384; in Llama 3.1's tokens), 500 rows of each of 13 tasks, with
context, question, answer_prefix, answer, task and max_new_tokens. Knows nothing of how they were made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hcache.benchmarks.source import DataError, Row, Rows, local_file

REPO = "simonjegou/ruler"
_TEXTS = ("context", "question", "answer_prefix", "task")


def local_rows(data_dir: str | None, length: int) -> Path | None:
    """The user's file of one length; None if there is none."""
    names = (f"{length}/test-00000-of-00001.parquet", f"{length}.parquet", f"{length}.jsonl")
    return local_file("ruler", data_dir, names)


def fetched_rows(revision: str | None, length: int) -> list[Path]:
    """The files of one length, from the Hub's cache or downloaded into it, in a directory named by commit.

    Raises:
        DataError: they can't be had, or there are none of this length.
    """
    from huggingface_hub import snapshot_download

    try:
        root = snapshot_download(
            REPO, repo_type="dataset", revision=revision, allow_patterns=[f"{length}/*.parquet"]
        )
    except (OSError, ValueError) as error:  # huggingface_hub's errors are of these kinds
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"the rows of {REPO} can't be downloaded ({type(error).__name__}: {reason}); run runner=fetch "
            f"where there is a network, or put {length}.parquet or {length}.jsonl into benchmark.data_dir"
        ) from error
    found = sorted((Path(root) / str(length)).glob("*.parquet"))
    if not found:
        raise DataError(f"{REPO} has no rows of length {length} (known: 4096, 8192, 16384)")
    return found


def numbered(paths: Sequence[Path], rows: Rows) -> Iterator[tuple[int, Row]]:
    """(number from 1, row) of the files, read as they are asked for."""
    if paths[0].suffix == ".jsonl":
        with paths[0].open("rb") as file:
            yield from rows.lines(file)
        return
    from datasets import load_dataset

    names = [str(path) for path in paths]
    yield from enumerate(load_dataset("parquet", data_files=names, split="train", streaming=True), start=1)


def chosen(
    numbered_rows: Iterable[tuple[int, Row]], rows: Rows, tasks: Sequence[str], count: int
) -> dict[str, list[Row]]:
    """The first `count` sound rows of each task; reading ends where all tasks have theirs.

    Raises:
        DataError: a task has no row.
        RowError: a broken row, unless such are skipped.
    """
    found: dict[str, list[Row]] = {task: [] for task in tasks}
    wanted = Counter(dict.fromkeys(tasks, count))
    for number, row in numbered_rows:
        fault = _fault(row)
        if fault is not None:
            rows.bad(number, *fault)
        elif wanted[row["task"]] > 0:
            wanted[row["task"]] -= 1
            found[row["task"]].append(row)
            if not any(wanted.values()):
                break
    empty = [task for task in tasks if not found[task]]
    if empty:
        raise DataError(f"{rows.place} has no row of task {empty[0]}; leave it out (benchmark.tasks)")
    return found


def _fault(row: Row) -> tuple[str, str] | None:
    """The first field that is wrong, and how."""
    for name in _TEXTS:
        if not isinstance(row.get(name), str):
            return name, f"must be a text, is a {type(row.get(name)).__name__}"
    if not answers_of(row.get("answer")):
        return "answer", "must be a text or a list of texts, with one at least"
    if not isinstance(row.get("max_new_tokens"), int) or row["max_new_tokens"] < 1:
        return "max_new_tokens", "must be a number of tokens"
    return None


def answers_of(answer: Any) -> tuple[str, ...]:
    """The accepted answers or parts; none where they are not texts."""
    found = [answer] if isinstance(answer, str) else answer
    if not isinstance(found, list | tuple) or not all(isinstance(text, str) and text for text in found):
        return ()
    return tuple(found)
