"""runner=fetch: every part is got or named as missing, and one that is missing keeps no other."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
from rich.console import Console

from hcache.benchmarks import Benchmark, Example
from hcache.benchmarks.source import DataError
from hcache.methods import METHODS
from hcache.models import ModelSpec, Shape, checkpoint_fingerprint
from runners import fetch
from runners.config import RunConfig
from tests.cells import write_checkpoint


@dataclass(frozen=True)
class Paper(Benchmark):
    """A benchmark that gets what it was told to."""

    name: ClassVar[str] = "paper"
    places: tuple[str, ...] = ()
    error: str = ""

    def examples(self, tokenizer: Any | None) -> list[Example]:
        raise AssertionError("nothing is run")

    def score(self, example: Example | str, prediction: str, answers: Sequence[str], **extra: Any) -> float:
        raise AssertionError("nothing is run")

    def files(self) -> list[Path]:
        if self.error:
            raise DataError(self.error)
        return [Path(place) for place in self.places]


def command(method: Any = "snapkv", **parts: Any) -> RunConfig:
    made = METHODS.get(method)() if isinstance(method, str) else method
    return RunConfig(**{"model": ModelSpec(), "method": made, "benchmark": Paper(), **parts})


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is printed."""
    text = io.StringIO()
    monkeypatch.setattr(fetch, "get_console", lambda: Console(file=text))
    return text


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """A Hub with files by repository; what was asked for is copied into a snapshot of nothing else."""
    from fnmatch import fnmatch

    repositories: dict[str, list[str]] = {}

    def config(repo: str, name: str, revision: str | None) -> str:
        return str(tmp_path / name)

    def snapshot(
        repo: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        place = tmp_path / repo
        for name in repositories[repo]:
            wanted = any(fnmatch(name, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch(name, pattern) for pattern in ignore_patterns):
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_bytes(b"x" * 1000)
        return str(place)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", config)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return repositories


def test_files_are_listed_with_their_sizes(tmp_path: Path, shown: io.StringIO) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"x" * 2500)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "a.txt").write_bytes(b"x" * 700)
    places = (str(tmp_path / "rows.jsonl"), str(tmp_path / "prompts"))
    outcome = fetch.run(command(benchmark=Paper(places=places)))
    assert (outcome.status, outcome.directory) == ("completed", None)
    assert "3 places" in outcome.message, "the model, a file and a directory"
    lines = {
        line.split()[-3].rsplit("/", 1)[-1]: line for line in shown.getvalue().splitlines() if "/" in line
    }
    assert lines["rows.jsonl"].split()[-2:] == ["2.5", "kB"]
    assert lines["prompts"].split()[-2:] == ["700", "bytes"]
    assert "model tiny" in shown.getvalue()


def test_what_needs_nothing_says_so(shown: io.StringIO) -> None:
    model = ModelSpec(name="timed", path="shape", shape=Shape(layers=2))
    outcome = fetch.run(command("heterocache", model=model))
    assert outcome.status == "completed"
    for part in ("random weights of a shape", "made when it is run", "made up for random weights"):
        assert f"{part}" in shown.getvalue()


def test_one_failure_keeps_no_other_part(tmp_path: Path, shown: io.StringIO) -> None:
    model = ModelSpec(path=str(tmp_path / "gone"))
    outcome = fetch.run(command(model=model, benchmark=Paper(error="rows.jsonl can't be downloaded")))
    assert outcome.status == "failed"
    assert outcome.directory is None
    assert "\n" not in outcome.message
    for reason in (f"model.path={tmp_path}/gone: no such directory", "benchmark paper: rows.jsonl can't be"):
        assert reason in outcome.message
    other = fetch.run(command(benchmark=Paper(error="rows.jsonl can't be downloaded")))
    assert other.status == "failed"
    assert "model tiny" in shown.getvalue(), "what is here is listed all the same"


