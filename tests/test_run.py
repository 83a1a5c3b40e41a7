"""run.py as a user runs it: exit codes, the table, sweeps, kill and resume in real processes."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import run
from hcache import records
from hcache.records import Predictions
from runners import interrupt
from runners.config import CONF
from runners.plan import PlannedCell
from tests.cells import line_without_timings, without_timings, write_checkpoint

ROOT = CONF.parent
TASKS = ["benchmark.tasks=[single,multi]", "benchmark.lengths=[800]", "benchmark.distractors=4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = write_checkpoint(tmp_path_factory.mktemp("model"))
    return ["model=hf", f"model.path={path}", "model.name=random", "runtime.threads=1", "tracker=none"]


@pytest.fixture(autouse=True)
def global_state() -> Iterator[None]:
    """Hydra sets up logging and argv for the process; put both back."""
    root, argv = logging.getLogger(), sys.argv
    handlers, level = list(root.handlers), root.level
    sys.argv = ["run.py"]
    yield
    root.handlers[:], sys.argv = handlers, argv
    root.setLevel(level)
    interrupt.forget()


def outputs(path: Path) -> str:
    return f"outputs={path}"


def the_plan(lines: Sequence[str]) -> PlannedCell:
    (found,) = run.plan(lines, multirun=False, check=True)
    return found


def result_at(plan: PlannedCell) -> dict[str, Any]:
    result = records.read_result(plan.directory)
    assert result is not None
    return result


def test_one_cell(model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*model, *TASKS, outputs(tmp_path), "method=snapkv", "benchmark.limit=2", "tag=x"]
    assert run.main(command) == 0
    shown = capsys.readouterr().out
    assert "snapkv" in shown
    assert "single_800" in shown
    assert "n = 2 a task" in shown
    (directory,) = tmp_path.glob("x/random/retrieval/snapkv-f0.25-s0-*")
    assert sorted(path.name for path in directory.iterdir()) == ["predictions.jsonl", "result.json"]
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["random"], "nothing of Hydra's own"
    before = (directory / "result.json").read_bytes()
    assert run.main(command) == 0
    assert (directory / "result.json").read_bytes() == before
    assert "snapkv" in capsys.readouterr().out


def test_debug_runs_every_method_on_the_embedded_model(tmp_path: Path) -> None:
    short = ["debug=default", "benchmark.lengths=[512]", "benchmark.tasks=[single]", "runtime.threads=1"]
    methods = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
    command = ["-m", f"method={','.join(methods)}", "budget=f50", *short, outputs(tmp_path)]
    assert run.main(command) == 0
    results = [records.read_result(path.parent) or {} for path in tmp_path.rglob("result.json")]
    assert {result["cell"]["method"]: result["status"] for result in results} == dict.fromkeys(
        methods, "completed"
    )


def test_sweep_goes_on_after_a_failed_cell(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FullKV once for both budgets, one infeasible cell that is no failure, one failed one that is."""
    from hcache.methods.streaming_llm import StreamingLLM

    def broken(*args: Any) -> None:
        raise RuntimeError("planted failure")

    monkeypatch.setattr(StreamingLLM, "layers", broken)
    sweep = ["-m", "method=streaming_llm,fullkv,snapkv", "budget.kept_fraction=0.02,0.25"]
    code = run.main([*sweep, *model, *TASKS, outputs(tmp_path), "benchmark.limit=1", "tag=x"])
    assert code == 1
    shown = capsys.readouterr()
    statuses = {
        path.parent.name[:-9]: (records.read_result(path.parent) or {})["status"]
        for path in tmp_path.rglob("result.json")
    }
    assert statuses == {
        "fullkv-full-s0": "completed",
        "snapkv-f0.02-s0": "infeasible",
        "snapkv-f0.25-s0": "completed",
        "streaming_llm-f0.02-s0": "failed",
        "streaming_llm-f0.25-s0": "failed",
    }
    failed = [line for line in shown.err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 2
    assert all("streaming_llm" in line for line in failed)
    table = shown.out.split("Compression methods side by side")[1]
    rows = [line for line in table.splitlines() if re.match(" (fullkv|snapkv|streaming_llm) +f", line)]
    assert len(rows) == 5, "FullKV has one row"
    assert shown.out.count("Compression methods side by side") == 1


def test_infeasible_is_no_failure(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*model, *TASKS, outputs(tmp_path), "method=snapkv", "budget.kept_fraction=0.01"]
    assert run.main(command) == 0
    assert "the smallest feasible budget" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["method=snapkv", "budget.kept_tokens=32"], "method.window=32 must be smaller"),
        (["method=snapkv", "method.window=x"], "method.window"),
        (["model.path=/no/such/model"], "no such directory"),
        (["--config-name", "other"], "hydra.searchpath"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    lines: list[str], said: str, model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([*lines[:2], *model, outputs(tmp_path), *lines]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_corrupt_result_is_said_before_the_model_loads(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*model, *TASKS, outputs(tmp_path), "method=snapkv", "benchmark.limit=1"]
    directory = the_plan(command).directory
    directory.mkdir(parents=True)
    (directory / "result.json").write_text('{"schema": 1}')
    monkeypatch.setattr(run, "launch", lambda: pytest.fail("a runner was started"))
    assert run.main(command) == 2
    error = capsys.readouterr().err
    assert str(directory / "result.json") in error
    assert "move it away or delete it" in error


def test_foreign_profile_is_said_before_the_model_loads(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from hcache.profiling import Graph, HeadProfile

    pairs = torch.eye(3, dtype=torch.float64).expand(5, 3, 3).contiguous()
    foreign = HeadProfile(5, 3, torch.ones(5, 3, dtype=torch.float64), dict.fromkeys(Graph, pairs))
    path = foreign.save(tmp_path / "foreign.json")
    command = [*model, *TASKS, outputs(tmp_path / "o"), "method=heterocache", f"method.profile={path}"]
    assert run.main(command) == 2
    assert "belongs to another model" in capsys.readouterr().err


def test_cfg_shows_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--cfg", "job", "method=snapkv", outputs(tmp_path / "o")]) == 0
    assert "window: 32" in capsys.readouterr().out
    assert not (tmp_path / "o").exists()


def test_job_that_raises_still_ends_in_the_table(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell must not raise; if one does, the cells before it are shown and the code is not 0."""
    from runners import evaluate

    def raises(config: Any) -> Any:
        if config.method.name == "snapkv":
            raise OSError("no space left on device")
        return evaluated(config)

    evaluated = evaluate.run
    monkeypatch.setattr(evaluate, "run", raises)
    command = ["-m", "method=fullkv,snapkv", *model, *TASKS, outputs(tmp_path), "benchmark.limit=1"]
    assert run.main(command) == 1
    shown = capsys.readouterr()
    assert re.search("^ fullkv +full", shown.out, re.MULTILINE)
    assert "no space left on device" in shown.err
    assert re.search("^failed: .*snapkv", shown.err, re.MULTILINE)


def test_ctrl_c(model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runners import work

    def pressed(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work.Worker, "run", pressed)
    assert run.main([*model, *TASKS, outputs(tmp_path), "method=snapkv"]) == 130
    assert not list(tmp_path.rglob("result.json"))


def started(command: Sequence[str]) -> subprocess.Popen[bytes]:
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "run.py", *command], cwd=ROOT, env=quiet, stdout=subprocess.DEVNULL
    )


def lines_when_at_least(count: int, plan: PlannedCell, process: subprocess.Popen[bytes]) -> None:
    path, deadline = plan.directory / "predictions.jsonl", time.monotonic() + 90
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_process_resumes_to_the_same_result(model: list[str], tmp_path: Path) -> None:
    """SIGTERM, then SIGKILL, then the end: the result is that of an unbroken run."""
    command = [*model, *TASKS, "method=snapkv", "benchmark.examples_per_task=20", "runtime.batch_size=2"]
    plan = the_plan([*command, outputs(tmp_path / "broken")])
    again = [*command, outputs(tmp_path / "broken")]
    for kill, count, code in ((signal.SIGTERM, 3, 143), (signal.SIGKILL, 12, -signal.SIGKILL)):
        process = started(again)
        lines_when_at_least(count, plan, process)
        process.send_signal(kill)
        assert process.wait(timeout=60) == code
        assert not (plan.directory / "result.json").exists()
        assert len(Predictions(plan.directory).load()) < 40
    assert run.main(again) == 0
    whole = [*command, outputs(tmp_path / "unbroken")]
    assert run.main(whole) == 0
    unbroken = the_plan(whole)
    found, expected = without_timings(result_at(plan)), without_timings(result_at(unbroken))
    del found["config"]["outputs"], expected["config"]["outputs"]
    assert found == expected
    lines = [[*map(line_without_timings, Predictions(p.directory).load())] for p in (plan, unbroken)]
    assert lines[0] == lines[1]
