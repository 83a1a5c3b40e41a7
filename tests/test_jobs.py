"""Jobs of a sweep in other processes: which are to run, what travels, what is recorded of one that died."""

from __future__ import annotations

import logging
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

import run
from hcache import records
from hcache.methods.registry import METHODS
from runners import jobs
from runners.config import register
from runners.jobs import Job
from runners.lock import LOCK_FILE, locked
from runners.outcomes import OUTCOMES
from runners.plan import PlannedCell
from runners.result import KILLED
from tests.cells import write_checkpoint
from tests.test_config import PLUGIN


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    register()
    path = write_checkpoint(tmp_path_factory.mktemp("model"))
    task = ["benchmark.tasks=[single]", "benchmark.lengths=[800]", "benchmark.distractors=4"]
    return ["model=hf", f"model.path={path}", *task, "benchmark.limit=1", "tracker=none"]


@pytest.fixture(autouse=True)
def global_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A job sets up logging and its directory for the process; put both back. A run sets argv."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    OUTCOMES.clear()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    OUTCOMES.clear()


def job(cell: list[str], *lines: str) -> Job:
    return Job((*cell, *lines), str(Path.cwd()))


def plan(job: Job) -> PlannedCell:
    found = jobs.plan_of(job)
    assert found is not None
    return found


def outcomes() -> list[tuple[str, str]]:
    return [(o.status, o.directory.name[:-9] if o.directory else "") for o in OUTCOMES]


def test_each_cell_once_and_none_that_is_done(cell: list[str]) -> None:
    sweep = [[*cell, f"method={m}", f"budget={b}"] for m in ("fullkv", "snapkv") for b in ("f25", "f50")]
    assert [job.lines[-2:] for job in jobs.pending(sweep)] == [
        ("method=fullkv", "budget=f25"),
        ("method=snapkv", "budget=f25"),
        ("method=snapkv", "budget=f50"),
    ]
    assert OUTCOMES == []
    assert job(cell, "method=snapkv", "budget=f50")().status == "completed"
    assert len(jobs.pending(sweep)) == 2
    assert outcomes() == [("completed", "snapkv-f0.5-s0")]
    more = [[*lines, "benchmark.limit=2"] for lines in sweep]
    assert len(jobs.pending(more)) == 3, "a larger limit is missing something"
    assert len(jobs.pending([["runner=score"], ["runner=score"]])) == 2, "no cells, nothing known of them"


@pytest.fixture
def forgotten_plugin() -> Iterator[None]:
    """What a plug-in registers is gone after the test: other tests go over all methods."""
    yield
    repo = ConfigStore.instance().repo
    del METHODS._entries["travelling"]
    for group in (repo["method"], repo["schema"]["method"]):
        del group["travelling.yaml"]


@pytest.mark.usefixtures("forgotten_plugin")
def test_a_job_is_what_the_command_does(
    cell: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths are those of the command, a plug-in needs no import by name."""
    (tmp_path / "mine.py").write_text(PLUGIN.replace("every_other", "travelling"))
    sent = job(cell, "plugins=[./mine.py]", "method=travelling", "outputs=here")
    packed = pickle.dumps(sent)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    outcome = pickle.loads(packed)()
    assert outcome.status == "completed"
    assert outcome.directory is not None
    assert (tmp_path / outcome.directory / "result.json").exists()
    assert outcome.directory == plan(sent).directory


def test_what_is_known_of_a_dead_job(cell: list[str]) -> None:
    lost = job(cell, "method=snapkv")
    place = plan(lost).directory
    place.mkdir(parents=True)
    (place / "predictions.jsonl").write_text('{"task": "a", "id": "1"}\n{"task": "a", "i')
    (place / LOCK_FILE).write_text('{"host": "node7", "pid": 12, "since": "noon"}')
    jobs.died(lost, RuntimeError("the worker died\nin many lines"))
    result = records.read_result(place) or {}
    assert (result["status"], result["error"]["type"]) == ("failed", KILLED)
    said = result["error"]["message"]
    assert said.startswith("process 12 on node7 (since noon) was gone after 1 lines of results")
    assert "RuntimeError: the worker died)" in said
    assert outcomes() == [("failed", "snapkv-f0.25-s0")]
    assert not (place / LOCK_FILE).exists()
    (place / "predictions.jsonl").unlink()
    assert lost().status == "completed", "it is tried again"
    jobs.died(lost, RuntimeError("after its last word"))
    assert outcomes()[1:] == [("completed", "snapkv-f0.25-s0")], "it had ended before"


def test_a_job_that_lives_on_is_not_recorded_as_dead(cell: list[str]) -> None:
    """Its machine can't be reached, but it has the lock."""
    lost = job(cell, "method=snapkv")
    with locked(plan(lost).directory):
        jobs.died(lost, RuntimeError("no route to host"))
    assert outcomes() == [("busy", "snapkv-f0.25-s0")]
    assert records.read_result(plan(lost).directory) is None


def test_a_job_without_a_cell_that_is_gone_is_named(tmp_path: Path) -> None:
    jobs.died(Job(("runner=score", "tag=x"), str(tmp_path)), RuntimeError("gone"))
    assert [o.message for o in OUTCOMES] == ["runner=score tag=x: RuntimeError: gone"]


def test_second_command_on_a_cell_is_refused(
    cell: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards of a cell have their own directories; a cell that is done is read back by anyone."""
    command = [*cell, "method=snapkv", f"outputs={tmp_path}"]
    place = plan(job(command)).directory
    with locked(place):
        assert run.main(command) == 1
        said = capsys.readouterr().err
        assert f"refused: {place} is being run by process" in said
        assert "failed: " not in said
        assert not (place / "result.json").exists()
        assert run.main([*command, "benchmark.shard=0/2"]) == 0
    assert run.main(command) == 0
    before = (place / "result.json").read_bytes()
    with locked(place):
        assert run.main(command) == 0
    assert (place / "result.json").read_bytes() == before


def test_latency_cell_is_locked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    register()
    command = ["runner=latency", "model=tiny", "method=snapkv", "latency.contexts=[64]", "tracker=none"]
    place = plan(job([*command, f"outputs={tmp_path}"])).directory
    with locked(place):
        assert run.main([*command, f"outputs={tmp_path}"]) == 1
    assert "refused: " in capsys.readouterr().err
    assert not (place / "result.json").exists()


def test_table_goes_where_the_jobs_went(
    cell: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Planned for a CPU, run on a GPU: other backends, other cells."""
    planned = plan(job(cell, "method=snapkv", f"outputs={tmp_path / 'planned'}"))
    went = job(cell, "method=snapkv", f"outputs={tmp_path / 'went'}")
    jobs.ended(went, went())
    assert run.conclude([planned]) == 0
    shown = capsys.readouterr()
    assert "snapkv" in shown.out
    assert shown.err == ""
