"""What a run leaves behind: `result.json` and `predictions.jsonl`, their schema, hash, atomic writes and
resume.

A cell is one model x benchmark x method x budget x seed. Its predictions file grows by one line an example
and is the only state of a run: the result is computed from those lines, so a killed run that is repeated
ends with the same one. This module knows no method, no model, no statistics and no tracker, and imports no
torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

SCHEMA = 1
STATUSES = ("completed", "infeasible", "failed")
RESULT_FILE = "result.json"
PREDICTIONS_FILE = "predictions.jsonl"
SHARDS = "shards"
"""Directory of the parts of a cell, below its own."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_REQUIRED = ("schema", "status", "cell", "config", "config_hash", "provenance")
# What the hash covers of a configuration, and what it leaves out there: where things lie and how many
# examples.
_RUNTIME_IDENTITY = ("batch_size", "seed", "compile", "temperature", "top_p")
_NOT_IDENTITY = ("limit", "shard", "path", "profile", "haystack")
_PATH_SUFFIXES = ("_dir", "_path", "_file")

log = logging.getLogger(__name__)

Line = dict[str, Any]
Result = dict[str, Any]


class CorruptRecord(ValueError):
    """A record on disk can't be read; the message names the file and says what to do."""


# --- configuration -> plain data, hash, directory


def plain(value: Any) -> Any:
    """`value` as JSON data: dataclasses become dicts, enums their values, tuples lists, paths strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {str(plain(k)): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(v) for v in value)
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"a {type(value).__name__} can't be written to a record: {value!r}")


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a plain configuration that decides a cell's numbers: what its hash covers.

    Limit, shard, tracker, launch, tag and paths are left out. What lies at a path does decide numbers, so
    whoever makes the configuration puts a digest of that beside the path (`content_digest`).
    """
    kept = {section: _without_places(config[section]) for section in ("model", "method", "benchmark")}
    kept["budget"] = config["budget"]
    runtime = config["runtime"]  # of a record of an earlier version: without what came later
    kept["runtime"] = {key: runtime[key] for key in _RUNTIME_IDENTITY if key in runtime}
    return kept


