"""runner=fetch: what a run needs, got ahead and listed with sizes, for machines without a network.

The model's files, the benchmark's data and prompts, and the head profile if the method goes by one. Nothing
is run. One part that can't be had doesn't keep the others; all that is wrong is said at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich import box, filesize, get_console
from rich.console import Console
from rich.table import Table

from hcache.models import ModelNotFound, ModelSpec, check_path
from hcache.models.source import SINGLE, explain_hub_error, fetch_config, local_directory
from runners import CellOutcome
from runners.checks import asked_model
from runners.config import RunConfig, one_line

log = logging.getLogger(__name__)
_WIDTH_WITHOUT_TERMINAL = 200
_SMALL = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.safetensors"]
_NOT_READ = ["*/*", "consolidated*"]
"""Files that transformers doesn't load: directories, and weights in the authors' own layout."""


@dataclass(frozen=True)
class Item:
    """One line of the table.

    Args:
        part: what it is for: model, benchmark or head profile, with its name.
        place: where it lies, or why there is nothing to get.
        size: bytes; None for what is no file.
    """

    part: str
    place: str
    size: int | None = None


def run(run: RunConfig) -> CellOutcome:
    """Get everything; the outcome's message names what is missing, or says how much there is."""
    items: list[Item] = []
    failures: list[str] = []
    parts: list[tuple[str, Callable[[RunConfig], list[Item]]]] = [
        (f"model {run.model.name}", model_items),
        (f"benchmark {run.benchmark.name}", benchmark_items),
        (f"head profile of {run.method.name}", profile_items),
    ]
    for part, get in parts:
        try:
            items += get(run)
        except (ValueError, OSError, ImportError) as error:
            failures.append(f"{part}: {one_line(error)}")
        except Exception as error:  # an outcome, never an exception, goes to the launcher
            log.exception("%s can't be had", part)
            failures.append(f"{part}: {type(error).__name__}: {one_line(error)}")
    show(items)
    if failures:
        return CellOutcome("failed", message=f"runner=fetch: {'; '.join(failures)}")
    files = [item for item in items if item.size is not None]
    total = filesize.decimal(sum(item.size or 0 for item in files))
    return CellOutcome("completed", message=f"everything is here: {len(files)} places, {total}")


def model_items(run: RunConfig) -> list[Item]:
    """The model's files, downloaded if it is one of the Hub. Raises ModelNotFound."""
    spec, part = run.model, f"model {run.model.name}"
    if spec.random:
        return [Item(part, "random weights of a shape: nothing to get")]
    check_path(spec)
    local = local_directory(spec)
    directory = _downloaded(spec) if local is None else local
    return [Item(part, str(directory), _size(directory))]


def _downloaded(spec: ModelSpec) -> Path:
    """The snapshot of a model of the Hub, with the files that loading reads. Raises ModelNotFound."""
    fetch_config(spec)
    code = ["*.py"] if spec.trust_remote_code else []
    directory = _snapshot(spec, [*_SMALL, *code])
    pickled = not any(directory.glob("*.safetensors"))
    if pickled and spec.allow_pickle:
        _snapshot(spec, ["pytorch_model*.bin", "pytorch_model*.json"])
    elif pickled:
        raise ModelNotFound(
            f"model.path={spec.path}: the repository has no {SINGLE} or shards of it; choose another model, "
            "or set model.allow_pickle=true if you trust its author"
        )
    check_path(replace(spec, path=str(directory), revision=None))
    return directory


def _snapshot(spec: ModelSpec, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            spec.path, revision=spec.revision, allow_patterns=list(patterns), ignore_patterns=_NOT_READ
        )
    except (OSError, ValueError) as error:  # huggingface_hub's errors are of these kinds
        raise ModelNotFound(f"model.path={spec.path}: {explain_hub_error(spec, error)}") from error
    return Path(found)


def benchmark_items(run: RunConfig) -> list[Item]:
    """The benchmark's files, as it gets them itself. Raises DataError and the like."""
    part = f"benchmark {run.benchmark.name}"
    files = run.benchmark.files()
    missing = [path for path in files if not path.exists()]
    if missing:
        raise FileNotFoundError(f"{missing[0]} was to be here and is not; get it again")
    return [Item(part, str(path), _size(path)) for path in files] or [
        Item(part, "made when it is run: nothing to get")
    ]


def profile_items(run: RunConfig) -> list[Item]:
    """The head profile of a method that goes by one, or the command that makes it. Raises ValueError."""
    if run.method.profiled is None:
        return []
    part, named = f"head profile of {run.method.name}", run.method.profiled.profile
    if named is not None:
        from hcache.profiling import load_profile  # imports torch

        load_profile(named)
        path = Path(named).expanduser()
        return [Item(part, str(path), _size(path))]
    if run.model.random:
        return [Item(part, "made up for random weights: nothing to get")]
    return [_found_profile(run, part)]


def _found_profile(run: RunConfig, part: str) -> Item:
    """A profile of these weights, the user's or a shipped one; else what makes it, without a network."""
    from hcache.models import expected_fingerprint, geometry
    from hcache.profiling import ProfileNotFound, find_profile
    from hcache.profiling.library import default_path

    command = f"python run.py runner=profile {asked_model(run.model)}"
    # No download here: the model's part has done that, or has failed.
    fingerprint = expected_fingerprint(run.model)
    if fingerprint is None:
        return Item(part, f"which one fits is known when the weights are loaded; if there is none: {command}")
    try:
        find_profile(geometry(run.model, weights=True))
    except ProfileNotFound:
        return Item(part, f"not here; make it, no network needed: {command} (to {default_path(fingerprint)})")
    path = _profile_path(fingerprint)
    return Item(part, str(path), _size(path))


def _profile_path(fingerprint: str) -> Path:
    """Where the profile lies that `find_profile` finds."""
    from hcache.profiling.library import _candidates, load_profile

    places = [path for path in _candidates(fingerprint) if path.is_file()]
    return next(path for path in places if load_profile(path).fingerprint == fingerprint)


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a directory; the Hub's cache holds links."""
    files: Iterable[Path] = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def show(items: Sequence[Item], console: Console | None = None) -> None:
    """Print what lies where."""
    console = console or get_console()
    if not console.is_terminal:
        console = Console(file=console.file, width=_WIDTH_WITHOUT_TERMINAL)
    table = Table(title="What the run reads", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("part")
    table.add_column("place", overflow="fold")
    table.add_column("size", justify="right")
    for item in items:
        table.add_row(item.part, item.place, "-" if item.size is None else filesize.decimal(item.size))
    console.print(table)
