"""A report in W&B that compares methods and budgets: tables, bars, curves, and a panel for each task.

`python -m analysis.wandb_report ENTITY/PROJECT --tag first_run [--tag more]` saves it there as a draft and
prints its address; the tags' runs must be there (tracker.mode=online, or `wandb sync`). `--preview` prints
it as JSON instead, and needs no account, key or network. Needs `pip install 'hcache[analysis]'`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from analysis import command
from analysis.cells import Cell, read
from hcache.records import safe_name

REPORTED = "reported"
"""The scale of a task whose library has one of its own, such as perplexity."""
Answer = TypeVar("Answer")
RECORDS = "tables of these as well, with intervals: outputs/<tag>, or any directory above cells of the tags"


def _parser() -> argparse.ArgumentParser:
    asking = command.parser("wandb_report", __doc__)
    add = asking.add_argument
    add("project", metavar="ENTITY/PROJECT", help="where the runs are, and where the report goes")
    add("--tag", action="append", metavar="TAG", help="of the runs: their group; repeat for more")
    add("--records", type=Path, nargs="+", default=(), metavar="DIR", help=RECORDS)
    add("--preview", action="store_true", help="print the report as JSON and save nothing")
    return asking


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    asked = _parser().parse_args(arguments)

    def show() -> None:
        entity, project = _place(asked.project)
        tags = _tags(asked.tag)
        _check_library()
        known: list[Mapping[str, Any]] = [cell.result for cell in _recorded(asked.records, tags)]
        if not asked.preview:
            _check_login()
            known += _runs(entity, project, tags)
        from analysis import wandb_panels  # imports the library, which takes a second

        made = wandb_panels.report(entity, project, tags, tasks(known), _tables(asked.records))
        if asked.preview:
            print(json.dumps(wandb_panels.plain(made), indent=1, ensure_ascii=False))
        else:
            _asked_of_server(lambda: made.save(draft=True))
            print(made.url)

    return command.answered(show)


def tasks(known: Iterable[Mapping[str, Any]]) -> list[str]:
    """The tasks that any of these records or summaries scores from 0 to 100, each once, in their order."""
    entries = [entry for one in known for entry in (one.get("tasks") or {}).items()]
    return list(dict.fromkeys(task for task, own in entries if own.get("scale") != REPORTED))


# --- what was asked


def _place(text: str) -> tuple[str, str]:
    """Raises ValueError unless it is ENTITY/PROJECT."""
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", text):
        raise ValueError(f"{text!r} is no W&B project; give ENTITY/PROJECT, such as my-team/hcache")
    entity, project = text.split("/")
    return entity, project


def _tags(given: Sequence[str] | None) -> list[str]:
    """Each once. Raises ValueError for none, or for what can't be a tag."""
    if not given:
        raise ValueError("no --tag: which runs are compared? give the tag of a run (python run.py tag=...)")
    for tag in given:
        if tag != safe_name(tag):
            raise ValueError(f"--tag {tag!r} is no tag of a run: those are letters, digits and ._=+-")
    return list(dict.fromkeys(given))


def _check_library() -> None:
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ValueError("W&B reports need wandb-workspaces: pip install 'hcache[analysis]'")


def _recorded(directories: Sequence[Path], tags: Sequence[str]) -> list[Cell]:
    """The cells of records to be shown. Raises ValueError for those of another tag."""
    cells = read(directories)
    other = sorted({str(cell.result["cell"]["tag"]) for cell in cells} - set(tags))
    if other:
        raise ValueError(f"--records holds tag {other[0]}, which is no --tag (there are: {', '.join(tags)})")
    return cells


def _tables(directories: Sequence[Path]) -> str:
    """Findings and tables of the records, as analysis.report writes them, without its title."""
    if not directories:
        return ""
    from analysis.gathered import gather
    from analysis.report_tables import as_markdown

    return as_markdown(gather(directories)).partition("\n")[2].strip()


# --- the server


def _check_login() -> None:
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise ValueError("not logged in to W&B: run `wandb login` (and unset WANDB_MODE), or take --preview")


def _runs(entity: str, project: str, tags: Sequence[str]) -> list[dict[str, Any]]:
    """The summaries of the tags' runs. Raises ValueError for a tag without runs, or if W&B refuses."""
    found = _asked_of_server(lambda: [_summaries(entity, project, tag) for tag in tags])
    for tag, runs in zip(tags, found, strict=True):
        if not runs:
            raise ValueError(
                f"{entity}/{project} has no run of tag {tag}; offline runs go there with "
                f"`wandb sync -e {entity} -p {project} outputs/{tag}/*/*/*/wandb/offline-run-*`"
            )
    return [summary for runs in found for summary in runs]


def _summaries(entity: str, project: str, tag: str) -> list[dict[str, Any]]:
    import wandb

    runs = wandb.Api().runs(f"{entity}/{project}", filters={"group": tag}, lazy=False)
    return [run.summary_metrics for run in runs]


def _asked_of_server(work: Callable[[], Answer]) -> Answer:
    """What the server answers. Raises ValueError with one line for any error of the client."""
    try:
        return work()
    except ValueError:
        raise
    except Exception as error:  # the client lets errors of several libraries through, some of them private
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"W&B: {said}") from error


if __name__ == "__main__":
    sys.exit(main())
