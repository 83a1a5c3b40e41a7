"""W&B tracking through the real client, offline: what is logged, and that resuming leaves one whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hcache.records import Cell
from runners.config import TrackerConfig, TrackerMode
from runners.tracking import NoTracker, SafeTracker, WandbTracker, make_tracker, run_id
from tests.offline_runs import config, history, logged, summary, the_run

CELL = Cell("my_tag", "tiny", "retrieval", "snapkv", "f0.25", 0, "0123456789abcdef" * 4)
CONFIG = {"method": {"name": "snapkv", "window": 32}, "budget": {"kept_fraction": 0.25}}


def line(number: int) -> dict[str, Any]:
    memory = {"device_payload": 100, "device_metadata": 5}
    times = {"prefill_ms": 10.0, "decode_ms": 8.0, "decode_steps": 4, "prompt_tokens": 9, "new_tokens": 4}
    text = {"prediction": f"p{number}", "answers": ["a", "b"], "score": number / 4}
    return {"task": "single", "id": str(number), "memory": memory, **times, **text}


RESULT = {
    "status": "completed",
    "score": 37.5,
    "tasks": {"single": {"score": 37.5, "n": 4}},
    "latency": {"prefill_ms": {"median": 10.0}},
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "wandb-home"))


def tracked(directory: Path, before: int, after: int, result: dict[str, Any] | None) -> None:
    """One part of a run: `before` examples were finished earlier, `after` will be in the end."""
    tracker = WandbTracker(TrackerConfig(name="wandb"), CELL, directory)
    tracker.start(CONFIG, [line(i) for i in range(before)])
    for number in range(before, after):
        tracker.example(line(number))
    tracker.finish(result, [line(i) for i in range(after)])


def test_a_shard_is_a_run_apart(tmp_path: Path) -> None:
    """Shards of a cell share its hash, and none of them is to be taken for the cell."""
    places = [tmp_path / "snapkv-f0.25", *(tmp_path / "snapkv-f0.25" / "shards" / f"{i}of2" for i in (0, 1))]
    for place in places:
        tracked(place, 0, 1, None)
    runs = [the_run(logged(place)) for place in places]
    assert len({run.run_id for run in runs}) == 3
    assert [run.run_group for run in runs] == ["my_tag", "my_tag-shards", "my_tag-shards"]
    assert [run.display_name for run in runs] == ["snapkv-f0.25", "snapkv-f0.25-0of2", "snapkv-f0.25-1of2"]


def test_resumed_offline_leaves_one_whole_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tracked(tmp_path, 0, 2, None)
    (first,) = tmp_path.glob("wandb/offline-run-*")
    first = first.rename(first.with_name(f"offline-run-20200101_000000-{run_id(CELL)}"))
    other = tmp_path / "wandb" / "offline-run-20200101_000000-another"
    other.mkdir()
    tracked(tmp_path, 2, 4, RESULT)
    assert not first.exists()
    assert other.exists(), "only this cell's run is replaced"
    other.rmdir()
    found = logged(tmp_path)
    rows = history(found)
    scores = [row["score/single"] for row in rows if "score/single" in row]
    assert scores == [0, 25, 50, 75]
    assert [row["_step"] for row in rows if "score/single" in row] == [0, 1, 2, 3]
    assert any(key.split("/")[0] == "predictions" for row in rows for key in row)
    run = the_run(found)
    assert (run.run_id, run.run_group, run.project) == (f"my_tag-{'0123456789abcdef'}", "my_tag", "hcache")
    assert config(found) == CONFIG
    assert summary(found)["score"] == 37.5
    table = next(tmp_path.glob("wandb/offline-run-*/files/media/table/*.json"))
    assert len(json.loads(table.read_text())["data"]) == 4
    assert capfd.readouterr() == ("", ""), "the client stays quiet"


def test_everything_lies_beside_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    tracked(tmp_path / "cell", 0, 1, RESULT)
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "variable", "mode"),
    [
        (None, None, "offline"),
        (None, "online", "online"),
        (None, "disabled", "disabled"),
        (TrackerMode.offline, "online", "offline"),
        (TrackerMode.online, None, "online"),
    ],
)
def test_mode(
    setting: TrackerMode | None, variable: str | None, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert WandbTracker(TrackerConfig(name="wandb", mode=setting), CELL, Path("x")).mode == mode


def test_steps_the_server_has_are_passed_over() -> None:
    """Online the client does resume: its step says how many examples arrived."""

    class Run:
        step = 2

        def __init__(self) -> None:
            self.logged: list[int] = []

        def log(self, metrics: dict[str, Any], step: int) -> None:
            self.logged.append(step)
            self.step = step + 1

    tracker = WandbTracker(TrackerConfig(name="wandb"), CELL, Path("x"))
    tracker._run = Run()
    for number in range(4):
        tracker.example(line(number))
    assert tracker._run.logged == [2, 3]


def test_first_error_ends_tracking_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(NoTracker):
        def example(self, line: Any) -> None:
            raise OSError("disk full")

    tracker = SafeTracker(Broken())
    for number in range(3):
        tracker.example(line(number))
    tracker.finish(None, [])
    assert caplog.text.count("disk full") == 1


def test_tracker_names() -> None:
    assert isinstance(make_tracker(TrackerConfig(name="none"), CELL, Path("x")), NoTracker)
    assert isinstance(make_tracker(TrackerConfig(name="wandb"), CELL, Path("x")), SafeTracker)
    with pytest.raises(ValueError, match=r"tracker\.name=foo"):
        make_tracker(TrackerConfig(name="foo"), CELL, Path("x"))
