"""From `model.path` to a place with files: a local directory or a repository of the Hugging Face Hub.

Every way in which a model can be missing ends in one ModelNotFound that names model.path and says what to
do. Knows nothing of torch and doesn't open weights.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hcache.models.spec import ModelSpec

LOGGER = logging.getLogger(__name__)
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class ModelNotFound(ValueError):
    """model.path names no model that can be loaded."""


def source(spec: ModelSpec) -> str:
    """What transformers is given: an absolute local directory, or the Hub id as it is."""
    directory = local_directory(spec)
    return str(directory) if directory else spec.path


def local_directory(spec: ModelSpec) -> Path | None:
    """The directory that `spec.path` means, existing or not; None if it is a Hub id or a shape."""
    if spec.random:
        return None
    if spec.embedded:
        return Path(__file__).resolve().parent.parent / "tiny" / "weights"
    path = Path(spec.path).expanduser()
    written_as_path = spec.path.startswith(("/", "./", "../", "~")) or not _HUB_ID.fullmatch(spec.path)
    return path.resolve() if written_as_path or path.exists() else None


def check_path(spec: ModelSpec) -> None:
    """Check a local model without loading it; a Hub id passes, it is checked when its config is fetched.

    Raises:
        ModelNotFound: no path, no such directory, no config.json, no (complete) weights.
    """
    if not spec.path.strip():
        raise ModelNotFound("model.path is empty; set it to a local directory or to a Hugging Face Hub id")
    directory = local_directory(spec)
    if directory is None:
        return
    if spec.embedded and not (directory / "config.json").is_file():
        raise ModelNotFound(f"model.path={spec.path}: no embedded model in {directory}; reinstall hcache")
    if not directory.is_dir():
        raise ModelNotFound(
            f"model.path={spec.path}: no such directory ({directory}); "
            "give an existing directory, or a Hub id such as Qwen/Qwen2.5-7B-Instruct"
        )
    if not (directory / "config.json").is_file():
        raise ModelNotFound(
            f"model.path={spec.path}: {directory} has no config.json; "
            "give the directory of a transformers checkpoint"
        )
    if spec.revision is not None:
        LOGGER.warning("model.revision=%s has no effect on the local model.path=%s", spec.revision, spec.path)
    _check_weights(spec, directory)


def _check_weights(spec: ModelSpec, directory: Path) -> None:
    if (directory / INDEX).is_file() or (directory / SINGLE).is_file():
        missing = [file.name for file in weight_files(directory) if not file.is_file()]
        if missing:
            raise ModelNotFound(
                f"model.path={spec.path}: {directory} lacks {', '.join(missing)}; copy the model again"
            )
        return
    pickled = sorted(directory.glob("pytorch_model*.bin"))
    if not pickled:
        raise ModelNotFound(
            f"model.path={spec.path}: {directory} has no weights; expected {SINGLE}, or {INDEX} and shards"
        )
    if not spec.allow_pickle:
        raise ModelNotFound(
            f"model.path={spec.path}: only pickled weights ({pickled[0].name}), which can run code when "
            "opened; convert them to safetensors, or set model.allow_pickle=true if you trust their author"
        )


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files a checkpoint consists of, sorted; they may be missing.

    Raises:
        ModelNotFound: an index that can't be read.
    """
    index = directory / INDEX
    if not index.is_file():
        return [directory / SINGLE]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ModelNotFound(f"{index} is damaged ({error}); copy the model again") from error
    return sorted(directory / name for name in names)


def cached_directory(spec: ModelSpec) -> Path | None:
    """Where the files of `spec` lie on this machine: its directory or its Hub snapshot; None if not here."""
    directory = local_directory(spec)
    if directory is not None or spec.random:
        return directory
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(spec.path, "config.json", revision=spec.revision)
    return Path(found).parent if isinstance(found, str) else None


def fetch_config(spec: ModelSpec) -> None:
    """Make sure that the config of a Hub model is on this machine; local models pass.

    Raises:
        ModelNotFound: unknown id or revision, gated, not a model, or no connection and no copy.
    """
    if local_directory(spec) is not None or spec.random:
        return
    from huggingface_hub import hf_hub_download

    with _quiet_hub():
        try:
            hf_hub_download(spec.path, "config.json", revision=spec.revision)
        except (OSError, ValueError) as error:
            raise ModelNotFound(f"model.path={spec.path}: {explain_hub_error(spec, error)}") from error


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """No line of the Hub client for each of its retries: the user gets one message at the end."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def explain_hub_error(spec: ModelSpec, error: Exception) -> str:
    """What is wrong and what to do, for an exception of huggingface_hub."""
    from huggingface_hub import errors

    # The order matters: a gated repository is a "repository not found" to its class hierarchy.
    if isinstance(error, errors.GatedRepoError):
        return (
            f"the model is gated; ask for access at https://huggingface.co/{spec.path}, then log in with "
            "`hf auth login` (or set HF_TOKEN), or point model.path at a local copy"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the Hub has no model.revision={spec.revision} of it; leave it out for the main branch"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return (
            "not on this machine, and the Hugging Face Hub can't be reached; check the network (and that "
            "HF_HUB_OFFLINE is not set), or point model.path at a local directory"
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return (
            "neither a local directory nor a model on the Hugging Face Hub that you can see; check the "
            "spelling, or log in with `hf auth login` if it is private"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return "the repository has no config.json, so it is not a transformers checkpoint"
    return f"the Hugging Face Hub gave an error ({str(error).splitlines()[0][:200]}); try again later"