def _without_places(section: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in section.items() if k not in _NOT_IDENTITY and not k.endswith(_PATH_SUFFIXES)}


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the identity of a plain configuration; key order doesn't matter."""
    text = json.dumps(identity(config), sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def setting(config: Mapping[str, Any]) -> str:
    """What cells must share to be compared: their identity but for method and budget, as a digest."""
    return config_hash({**config, "method": {}, "budget": None})


def text_digest(text: str) -> str:
    """16 hex digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def content_digest(files: Iterable[Path], samples: int = 64, block: int = 4096) -> str:
    """16 hex digits that tell files apart by what they hold, wherever they lie.

    Reads each file's name, size and `samples` evenly spread blocks, so gigabytes of weights take
    milliseconds and a fine-tune, which moves numbers all over a file, still has another digest. Files of up
    to `samples` blocks are covered whole.
    """
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        stride = max(block, size // samples)
        with path.open("rb") as file:
            for offset in range(0, size, stride):
                file.seek(offset)
                digest.update(file.read(block))
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run's place: its names, and the directory they lead to."""

    tag: str
    model: str
    benchmark: str
    method: str
    budget: str
    seed: int
    config_hash: str

    def directory(self, outputs: str | Path) -> Path:
        """`<outputs>/<tag>/<model>/<benchmark>/<method>-<budget>-s<seed>-<hash8>`."""
        leaf = f"{self.method}-{self.budget}-s{self.seed}-{self.config_hash[:8]}"
        return Path(outputs, *(safe_name(part) for part in (self.tag, self.model, self.benchmark, leaf)))

    def record(self) -> dict[str, Any]:
        """The `cell` entry of result.json."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "config_hash"}


def safe_name(text: str) -> str:
    """`text` with all but letters, digits and `._=+-` turned into `-`: safe as a file name anywhere."""
    return re.sub(r"[^\w.=+-]+", "-", text).strip("-.") or "unnamed"


# --- files


def write_result(directory: Path, result: Mapping[str, Any]) -> Path:
    """Write `result.json` atomically: a reader sees the old file or the new one, never half of one."""
    path = directory / RESULT_FILE
    _replace(path, _json(result, indent=1) + "\n")
    return path


def read_result(directory: Path) -> Result | None:
    """The cell's `result.json`, None where there is none. Raises CorruptRecord if it can't be read back."""
    path = directory / RESULT_FILE
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _corrupt(path, f"it is not JSON: {error}") from error
    if not isinstance(result, dict):
        raise _corrupt(path, "it holds no JSON object")
    missing = [key for key in _REQUIRED if key not in result]
    if missing:
        raise _corrupt(path, f"it lacks {', '.join(missing)}")
    if result["schema"] != SCHEMA:
        raise _corrupt(path, f"its schema is {result['schema']!r}, this version reads {SCHEMA}")
    if result["status"] not in STATUSES:
        raise _corrupt(path, f"its status {result['status']!r} is none of {', '.join(STATUSES)}")
    return result


def _corrupt(path: Path, reason: str) -> CorruptRecord:
    return CorruptRecord(
        f"{path} can't be read back ({reason}); move it away or delete it and repeat the command: "
        f"examples finished in {PREDICTIONS_FILE} are kept"
    )


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Predictions:
    """The lines of one cell's `predictions.jsonl`: read back with care, appended durably."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / PREDICTIONS_FILE

    def load(self) -> list[Line]:
        """All whole lines. A torn last line (a kill while writing) is cut off with a warning.

        Raises CorruptRecord if any other line is no JSON object with a task and an id.
        """
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        *whole, torn = content.split(b"\n")
        if torn:
            log.warning(
                "%s: dropped a torn last line of %d bytes; its example runs again", self.path, len(torn)
            )
            os.truncate(self.path, len(content) - len(torn))
        return [self._parse(raw, number) for number, raw in enumerate(whole, start=1)]

    def _parse(self, raw: bytes, number: int) -> Line:
        try:
            line = json.loads(raw)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise self._corrupt_line(number, str(error)) from error
        if not isinstance(line, dict) or "task" not in line or "id" not in line:
            raise self._corrupt_line(number, "it has no task and id")
        return line

    def _corrupt_line(self, number: int, reason: str) -> CorruptRecord:
        return CorruptRecord(
            f"{self.path} line {number} can't be read back ({reason}); "
            "delete that line and repeat the command: its example runs again"
        )

    def rewrite(self, lines: Sequence[Line]) -> None:
        """Replace the file by `lines`, atomically."""
        _replace(self.path, "".join(_dump(line) for line in lines))

    def append(self, lines: Sequence[Line]) -> None:
        """Add `lines` and force them to disk: what this returns from survives a kill."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(_dump(line) for line in lines))
            file.flush()
            os.fsync(file.fileno())


def _dump(line: Line) -> str:
    return _json(line) + "\n"


def _json(value: Any, indent: int | None = None) -> str:
    """As it is read; half a surrogate pair, which UTF-8 has no bytes for, as an escape."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


# --- provenance


def provenance(device: str | None, started: str, seconds: float, seed: int) -> dict[str, Any]:
    """Where a result comes from. device: in words, None if none was used; started: ISO 8601; seconds: all."""
    commit, dirty = git_state(Path(__file__).resolve().parent.parent)
    return {
        "git": commit,
        "dirty": dirty,
        "versions": versions(),
        "device": device,
        "started": started,
        "seconds": round(seconds, 3),
        "seed": seed,
    }


def now() -> str:
    """This moment, ISO 8601 with UTC offset, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that decide numbers; None where one isn't installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "transformers", "hcache"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """(commit, whether anything differs) of the repository at `root`; (None, None) if there is none."""
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None, None
        return _git(root, "rev-parse", "HEAD"), bool(_git(root, "status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()
