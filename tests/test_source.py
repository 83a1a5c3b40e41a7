"""Files of benchmarks: where they are found, what is wrong with them, and prompts that are pinned."""

from __future__ import annotations

import hashlib
import io
import logging
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from hcache.benchmarks import prompt_files
from hcache.benchmarks.prompt_files import PromptFile
from hcache.benchmarks.source import DataError, HubFiles, RowError, Rows, local_file, zip_member


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory and a cache of one's own; whatever would be fetched is beside them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prompt_files, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(prompt_files, "RAW", (tmp_path / "web").as_uri())


def written(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_data_dir_comes_before_data_and_the_names_in_order(tmp_path: Path) -> None:
    own, common = tmp_path / "mine", tmp_path / "data" / "bench"
    own.mkdir()
    assert local_file("bench", str(own), ["a", "b"]) is None
    written(common / "a", "")
    assert local_file("bench", str(own), ["a", "b"]) == Path("data/bench/a")
    assert local_file("bench", None, ["a", "b"]) == Path("data/bench/a")
    written(own / "b", "")
    assert local_file("bench", str(own), ["a", "b"]) == own / "b"
    (own / "a").mkdir()
    assert local_file("bench", str(own), ["a", "b"]) == own / "b", "a directory is no file"
    (own / "a").rmdir()
    written(own / "a", "")
    assert local_file("bench", str(own), ["a", "b"]) == own / "a"


def test_a_data_dir_that_is_none() -> None:
    with pytest.raises(DataError, match="data_dir=nowhere is not a directory"):
        local_file("bench", "nowhere", ["a"])


@pytest.mark.parametrize("kind", [ConnectionError, ValueError])
def test_the_hub_without_a_network(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    import huggingface_hub

    def unreachable(*args: object, **kwargs: object) -> str:
        raise kind("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(DataError, match=r"data\.zip of a/b can't .*no route to host.*runner=fetch.*data_dir"):
        HubFiles("a/b", "123").fetch("data.zip")


def test_the_first_digits_of_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked up in the cache, else on the Hub; branches and whole hashes are themselves."""
    import huggingface_hub
    from huggingface_hub import constants

    class Commit:
        commit_id = "5e628be" + "0" * 33

    def asked(api: object, repo: str, repo_type: str) -> list[type[Commit]]:
        assert (repo, repo_type) == ("a/b", "dataset")
        return [Commit]

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_commits", asked)
    assert HubFiles("a/b", "5e628be").commit() == Commit.commit_id
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names, revision, **kind: revision)
    assert HubFiles("a/b", "5e628be").fetch("data.zip") == Path(Commit.commit_id)
    assert HubFiles("a/b", "main").commit() == "main"
    assert HubFiles("a/b", "f" * 40).commit() == "f" * 40
    with pytest.raises(ValueError, match="has no commit 1234567"):
        HubFiles("a/b", "1234567").commit()
    (tmp_path / "hub/datasets--a--b/snapshots" / ("1234567" + "a" * 33)).mkdir(parents=True)
    assert HubFiles("a/b", "1234567").commit() == "1234567" + "a" * 33


def test_rows_are_numbered_as_in_the_file() -> None:
    found = list(Rows("f").lines(io.BytesIO(b'{"a": 1}\n\n{"a": 2}\n')))
    assert found == [(1, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [(b'{"a": ', "no JSON"), (b"[1]", "a JSON list"), (b"\xff\xfe", "no JSON"), (b"3", "a JSON int")],
)
def test_a_broken_row_is_an_error_or_counted(
    line: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    content = b'{"a": 1}\n' + line + b'\n{"a": 3}\n'
    with pytest.raises(RowError, match=rf"f\.jsonl row 2: is {reason}.*skip_bad_rows=true"):
        list(Rows("f.jsonl").lines(io.BytesIO(content)))
    rows = Rows("f.jsonl", skip=True)
    with caplog.at_level(logging.WARNING):
        assert [number for number, _ in rows.lines(io.BytesIO(content))] == [1, 3]
    assert len(rows.skipped) == 1
    assert "row 2" in caplog.text


def test_a_bad_field_is_named() -> None:
    with pytest.raises(RowError, match=r"f row 7, field 'answers': is missing"):
        Rows("f").bad(7, "answers", "is missing")


def test_zip_files(tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/b.jsonl", "{}" * 5000)
        archive.writestr("e", "")
    archive, name = zip_member(path, ["a.jsonl", "data/b.jsonl", "e"])
    with archive:
        assert archive.read(name)[:2] == b"{}"
    with pytest.raises(DataError, match=r"holds none of c, d"):
        zip_member(path, ["c", "d"])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="no whole zip file"):
        zip_member(path, ["data/b.jsonl"])
    with pytest.raises(DataError, match="no whole zip file"):
        zip_member(tmp_path / "missing.zip", ["data/b.jsonl"])


TEXT = '{"x": "ask {input} of {context}"}'


def pinned(text: str = TEXT, path: str = "config/p.json") -> PromptFile:
    return PromptFile("owner/name", "abc123", path, hashlib.sha256(text.encode()).hexdigest())


def on_the_web(tmp_path: Path, text: str = TEXT, path: str = "config/p.json") -> Path:
    return written(tmp_path / "web" / "owner/name" / "abc123" / path, text)


def test_prompts_are_fetched_once(tmp_path: Path) -> None:
    place = on_the_web(tmp_path)
    assert pinned().json() == {"x": "ask {input} of {context}"}
    place.unlink()
    assert pinned().text() == TEXT
    assert (tmp_path / "cache/prompts/owner/name/abc123/config/p.json").read_text() == TEXT


def test_a_cached_file_that_was_changed_is_fetched_again(tmp_path: Path) -> None:
    on_the_web(tmp_path)
    written(tmp_path / "cache/prompts/owner/name/abc123/config/p.json", "{}")
    assert pinned().text() == TEXT


def test_a_wrong_hash_is_refused_and_not_kept(tmp_path: Path) -> None:
    on_the_web(tmp_path, TEXT + " ")
    with pytest.raises(DataError, match=r"has sha256 [0-9a-f]{64}, pinned is"):
        pinned().text()
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_no_network_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"can't be fetched .*runner=fetch.*prompt_dir.*owner/name"):
        pinned().text()


def test_a_prompt_dir_is_read_instead(tmp_path: Path) -> None:
    local = tmp_path / "checkout"
    written(local / "config/p.json", '{"x": "mine"}')
    assert pinned().json(str(local)) == {"x": "mine"}
    assert not pinned().matches(str(local))
    written(local / "config/p.json", TEXT)
    assert pinned().matches(str(local))
    with pytest.raises(DataError, match=r"prompt_dir=.* has no other\.json"):
        replace(pinned(), path="other.json").text(str(local))


def test_a_prompt_file_that_is_no_json(tmp_path: Path) -> None:
    written(tmp_path / "here/config/p.json", "{")
    with pytest.raises(DataError, match="is no JSON"):
        pinned().json(str(tmp_path / "here"))


PYTHON = """
import os
templates = {"a": "one " + "two" + "\\nthree", "b": ["x", ("y", 1)], "n": -3}
computed = {"a": os.getcwd()}
other = templates
both = first = "no"
other.attribute = "no"
mixed = {"a": 1 + 2}
formatted = "no" % "no"
spread = {**templates}
last = ()
"""


def test_literals_are_read_and_nothing_is_run(tmp_path: Path) -> None:
    written(tmp_path / "here/p.py", PYTHON)
    found = pinned(PYTHON, "p.py").literals(str(tmp_path / "here"))
    assert found == {"templates": {"a": "one two\nthree", "b": ["x", ["y", 1]], "n": -3}, "last": []}
    written(tmp_path / "here/p.py", "a = (")
    with pytest.raises(DataError, match="is no Python"):
        pinned(PYTHON, "p.py").literals(str(tmp_path / "here"))
