"""The notebooks: each runs from start to end in a project of its own, and its file holds the same kinds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from analysis.notebooks import execute
from analysis.notebooks.execute import NOTEBOOKS, ROOT, executed, normal, project, read, text

NAMES = {"getting_started", "comparing_methods", "heads_and_drift", "your_own_method"}
FILE_BYTES, ALL_BYTES = 250_000, 800_000
LOCAL = re.compile(r"(?<![\w.])/(home|root|tmp|Users|work|mnt|private|var|opt|usr|data)/|[A-Z]:\\\\")

of_each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: NotebookNode) -> list[Any]:
    """What a cell shows: names of streams, and media types of values."""
    return [output.get("name") or sorted(output.get("data", {})) for output in cell.outputs]


def complaints(notebook: NotebookNode) -> list[str]:
    """What is wrong with a notebook as a file to read."""
    found = []
    counts = [cell.execution_count for cell in code(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        found.append(f"cells were not executed in order: {counts}")
    for cell in code(notebook):
        shown = [output for output in cell.outputs if output.output_type != "display_data" or output.data]
        if any(output.output_type == "error" or output.get("name") == "stderr" for output in shown):
            found.append(f"{cell.id} shows an error or stderr")
        for output in shown:
            if local(str({k: v for k, v in output.get("data", output).items() if k != "image/png"})):
                found.append(f"{cell.id} shows a path or a user of one machine")
    return found


def local(shown: str) -> bool:
    """Whether a text names a place or user of the machine it is from."""
    return bool(LOCAL.search(shown)) or any(name in shown for name in (str(ROOT), str(Path.home()) + "/"))


@of_each
def test_it_runs_and_shows_what_its_file_holds(path: Path, tmp_path: Path) -> None:
    before = path.read_bytes()
    fresh = executed(read(path), project(tmp_path))
    committed = {cell.id: kinds(cell) for cell in code(read(path))}
    assert {cell.id: kinds(cell) for cell in code(fresh)} == committed, "run `make notebooks`"
    assert complaints(fresh) == []
    assert (tmp_path / "outputs").is_dir()
    assert path.read_bytes() == before


def test_they_are_small_and_all_there() -> None:
    assert {path.stem for path in NOTEBOOKS} == NAMES
    sizes = [path.stat().st_size for path in NOTEBOOKS]
    assert max(sizes) < FILE_BYTES
    assert sum(sizes) < ALL_BYTES


@of_each
def test_its_file_is_executed_in_order_without_errors_and_names_no_machine(path: Path) -> None:
    notebook = read(path)
    assert complaints(notebook) == []
    assert "with local changes" not in path.read_text(encoding="utf-8"), (
        "run `make notebooks` on a clean tree"
    )
    assert any("image/png" in output.get("data", {}) for cell in code(notebook) for output in cell.outputs)
    assert path.read_text(encoding="utf-8") == text(normal(notebook)), "run `make notebooks`"


def of(*sources: str) -> NotebookNode:
    return normal(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources]))


def test_a_cell_that_raises_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CellExecutionError, match="planted"):
        executed(of("1 + 1", "raise RuntimeError('planted')"), project(tmp_path))


def test_executing_keeps_outputs_and_leaves_out_what_differs(tmp_path: Path) -> None:
    done = executed(
        of("import os", "print(os.getcwd())", "import sys; print('x', file=sys.stderr)"), project(tmp_path)
    )
    assert [kinds(cell) for cell in done.cells] == [[], ["stdout"], ["stderr"]]
    assert done.cells[1].outputs[0].text.strip() == str(tmp_path / "notebooks")
    assert [len(cell.metadata) for cell in done.cells] == [0, 0, 0]
    assert [cell.id for cell in done.cells] == ["cell-0", "cell-1", "cell-2"]
    assert complaints(done) == [
        "cell-1 shows a path or a user of one machine",
        "cell-2 shows an error or stderr",
    ]
    done.cells[0].execution_count = 7
    assert complaints(done)[0] == "cells were not executed in order: [7, 2, 3]"


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        execute.main(["nothing"])
    assert "no notebook nothing; there are: comparing_methods" in capsys.readouterr().err
