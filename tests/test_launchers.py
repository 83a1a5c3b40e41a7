"""Sweeps in several processes, one of them killed: real Ray workers, real submitit jobs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import run
from hcache import records
from runners import launchers, overrides
from runners.config import CONF, ConfigError
from runners.lock import LOCK_FILE
from tests.cells import write_checkpoint

ROOT = CONF.parent
METHODS, FRACTIONS = ("snapkv", "streaming_llm", "h2o", "pyramidkv"), ("0.3", "0.5", "0.7")
TWICE = "import json, sys, run; c = json.loads(sys.argv[1]); print('codes', [run.main(c) for _ in range(2)])"
"""The same command twice in one process, which starts Ray once."""
EXAMPLES = 12
SUBMITIT = [
    "hydra/launcher=submitit_local",
    "hydra.launcher._target_=hydra_plugins.hcache_launchers._slurm.LocalLauncher",
]


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = write_checkpoint(tmp_path_factory.mktemp("model"))
    task = ["benchmark.tasks=[single]", "benchmark.lengths=[800]", "benchmark.distractors=4"]
    size = [f"benchmark.examples_per_task={EXAMPLES}", "runtime.threads=1", "tracker=none", "tag=x"]
    return ["model=hf", f"model.path={path}", "model.name=random", *task, *size]


def started(command: Sequence[str]) -> subprocess.Popen[str]:
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    line = [sys.executable, "-c", TWICE, json.dumps(["-m", *command])]
    return subprocess.Popen(
        line, cwd=ROOT, env=quiet, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def killed_in_the_middle(place: Path, process: subprocess.Popen[str]) -> tuple[Path, bytes]:
    """SIGKILL the process at work on the first cell that has two lines; where that is, and its lines."""
    deadline = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline:
        for lines in place.rglob("predictions.jsonl"):
            lock = lines.with_name(LOCK_FILE)
            if 2 <= lines.read_bytes().count(b"\n") < EXAMPLES - 2 and lock.exists():
                os.kill(json.loads(lock.read_text())["pid"], signal.SIGKILL)
                return lines.parent, lines.read_bytes()
        time.sleep(0.002)
    process.kill()
    pytest.fail(f"no cell was caught at work: {process.communicate()[0]}")


def results(place: Path) -> dict[str, dict[str, Any]]:
    found = {path.parent.name: records.read_result(path.parent) for path in place.rglob("result.json")}
    return {name: result for name, result in found.items() if result is not None}


def check_sweep(command: Sequence[str], place: Path, cells: int) -> None:
    """One process killed, the rest of the sweep done, the second command does what is missing, once."""
    process = started([*command, f"outputs={place}"])
    cell, lines = killed_in_the_middle(place, process)
    shown, _ = process.communicate(timeout=900)
    assert "codes [1, 0]" in shown, shown
    first, second = " ".join(shown.split()).split("Compression methods side by side")[1:]
    assert first.count("killed") == 2, "a row and a note"
    assert "was gone after" in first
    assert f"failed: {cell}" in first
    assert "killed" not in second
    found = results(place)
    assert len(found) == cells
    assert {result["status"] for result in found.values()} == {"completed"}
    for path in place.rglob("predictions.jsonl"):
        ids = [json.loads(line)["id"] for line in path.read_text().splitlines()]
        assert len(ids) == len(set(ids)) == EXAMPLES
    assert (cell / "predictions.jsonl").read_bytes().startswith(lines), "what was done isn't done again"
    assert not list(place.rglob(LOCK_FILE))
    assert shown.count("completed: ") == cells, "every other cell was run by the first command alone"


def test_ray_loses_a_worker(cell: list[str], tmp_path: Path) -> None:
    """Twelve cells on a cluster of two workers."""
    pytest.importorskip("ray")
    sweep = [f"method={','.join(METHODS)}", f"budget.kept_fraction={','.join(FRACTIONS)}"]
    check_sweep([*cell, *sweep, "launch=ray", "hydra.launcher.ray.init.num_cpus=2"], tmp_path, 12)


@pytest.mark.parametrize("name", launchers.PACKAGES)
def test_launcher_that_is_not_installed_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = launchers.PACKAGES[name][1]
    monkeypatch.setattr(launchers, "find_spec", lambda module: None if module == gone else object())
    with pytest.raises(
        ConfigError, match=rf"launch={name} needs hydra-\w+-launcher: pip install 'hcache\[{name}\]'"
    ):
        launchers.check(overrides.parse([f"launch={name}"]), multirun=True)
    launchers.check(overrides.parse(["launch=basic"]), multirun=True)


@pytest.mark.parametrize("name", launchers.PACKAGES)
def test_launcher_without_a_sweep_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"launch={name} spreads the cells of a sweep"):
        run.check_lines([f"launch={name}", "method=snapkv"], multirun=False)


def test_submitit_loses_a_job(cell: list[str], tmp_path: Path) -> None:
    """submitit's local executor in SLURM's place."""
    pytest.importorskip("submitit")
    check_sweep([*cell, "method=snapkv", "budget.kept_fraction=0.3,0.5", *SUBMITIT], tmp_path, 2)
