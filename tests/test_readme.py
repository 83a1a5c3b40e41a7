"""The README: every command that it shows can be typed as it stands."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

import run
from runners import wandb_sweep
from runners.config import register
from runners.plan import compose_all
from tests.test_analysis_table import leave

TEXT = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL))
COMMANDS = [words for line in SHELL.splitlines() if (words := shlex.split(line, comments=True))]
RUN = [words[2:] for words in COMMANDS if words[:2] == ["python", "run.py"] and "--help" not in words]
ANALYSIS = [words[2:] for words in COMMANDS if words[2:] and words[2].startswith("analysis.")]
OWN_METHOD = "plugins=[./mine.py]"  # held to its contract by test_check_method


def test_they_are_found() -> None:
    assert len(RUN) > 15
    assert len(ANALYSIS) > 8


@pytest.mark.parametrize("words", [w for w in RUN if OWN_METHOD not in w], ids=" ".join)
def test_a_command_of_run_composes(words: list[str]) -> None:
    register()
    multirun = "-m" in words
    lines = [word for word in words if word not in ("-m", "...")]
    if "runner=budget" in lines:  # it compares what others sweep over
        multirun = True
    run.check_lines(lines, multirun)
    jobs = compose_all(lines, multirun)
    assert len(jobs) > 1 if multirun else len(jobs) == 1


def test_the_sweep_of_agents_composes() -> None:
    (words,) = (words for words in COMMANDS if words[2:3] == ["runners.wandb_sweep"])
    found = wandb_sweep.sweep(words[3 : words.index(">")])
    assert found["parameters"]


@pytest.mark.parametrize("words", [w for w in ANALYSIS if "outputs/first_run" in w], ids=" ".join)
def test_a_command_of_analysis_runs_on_what_make_run_leaves(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for number, method in enumerate(("fullkv", "heterocache", "snapkv")):
        leave(Path("outputs"), method, 0.25 if number else None, 1 - number / 4, tag="first_run")
    name, *arguments = words
    assert import_module(name).main(arguments) == 0
    for file in (words[place + 1] for place, word in enumerate(words) if word == "--out"):
        assert Path(file).stat().st_size > 0


def test_the_report_in_wandb_can_be_previewed(capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = (words for words in ANALYSIS if words[0] == "analysis.wandb_report")
    assert import_module(words[0]).main([*words[1:], "--preview"]) == 0
    assert '"first_run"' in capsys.readouterr().out
