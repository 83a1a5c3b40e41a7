"""Executes the notebooks beside it from start to end and keeps what they show.

`python -m analysis.notebooks.execute [NAME ...]` (`make notebooks`) runs each in a project of its own, so
that nothing of earlier runs is taken for its own and nothing but the notebooks changes. What an editor or a
kernel adds is left out of the files; times and devices that a cell prints stay.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NOTEBOOKS = sorted(HERE.glob("*.ipynb"))

_PROJECT = ("run.py", "conf", "hcache", "runners", "hydra_plugins", "analysis")
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # one order of sums; and threads of tiny tensors wait for each other
    "HF_HUB_OFFLINE": "1",
}
_SECONDS = 300  # that a cell may take


def project(directory: Path) -> Path:
    """The project in a directory of its own, as links, with empty outputs; returns where notebooks start."""
    for name in _PROJECT:
        (directory / name).symlink_to(ROOT / name)
    start = directory / "notebooks"
    start.mkdir()
    return start


def executed(notebook: NotebookNode, start: Path) -> NotebookNode:
    """The notebook after its cells ran there in a new kernel.

    Raises:
        CellExecutionError: a cell raised; the cells behind it did not run.
    """
    found = nbformat.from_dict(notebook)
    for cell in found.cells:
        cell.metadata = NotebookNode()
    client = NotebookClient(
        found,
        timeout=_SECONDS,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(start)}},
    )
    client.execute(env={**os.environ, **_ENVIRONMENT})
    return normal(found)


def normal(notebook: NotebookNode) -> NotebookNode:
    """The notebook without what differs between machines; cells are called after their place."""
    found = nbformat.from_dict(notebook)
    found.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    found.nbformat, found.nbformat_minor = 4, 5
    for place, cell in enumerate(found.cells):
        cell.id, cell.metadata = f"cell-{place}", NotebookNode()
        for output in cell.get("outputs", ()):
            if "metadata" in output:
                output.metadata = NotebookNode()
    return found


def text(notebook: NotebookNode) -> str:
    """The notebook as its file has it."""
    nbformat.validate(notebook)
    return str(nbformat.writes(notebook)) + "\n"


def read(path: Path) -> NotebookNode:
    """A notebook from its file."""
    return nbformat.read(path, as_version=4)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m analysis.notebooks.execute", description=__doc__)
    names = [path.stem for path in NOTEBOOKS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; default: all")
    asked = parser.parse_args(arguments).names or names
    if unknown := set(asked) - set(names):
        parser.error(f"no notebook {', '.join(sorted(unknown))}; there are: {', '.join(names)}")
    done = {}
    for name in asked:
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as directory:
            done[name] = executed(read(HERE / f"{name}.ipynb"), project(Path(directory)))
    # All at once, behind the last: records say whether files differ from the commit.
    for name, notebook in done.items():
        (HERE / f"{name}.ipynb").write_text(text(notebook), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
