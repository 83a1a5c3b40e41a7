"""runner=budget: rows from what methods plan, one table from the command line, no model loaded."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

import run
from hcache.budget import Budget
from hcache.cache.state import LayerState
from hcache.geometry import Geometry
from hcache.methods import Method, Usage
from hcache.models import ModelSpec
from runners import budget as planner
from runners.budget import BudgetTable, budget_rows, compare, settings_of, show
from runners.config import BudgetConfig, ConfigError, RunConfig

SHAPE = Geometry(layers=32, query_heads=32, kv_heads=8, head_dim=128)
TOKENS = 32768
FULL_BYTES = 4 * 1024**3
"""Of an 8B Llama in bfloat16 at this length, known by heart: 128 KiB a token."""


@dataclass(frozen=True)
class Kind:
    threshold: float = 0.5


@dataclass(frozen=True)
class Pages(Method):
    """Keeps everything and an eighth of metadata, reads what the budget says, needs 2000 tokens."""

    name: ClassVar[str] = "pages"
    page: int = 16
    kind: Kind = field(default_factory=Kind)

    def layers(self, geometry: Geometry, budget: Budget, prompt_tokens: list[int]) -> list[LayerState]:
        raise AssertionError("planning makes no states")

    def minimum_tokens(self, geometry: Geometry, prompt_tokens: int) -> int:
        return 2000

    def usage(self, geometry: Geometry, budget: Budget, prompt_tokens: int, number_bytes: int) -> Usage:
        tokens = self.require(geometry, budget, prompt_tokens)
        full = 2 * geometry.heads * geometry.head_dim * prompt_tokens * number_bytes
        parts: dict[str, int | str] = {"rank": 160, "selected_pages": tokens // self.page}
        return Usage(full + full // 8, float(tokens), host_bytes=full // 2, moved_bytes=3072, parts=parts)

    def notes(self, geometry: Geometry, budget: Budget, prompt_tokens: int) -> list[str]:
        return ["[bold]keeps[/bold] all pages"]


@dataclass(frozen=True)
class Whole(Pages):
    """Ignores the budget."""

    name: ClassVar[str] = "whole"
    uses_budget: ClassVar[bool] = False

    def usage(self, geometry: Geometry, budget: Budget, prompt_tokens: int, number_bytes: int) -> Usage:
        full = 2 * geometry.heads * geometry.head_dim * prompt_tokens * number_bytes
        return Usage(full, float(prompt_tokens), parts={"tokens": prompt_tokens})

    def notes(self, geometry: Geometry, budget: Budget, prompt_tokens: int) -> list[str]:
        return []


@dataclass(frozen=True)
class Profiled(Pages):
    """Has no plan for a model without a profile."""

    name: ClassVar[str] = "profiled"

    def usage(self, geometry: Geometry, budget: Budget, prompt_tokens: int, number_bytes: int) -> Usage:
        raise ValueError("no profile of this\nmodel; make one: runner=profile model=...")


def printed(rows: list[planner.BudgetRow]) -> str:
    file = io.StringIO()
    show(rows, "the title", Console(file=file))
    return file.getvalue()


def row_of(text: str, method: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f" {method}"))


# --- rows


def test_a_row_per_method_and_budget_and_one_for_a_method_without() -> None:
    rows = budget_rows([Pages(), Whole()], SHAPE, [0.1, 4096], TOKENS, 2)
    assert [(row.method, row.kept, row.tokens) for row in rows] == [
        ("pages", "f0.1", 3276),
        ("pages", "t4096", 4096),
        ("whole", "full", TOKENS),
    ]
    assert rows[1].resident_fraction == 1.125
    assert rows[1].attended_fraction == 4096 / TOKENS
    assert rows[1].host_bytes == FULL_BYTES // 2
    assert rows[1].parts == {"rank": 160, "selected_pages": 256}
    assert (rows[2].device_bytes, rows[2].resident_fraction) == (FULL_BYTES, 1.0)


def test_number_size_changes_bytes_and_no_fraction() -> None:
    half, whole = (budget_rows([Pages()], SHAPE, [0.25], TOKENS, size)[0] for size in (2, 4))
    assert half.device_bytes is not None
    assert whole.device_bytes == 2 * half.device_bytes
    assert whole.resident_fraction == half.resident_fraction


def test_an_infeasible_budget_names_the_smallest_one() -> None:
    (row,) = budget_rows([Pages()], SHAPE, [0.05], TOKENS, 2)
    assert (row.resident_fraction, row.attended_fraction, row.host_bytes) == (None, None, None)
    assert (row.smallest_fraction, row.smallest_tokens) == (0.0611, 2000)
    feasible = budget_rows([Pages()], SHAPE, [row.smallest_fraction, row.smallest_tokens], TOKENS, 2)
    assert all(found.resident_fraction for found in feasible)


def test_another_reason_is_a_row_in_one_line() -> None:
    (row,) = budget_rows([Profiled()], SHAPE, [0.1], TOKENS, 2)
    assert (row.resident_fraction, row.smallest_fraction) == (None, None)
    assert row.reason == "no profile of this model; make one: runner=profile model=..."


def test_methods_of_one_name_are_told_apart_by_what_differs() -> None:
    rows = budget_rows([Pages(), Pages(32, Kind(0.7)), Whole()], SHAPE, [0.5], TOKENS, 2)
    assert [row.method for row in rows] == [
        "pages page=16 kind.threshold=0.5",
        "pages page=32 kind.threshold=0.7",
        "whole",
    ]


def test_a_name_is_taken_from_the_registry() -> None:
    (row,) = budget_rows(["fullkv"], SHAPE, [0.5], TOKENS, 2)
    assert (row.method, row.device_bytes) == ("fullkv", FULL_BYTES)
    with pytest.raises(ValueError, match="did you mean 'fullkv'"):
        budget_rows(["fulkv"], SHAPE, [0.5], TOKENS, 2)


# --- the table


def test_table_shows_numbers_parts_and_each_note_once() -> None:
    text = printed(budget_rows([Pages(), Whole()], SHAPE, [0.1, 0.25], TOKENS, 2))
    assert " ".join(row_of(text, "pages").split()) == (
        "pages f0.1 3276 1.1250 0.1000 2.00 GiB 3.00 KiB rank 160, selected pages 204"
    )
    assert " ".join(row_of(text, "whole").split()) == "whole full 32768 1.0000 1.0000 0 0"
    assert text.count("pages f0.1, f0.25: [bold]keeps[/bold] all pages") == 1
    assert "planned, not measured" in text


def test_table_says_why_there_is_no_plan() -> None:
    text = printed(budget_rows([Pages(), Profiled()], SHAPE, [0.05], TOKENS, 2))
    assert "infeasible: needs kept_fraction=0.0611 (kept_tokens=2000)" in row_of(text, "pages")
    assert row_of(text, "profiled").rstrip().endswith("no profile of this model")
    assert "profiled f0.05: no profile of this model; make one: runner=profile model=..." in text


def cells(*methods: Method, tokens: int = TOKENS, **model: Any) -> list[RunConfig]:
    section = {"prompt_tokens": tokens, "shape": [32, 32, 8, 128]}
    spec = ModelSpec(**{"name": "m", "path": "no/such", "dtype": "bfloat16", **model})
    return [
        RunConfig(spec, method, budget=BudgetConfig(kept_fraction=fraction), budget_table=section)
        for method in methods
        for fraction in (0.1, 0.25)
    ]


def output(runs: list[RunConfig]) -> str:
    file = io.StringIO()
    compare(runs, Console(file=file))
    return file.getvalue()


def test_one_table_for_all_cells_and_fullkv_once() -> None:
    text = output(cells(Pages(), Whole(), Profiled()))
    assert text.count("Planned KV cache of m (32 layers, 8 KV heads, 128 numbers of 2 bytes)") == 1
    assert "for a prompt of 32768 tokens, 4.00 GiB in full" in text
    assert sum(line.startswith(" whole") for line in text.splitlines()) == 1
    assert sum(line.startswith(" pages") for line in text.splitlines()) == 2
    assert "runner=profile model=hf model.path=no/such" in text


def test_another_length_or_model_is_a_table_of_its_own() -> None:
    text = output(cells(Pages()) + cells(Pages(), tokens=8192) + cells(Pages(), dtype="float32"))
    assert text.count("Planned KV cache") == 3
    assert "of 4 bytes) for a prompt of 32768 tokens, 8.00 GiB in full" in text


def test_number_size_is_the_checkpoints_own_where_the_configuration_leaves_it() -> None:
    runs = [replace(cell, budget_table=None) for cell in cells(Pages(), path="tiny", dtype="auto")]
    assert "(6 layers, 4 KV heads, 32 numbers of 2 bytes)" in output(runs)


def test_a_model_that_is_not_here_can_be_given_by_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    runs = [replace(cell, budget_table=None) for cell in cells(Pages(), path="no/such-model")]
    with pytest.raises(ConfigError, match=r"can't be reached.*budget_table\.shape=\[layers") as error:
        output(runs)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"model\.dtype=auto.*set model\.dtype=bfloat16"):
        output(cells(Pages(), path="no/such-model", dtype="auto"))


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"prompt_tokens": 0}, "budget_table.prompt_tokens=0 must be at least 1"),
        ({"shape": [32, 8]}, r"must be \[layers, query heads, KV heads, head dim\]"),
        ({"tokens": 3}, "budget_table"),
        ({"prompt_tokens": "many"}, "budget_table"),
    ],
)
def test_wrong_settings_are_said(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        settings_of(section)
    assert "\n" not in str(error.value)


def test_a_shape_that_no_model_has_is_said() -> None:
    (runs, *_) = cells(Pages())
    with pytest.raises(ConfigError, match=r"budget_table\.shape=\[4, 3, 2, 8\].*must divide"):
        output([replace(runs, budget_table=BudgetTable(shape=[4, 3, 2, 8]))])


# --- the command


@pytest.fixture
def argv() -> Iterator[None]:
    """Hydra and rich change the process; put it back."""
    root, before = logging.getLogger(), sys.argv
    handlers, level = list(root.handlers), root.level
    sys.argv = ["run.py"]
    yield
    root.handlers[:], sys.argv = handlers, before
    root.setLevel(level)


@pytest.mark.usefixtures("argv")
def test_a_sweep_without_m_is_one_table_and_loads_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hcache.models.loading._load_weights", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(run, "launch", lambda: pytest.fail("Hydra launched a job"))
    command = ["runner=budget", "method=snapkv,fullkv", "budget.kept_fraction=0.1,0.25"]
    command += ["budget_table.prompt_tokens=2000", f"outputs={tmp_path}"]
    assert run.main(command) == 0
    swept = capsys.readouterr().out
    lines = [line.split()[:3] for line in swept.splitlines() if line.startswith((" snapkv", " fullkv"))]
    assert lines == [["snapkv", "f0.1", "200"], ["snapkv", "f0.25", "500"], ["fullkv", "full", "2000"]]
    assert swept.count("Planned KV cache of tiny") == 1
    assert run.main(["-m", *command]) == 0
    assert capsys.readouterr().out == swept
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("argv")
@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["runner=budget", "budget_table.prompt_token=1"], "did you mean 'prompt_tokens'?"),
        (["runner=budget", "method=snapvk,fullkv"], "did you mean 'snapkv'?"),
        (["runner=budget", "budget_table.shape=[1]"], "budget_table.shape=[1] must be"),
        (["budget_table.prompt_tokens=1"], "it belongs to runner=budget"),
        (["runner=evaluate,budget"], "add -m"),
    ],
)
def test_a_wrong_command_is_one_line_and_code_2(
    lines: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(lines) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