def test_an_unexpected_error_is_an_outcome(monkeypatch: pytest.MonkeyPatch, shown: io.StringIO) -> None:
    def broken(self: Paper) -> list[Path]:
        raise KeyError("row")

    monkeypatch.setattr(Paper, "files", broken)
    outcome = fetch.run(command())
    assert (outcome.status, "KeyError: 'row'" in outcome.message) == ("failed", True)


def test_files_that_are_not_there_after_all_are_a_failure(tmp_path: Path, shown: io.StringIO) -> None:
    outcome = fetch.run(command(benchmark=Paper(places=(str(tmp_path / "rows.jsonl"),))))
    assert outcome.status == "failed"
    assert "rows.jsonl was to be here and is not" in outcome.message


# --- models of the Hub

WHOLE = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "merges.txt"]


def names_below(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_only_what_loading_reads_is_downloaded(
    hub: dict[str, list[str]], tmp_path: Path, shown: io.StringIO
) -> None:
    others = ["consolidated.safetensors", "original/params.json", "pytorch_model.bin", "code.py", "a.gguf"]
    hub["who/what"] = WHOLE + others
    outcome = fetch.run(command(model=ModelSpec(path="who/what", allow_pickle=True)))
    assert outcome.status == "completed", outcome.message
    assert names_below(tmp_path / "who/what") == sorted(WHOLE), "no pickles beside safetensors"
    assert "5.0 kB" in shown.getvalue()
    fetch.run(command(model=ModelSpec(path="who/what", trust_remote_code=True)))
    assert "code.py" in names_below(tmp_path / "who/what")


def test_pickles_only_where_allowed(hub: dict[str, list[str]], tmp_path: Path, shown: io.StringIO) -> None:
    hub["who/old"] = ["config.json", "pytorch_model.bin", "tokenizer.json"]
    refused = fetch.run(command(model=ModelSpec(path="who/old")))
    assert refused.status == "failed"
    assert "set model.allow_pickle=true" in refused.message
    assert "pytorch_model.bin" not in names_below(tmp_path / "who/old")
    allowed = fetch.run(command(model=ModelSpec(path="who/old", allow_pickle=True)))
    assert allowed.status == "completed", allowed.message
    assert "pytorch_model.bin" in names_below(tmp_path / "who/old")


def test_a_hub_that_cant_be_reached_is_a_failure_in_words(
    monkeypatch: pytest.MonkeyPatch, shown: io.StringIO
) -> None:
    def offline(*args: Any, **kwargs: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    outcome = fetch.run(command(model=ModelSpec(path="who/what")))
    assert outcome.status == "failed"
    assert "model.path=who/what: not on this machine, and the Hugging Face Hub can't" in outcome.message
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: "config.json")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert "not on this machine" in fetch.run(command(model=ModelSpec(path="who/what"))).message


# --- head profiles


def test_the_shipped_profile_is_found(shown: io.StringIO) -> None:
    assert fetch.run(command("heterocache")).status == "completed"
    line = next(line for line in shown.getvalue().splitlines() if "head profile" in line)
    assert "hcache/tiny/profile" in line


def test_a_missing_profile_comes_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: io.StringIO
) -> None:
    monkeypatch.setenv("HCACHE_PROFILES", str(tmp_path / "profiles"))
    checkpoint = write_checkpoint(tmp_path / "model")
    model = ModelSpec(path=str(checkpoint))
    assert fetch.run(command("heterocache", model=model)).status == "completed", "making it needs no network"
    text = " ".join(shown.getvalue().split())
    assert "runner=profile model=hf" in text
    assert checkpoint_fingerprint(checkpoint) in text.replace(" ", "")


def test_a_named_profile_that_is_not_there_is_a_failure(tmp_path: Path, shown: io.StringIO) -> None:
    method = METHODS.get("heterocache")()
    named = replace(method, profile=str(tmp_path / "mine.safetensors"))  # type: ignore[call-arg]
    outcome = fetch.run(command(method=named))
    assert outcome.status == "failed"
    assert "mine.safetensors: no such file" in outcome.message
