"""One page of all that runs left below some directories: what was compared, what came out, how sure that is.

`python -m analysis.report outputs/<tag> [more]` writes report.html into the first directory: one file that
needs no network. `--markdown FILE` and `--latex FILE` write the same tables as Markdown and LaTeX (booktabs).
Scores, bytes and times are those of the records. A sweep may be half finished: what has no numbers is named,
and why.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis import command
from analysis.cells import BASELINE
from analysis.gathered import gather
from analysis.report_page import as_html
from analysis.report_tables import as_latex, as_markdown

PAGE = "report.html"


def _parser() -> argparse.ArgumentParser:
    asking = command.parser("report", __doc__)
    add = asking.add_argument
    add("directories", type=Path, nargs="+", help="outputs/<tag>, or any directory above recorded cells")
    add("--out", type=Path, metavar="FILE", help=f"the page; default: {PAGE} in the first directory")
    add("--markdown", type=Path, metavar="FILE", help="findings and tables as Markdown")
    add("--latex", type=Path, metavar="FILE", help="the tables for a paper")
    add("--no-intervals", action="store_true", help="leave 95%% intervals out of Markdown and LaTeX")
    add("--against", default=BASELINE, metavar="METHOD", help="whom others are held against")
    add("--examples", type=int, default=8, metavar="N", help="shown where methods disagree, of each setting")
    return asking


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    asked = _parser().parse_args(arguments)

    def show() -> None:
        if asked.examples < 0:
            raise ValueError(f"--examples {asked.examples}: must be 0 or more")
        report = gather(asked.directories, asked.against, asked.examples)
        out = asked.out or asked.directories[0] / PAGE
        command.tell(as_html(report), out)
        if asked.markdown is not None:
            command.tell(as_markdown(report, not asked.no_intervals), asked.markdown)
        if asked.latex is not None:
            command.tell(as_latex(report, not asked.no_intervals), asked.latex)
        print(f"{out}: {report.counts}")

    return command.answered(show)


if __name__ == "__main__":
    sys.exit(main())
