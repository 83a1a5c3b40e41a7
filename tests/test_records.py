"""Records: what the hash covers, what survives a kill, what a corrupt file says."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from hcache import records
from hcache.records import Cell, CorruptRecord, Predictions

CONFIG: dict[str, Any] = {
    "model": {"name": "tiny", "path": "tiny", "dtype": "float32", "attention": "auto", "content": "abc"},
    "method": {"name": "snapkv", "window": 32, "profile": None, "content": None},
    "benchmark": {"name": "retrieval", "limit": 2, "shard": None, "data_dir": "/data", "protocol": "plain"},
    "budget": {"kept_fraction": 0.25, "kept_tokens": None},
    "runtime": {"device": "auto", "batch_size": 1, "seed": 0, "threads": None},
    "tracker": {"name": "wandb"},
    "runner": {"name": "evaluate"},
    "tag": "x",
    "outputs": "outputs",
    "plugins": [],
    "profile": None,
}


def changed(section: str, key: str | None, value: Any) -> dict[str, Any]:
    config = json.loads(json.dumps(CONFIG))
    if key is None:
        config[section] = value
    else:
        config[section][key] = value
    return config


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "dtype", "bfloat16"),
        ("model", "attention", "reference"),
        ("model", "content", "other weights"),
        ("method", "window", 16),
        ("method", "content", "another profile"),
        ("benchmark", "protocol", "official"),
        ("budget", "kept_fraction", 0.5),
        ("budget", None, None),
        ("runtime", "seed", 1),
        ("runtime", "batch_size", 4),
    ],
)
def test_hash_covers(section: str, key: str | None, value: Any) -> None:
    assert records.config_hash(changed(section, key, value)) != records.config_hash(CONFIG)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "path", "/elsewhere/tiny"),
        ("benchmark", "limit", 300),
        ("benchmark", "shard", "1/4"),
        ("benchmark", "data_dir", "/elsewhere"),
        ("method", "profile", "/elsewhere/profile.json"),
        ("runtime", "device", "cuda"),
        ("runtime", "threads", 2),
        ("tracker", "name", "none"),
        ("tag", None, "y"),
        ("outputs", None, "/elsewhere"),
        ("plugins", None, ["./mine.py"]),
    ],
)
def test_hash_leaves_out(section: str, key: str | None, value: Any) -> None:
    assert records.config_hash(changed(section, key, value)) == records.config_hash(CONFIG)


def test_hash_ignores_key_order() -> None:
    turned = {k: dict(reversed(v.items())) if isinstance(v, dict) else v for k, v in reversed(CONFIG.items())}
    assert records.config_hash(turned) == records.config_hash(CONFIG)


def test_digest_sees_content_not_place(tmp_path: Path) -> None:
    def weights(directory: str, content: bytes) -> list[Path]:
        path = tmp_path / directory / "model.safetensors"
        path.parent.mkdir()
        path.write_bytes(content)
        return [path]

    content = bytes(range(256)) * 4096  # 1 MiB: sampled, not read whole
    first = records.content_digest(weights("a", content))
    assert first == records.content_digest(weights("b", content))
    assert first != records.content_digest(weights("c", content[::-1]))
    assert first != records.content_digest(weights("d", content[:-1]))
    tuned = content[: len(content) // 2] + bytes(len(content) // 2)
    assert first != records.content_digest(weights("g", tuned))
    small = records.content_digest(weights("e", b"12345"))
    assert small != records.content_digest(weights("f", b"12346"))


def test_cell_directory() -> None:
    cell = Cell("my tag", "org/model", "retrieval", "snapkv", "f0.25", 0, "0123456789abcdef")
    assert cell.directory("out") == Path("out/my-tag/org-model/retrieval/snapkv-f0.25-s0-01234567")


def result(**fields: Any) -> dict[str, Any]:
    base = dict.fromkeys(("cell", "config", "config_hash", "provenance"))
    return {"schema": records.SCHEMA, "status": "completed", **base, **fields}


def test_result_round_trip_leaves_no_other_file(tmp_path: Path) -> None:
    assert records.read_result(tmp_path) is None
    records.write_result(tmp_path, result(score=1.5))
    records.write_result(tmp_path, result(score=2.5))
    found = records.read_result(tmp_path)
    assert found is not None
    assert found["score"] == 2.5
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_failed_write_keeps_the_old_result(tmp_path: Path) -> None:
    records.write_result(tmp_path, result(score=1.5))
    with pytest.raises(ValueError, match="Out of range float"):
        records.write_result(tmp_path, result(score=float("nan")))
    found = records.read_result(tmp_path)
    assert found is not None
    assert found["score"] == 1.5


def test_write_broken_off_keeps_the_old_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    records.write_result(tmp_path, result(score=1.5))
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        records.write_result(tmp_path, result(score=2.5))
    found = records.read_result(tmp_path)
    assert found is not None
    assert found["score"] == 1.5


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"schema": 1}',
        json.dumps(result(schema=99)),
        json.dumps(result(status="odd")),
        "\udcff",
    ],
)
def test_corrupt_result_names_the_file_and_the_way_out(tmp_path: Path, content: str) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CorruptRecord, match="move it away or delete it") as error:
        records.read_result(tmp_path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


LINES = [{"task": "single", "id": str(i), "prediction": "1\n2 é"} for i in range(3)]


def test_lines_round_trip(tmp_path: Path) -> None:
    predictions = Predictions(tmp_path / "new")
    assert predictions.load() == []
    predictions.append(LINES[:1])
    predictions.append(LINES[1:])
    assert predictions.load() == LINES
    predictions.rewrite(LINES[1:])
    assert predictions.load() == LINES[1:]


def test_half_a_surrogate_pair_is_a_text_like_any_other(tmp_path: Path) -> None:
    """Rows that hold escapes may bring one, and UTF-8 has no bytes for it."""
    torn = "\ud83d and \udc00 beside 𝄞 and \\ud83d"
    predictions = Predictions(tmp_path)
    predictions.append([{**LINES[0], "prediction": torn}])
    assert predictions.load() == [{**LINES[0], "prediction": torn}]
    path = records.write_result(tmp_path, {"notes": [torn]})
    assert json.loads(path.read_text(encoding="utf-8"))["notes"] == [torn]


def test_torn_line_is_dropped_wherever_the_kill_came(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = Predictions(tmp_path)
    whole.append(LINES)
    content = whole.path.read_bytes()
    starts = [0, *(i + 1 for i, byte in enumerate(content) if byte == 0x0A)]
    for cut in range(len(content) + 1):
        whole.path.write_bytes(content[:cut])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = whole.load()
        assert found == LINES[: sum(start <= cut for start in starts) - 1]
        assert ("torn" in caplog.text) == (cut not in starts)
        whole.append(LINES[:1])
        assert whole.load() == [*found, LINES[0]]


@pytest.mark.parametrize("bad", ["{", "[]", '{"task": "single"}', "\udcff"])
def test_corrupt_line_names_its_number(tmp_path: Path, bad: str) -> None:
    predictions = Predictions(tmp_path)
    text = f"{json.dumps(LINES[0])}\n{bad}\n{json.dumps(LINES[1])}\n"
    predictions.path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CorruptRecord, match="line 2"):
        predictions.load()


def test_plain_refuses_what_json_cannot_hold() -> None:
    with pytest.raises(TypeError, match="object"):
        records.plain({"a": object()})


def test_git_state(tmp_path: Path) -> None:
    assert records.git_state(tmp_path) == (None, None)
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x", "--allow-empty"]):
        records._git(tmp_path, "-c", "user.name=x", "-c", "user.email=x@y", *command)
    commit, dirty = records.git_state(tmp_path)
    assert commit is not None
    assert len(commit) == 40
    assert dirty is False
    (tmp_path / "new").write_text("x")
    assert records.git_state(tmp_path) == (commit, True)
    (tmp_path / "inner").mkdir()
    assert records.git_state(tmp_path / "inner") == (None, None)
