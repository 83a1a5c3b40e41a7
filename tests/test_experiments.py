"""Every experiment as it ships: it composes, is as large as its header says, and runs when it is cut down."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import run
from hcache import records
from runners import interrupt
from runners.config import CONF, register
from runners.plan import compose_all, planned
from tests.test_benchmark_runs import infinitebench, longbench, longbench_v2, put, ruler

NAMES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def infinitebench_of_heterocache(place: Path) -> None:
    """Prompts in the other authors' repository."""
    infinitebench(place)
    put(place / "infinitebench/prompt.py", (place / "src/prompt.py").read_text())


LONGBENCH = (longbench, ["benchmark.tasks=[qasper]"])
TWO = "method=fullkv,heterocache"
Data = Callable[[Path], None] | None
CUT: dict[str, tuple[Data, list[str]]] = {
    "first_run": (None, [TWO, "benchmark.lengths=[800]"]),
    "methods": (None, [TWO, "budget=f50", "benchmark.lengths=[800]", "benchmark.tasks=[single]"]),
    "retrieval_300": (None, [TWO, "benchmark.lengths=[800]"]),
    "needle_tiny": (None, [TWO, "benchmark.lengths=[1000]"]),
    "needle_grid": (None, [TWO, "budget=f50", "benchmark.lengths=[1000]", "benchmark.protocol=plain"]),
    "ruler_lengths": (ruler, [TWO, "benchmark.lengths=[1800],[2000]", "benchmark.tasks=[vt]"]),
    "longbench_tokens": (longbench, [*LONGBENCH[1], "method=fullkv,snapkv", "budget=t128"]),
    "longbench_fractions": (longbench, [*LONGBENCH[1], TWO, "budget.kept_fraction=0.5"]),
    "longbench_v2": (longbench_v2, [TWO, "budget=f50", "benchmark.max_new_tokens=8"]),
    "infinitebench": (infinitebench_of_heterocache, [TWO, "budget=f50", "benchmark.tasks=[passkey]"]),
    "heterocache_parts": LONGBENCH,
    "heterocache_thresholds": (longbench, [*LONGBENCH[1], "method.roles.stable_threshold=0.5"]),
    "heterocache_steps": LONGBENCH,
    "latency_224k": (
        None,
        [TWO, "budget=f50", "latency.contexts=[64]", "latency.batches=[1]", "latency.baselines=[]"],
    ),
}
"""Data that each needs, and what it is cut to beside the embedded model and one example a task."""


@pytest.fixture(autouse=True)
def global_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hydra sets up logging and argv for the process; put both back. No data but what a test wrote."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.chdir(tmp_path)
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    interrupt.forget()


def test_every_experiment_is_tried() -> None:
    assert sorted(CUT) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_runs_cut_down(name: str, tmp_path: Path) -> None:
    data, cut = CUT[name]
    if data is not None:
        data(tmp_path)
        cut = [*cut, f"benchmark.data_dir={tmp_path}", f"benchmark.prompt_dir={tmp_path}"]
    small = ["model=tiny", "runtime.threads=1", "tracker=none", f"outputs={tmp_path / 'out'}"]
    limit = [] if name == "latency_224k" else ["benchmark.limit=1"]
    assert run.main(["-m", f"experiment={name}", *small, *limit, *cut]) == 0
    found = [records.read_result(path.parent) or {} for path in tmp_path.glob(f"out/{name}/**/result.json")]
    assert len(found) >= 2
    assert {result["status"] for result in found} == {"completed"}


@pytest.mark.parametrize(
    "name", sorted(set(NAMES) - {"first_run", "methods", "needle_tiny", "retrieval_300"})
)
def test_header_says_the_cost(name: str) -> None:
    """Cells as the sweep plans them, examples as the benchmark's card counts them, and what is a guess."""
    register()
    header = " ".join(
        line for line in (CONF / f"experiment/{name}.yaml").read_text().splitlines() if line.startswith("#")
    )
    cells = {planned(run).directory for run in compose_all([f"experiment={name}"], multirun=True)}
    said = re.search(r"(\d+) cells x (?:about )?\d+ (?:examples|points); (\w+)", header)
    assert said is not None
    assert int(said[1]) == len(cells)
    assert said[2] in ("estimated", "measured")


@pytest.mark.parametrize("name", NAMES)
def test_tag_is_the_name(name: str) -> None:
    register()
    assert compose_all([f"experiment={name}"], multirun=False)[0].tag == name
