"""The command line of analysis: what its modules are asked, and how they answer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from analysis import drawing
from analysis.cells import Cell, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Shown = TypeVar("Shown")
DIRECTORIES = "outputs/<tag>, or any directory above recorded cells"


def parser(module: str, about: str | None) -> argparse.ArgumentParser:
    """Of `python -m analysis.<module>`; about: the module's docstring."""
    return argparse.ArgumentParser(prog=f"python -m analysis.{module}", description=about)


def answered(work: Callable[[], None]) -> int:
    """Do the work; the exit code is 0, or 2 with one line on stderr for a ValueError."""
    try:
        work()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def tell(text: str, file: Path | None) -> None:
    """Write the text where it was asked for, or print it."""
    if file is None:
        print(text, end="")
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def figure_and_tables(
    asking: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    collect: Callable[[Sequence[Cell]], Shown],
    draw: Callable[[Shown], Figure],
    markdown: Callable[[Shown], str],
) -> int:
    """The command of a module that shows the cells below `directories` as a figure and as tables.

    asking: a parser that knows `directories` already. Returns the exit code.
    """
    asking.add_argument("--out", type=Path, metavar="FILE", help="the figure: a png, pdf or svg file")
    asking.add_argument("--table", type=Path, metavar="FILE", help="the tables; default: print them")
    asked = asking.parse_args(arguments)

    def show() -> None:
        if asked.out is not None:
            drawing.check(asked.out)
        shown = collect(read(asked.directories))
        if asked.out is not None:
            drawing.write(lambda: draw(shown), asked.out)
        tell(markdown(shown), asked.table)

    return answered(show)
