"""W&B sweep files: what agents would run of them is what the sweep itself would run."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

import run
from hcache import records
from runners import interrupt, wandb_sweep
from runners.config import register
from runners.plan import compose_all, planned
from tests.cells import write_checkpoint

SMALL = [
    "benchmark.tasks=[single]",
    "benchmark.lengths=[800]",
    "benchmark.distractors=4",
    "benchmark.limit=1",
]


@pytest.fixture(autouse=True)
def global_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hydra sets up logging and argv for the process; put both back."""
    register()
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    monkeypatch.setattr(sys, "argv", ["run.py"])
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    interrupt.forget()


def printed(lines: Sequence[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert wandb_sweep.main(lines) == 0
    found: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return found


def commands(sweep: dict[str, Any]) -> list[list[str]]:
    """What agents run, by W&B's own code for arguments: one command a point of the grid."""
    assert sweep["method"] == "grid"
    assert sweep["command"][:3] == ["${env}", "${interpreter}", "${program}"]
    names = list(sweep["parameters"])
    found = []
    for point in itertools.product(*(sweep["parameters"][name]["values"] for name in names)):
        args = {name: {"value": value} for name, value in zip(names, point, strict=True)}
        own = create_sweep_command_args({"args": args})["args_no_hyphens"]
        assert sweep["command"][-1] == "${args_no_hyphens}"
        found.append([*sweep["command"][3:-1], *own])
    return found


@pytest.mark.parametrize(
    "lines",
    [
        ["experiment=heterocache_steps", "model=qwen25_7b"],
        ["experiment=ruler_lengths", "method=glob(s*kv)", "runtime.seed=3"],
        ["experiment=heterocache_parts"],
        ["method=fullkv,snapkv", "budget.kept_fraction=0.25,0.50", "benchmark.query_aware=true,false"],
    ],
)
def test_agents_run_the_cells_of_the_sweep(lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    asked = commands(printed(lines, capsys))
    agents = [compose_all(command, multirun=False)[0] for command in asked]
    jobs = compose_all(lines, multirun=True)
    assert [planned(run).directory for run in agents] == [planned(run).directory for run in jobs]
    assert {run.tracker.mode.value for run in agents if run.tracker.mode} == {"online"}


def test_command_lines_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As an agent would, but for the server: tracker=none is the user's, and goes along."""
    model = ["model=hf", f"model.path={write_checkpoint(tmp_path / 'model')}", f"outputs={tmp_path / 'out'}"]
    sweep = printed(["method=fullkv,snapkv", "budget=f25,f50", "tracker=none", *model, *SMALL], capsys)
    for command in commands(sweep):
        assert run.main(command) == 0
    found = [records.read_result(path.parent) or {} for path in tmp_path.rglob("result.json")]
    assert sorted(f"{r['cell']['method']} {r['cell']['budget']}" for r in found) == [
        "fullkv full",
        "snapkv f0.25",
        "snapkv f0.5",
    ]


def test_file_names_the_project(capsys: pytest.CaptureFixture[str]) -> None:
    own = ["experiment=heterocache_steps", "method.steps=1,2"]
    sweep = printed([*own, "tracker.project=mine", "tracker.entity=team"], capsys)
    assert (sweep["project"], sweep["entity"], sweep["name"]) == ("mine", "team", "heterocache_steps")
    assert sweep["parameters"] == {"method.steps": {"values": [1, 2]}}, "the command line wins"
    sweep = printed(own, capsys)
    assert sweep["project"] == "hcache"
    assert "entity" not in sweep


def test_numbers_are_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    """W&B plots over them."""
    found = printed(
        ["budget.kept_fraction=0.25,0.5", "method.steps=1,5", "method.offload.enabled=true,false"], capsys
    )
    values = {name: parameter["values"] for name, parameter in found["parameters"].items()}
    assert values == {
        "budget.kept_fraction": [0.25, 0.5],
        "method.steps": [1, 5],
        "method.offload.enabled": ["True", "False"],
    }


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["method=snapkv"], "nothing is swept over"),
        (["experiment=methdos"], "did you mean 'methods'?"),
        (["method=fullkv,snapkv", "launch=slurm"], "agents spread the cells"),
    ],
)
def test_what_makes_no_sweep_is_said(lines: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert wandb_sweep.main(lines) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
