"""What an example left beside its line: which prompt positions were kept, roles of heads, pivots' windows.

A file an example, `traces/<task>-<id>.npz` in the cell's directory, written at once and read back whole.
Knows numpy and paths; no torch, no method, no model.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hcache.records import safe_name

DIRECTORY = "traces"
SCHEMA = 1

Positions = list[list[NDArray[np.int64]]]
"""[layer][KV head] -> sorted prompt positions."""


@dataclass(frozen=True)
class Window:
    """A look at one pivot.

    Args:
        layer, head: of the pivot.
        number: of the window, from 1.
        overlap: of each step's top positions with the reference set.
        drifted: whether its satellites were refreshed.
    """

    layer: int
    head: int
    number: int
    overlap: tuple[float, ...]
    drifted: bool


@dataclass(frozen=True)
class Trace:
    """One example.

    Args:
        task, id, method: names.
        prompt_tokens, new_tokens: counts.
        first, last: positions kept before the first decode step, and after the last.
        windows: in the order of their end; empty for methods that don't watch.
        plan: what the method says of itself (Method.outline): roles, threshold, steps.
    """

    task: str
    id: str
    method: str
    prompt_tokens: int
    new_tokens: int
    first: Positions
    last: Positions
    windows: Sequence[Window]
    plan: dict[str, Any]


def write(directory: Path, trace: Trace) -> Path:
    """Leave the trace below a cell's directory; a reader sees a whole file or none."""
    path = directory / DIRECTORY / f"{safe_name(trace.task)}-{safe_name(trace.id)}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ("task", "id", "method", "prompt_tokens", "new_tokens", "plan")
    facts = {"schema": SCHEMA, **{name: getattr(trace, name) for name in names}}
    facts["windows"] = [[w.layer, w.head, w.number, list(w.overlap), w.drifted] for w in trace.windows]
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {**_flat("first", trace.first), **_flat("last", trace.last)}
    np.savez_compressed(buffer, facts=np.array(json.dumps(facts)), **arrays)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(buffer.getvalue())
    os.replace(temporary, path)
    return path


def read(path: Path) -> Trace:
    """Read a trace back. Raises ValueError for a file that is none."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            facts = json.loads(str(arrays["facts"]))
            if facts.pop("schema") != SCHEMA:
                raise ValueError("it is of another version")
            rows = facts.pop("windows")
            windows = [Window(layer, head, n, tuple(lap), moved) for layer, head, n, lap, moved in rows]
            first, last = _ragged("first", arrays), _ragged("last", arrays)
            return Trace(**facts, first=first, last=last, windows=windows)
    except (OSError, EOFError, ValueError, TypeError, LookupError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no trace that can be read ({error})") from error


def _flat(name: str, positions: Positions) -> dict[str, NDArray[np.int64]]:
    counts = np.array([[len(head) for head in layer] for layer in positions])
    flat = np.concatenate([head for layer in positions for head in layer])
    return {name: flat.astype(np.int32), f"{name}_counts": counts}


def _ragged(name: str, arrays: Any) -> Positions:
    counts, flat = arrays[f"{name}_counts"], arrays[name].astype(np.int64)
    parts = iter(np.split(flat, np.cumsum(counts.ravel())[:-1]))
    return [[next(parts) for _ in layer] for layer in counts]
