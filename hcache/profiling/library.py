"""Reading head profiles, and finding the one of a model by the fingerprint of its weights.

Two places, in this order: the user's directory, $HCACHE_PROFILES or ~/.cache/hcache/profiles, where
`runner=profile` writes, then the profile shipped with the embedded model (hcache/tiny). A file is called
after the fingerprint; the shipped one may also be called profile.safetensors or profile.json.
"""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError

from hcache.geometry import Geometry
from hcache.profiling.profile import HeadProfile, assemble, check_suffix, read_parts
from hcache.profiling.published import from_published

SHIPPED = Path(__file__).resolve().parent.parent / "tiny"
SUFFIXES = (".safetensors", ".json")


class ProfileNotFound(ValueError):
    """No head profile of this model on this machine."""


def user_directory() -> Path:
    """Where profiles of this user lie; it may not exist yet."""
    chosen = os.environ.get("HCACHE_PROFILES")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "hcache" / "profiles"


def default_path(fingerprint: str) -> Path:
    """Where a profile of the model with this fingerprint is written, and found again."""
    return user_directory() / f"{fingerprint}{SUFFIXES[0]}"


def load_profile(path: str | Path) -> HeadProfile:
    """Read a profile from its file; a .json may also be of the published format (see published.py).

    Raises:
        ValueError: no such file, not a profile, or a damaged one.
    """
    source = Path(path).expanduser()
    check_suffix(source)
    if not source.is_file():
        raise ValueError(f"profile={path}: no such file; make one: python run.py runner=profile model=...")
    try:
        header, scores = read_parts(source)
        if "classification_matrix" in header:
            return from_published(header, source.name)
        return assemble(header, scores)
    except (LookupError, TypeError, AttributeError, ValueError, OSError, SafetensorError) as error:
        raise ValueError(f"profile={path} can't be read as a head profile: {error}") from error


def find_profile(geometry: Geometry, model: str = "...") -> HeadProfile:
    """The profile of the model with this geometry and fingerprint.

    Args:
        model: what the user calls the model, for the message.

    Raises:
        ProfileNotFound: none; the message has the command that makes one.
    """
    fingerprint = geometry.fingerprint
    for path in _candidates(fingerprint) if fingerprint else []:
        if path.is_file():
            profile = load_profile(path)
            if profile.fingerprint == fingerprint:
                profile.check(geometry)
                return profile
    raise ProfileNotFound(
        f"no head profile for this model (weights {fingerprint or 'unknown'}) in {user_directory()}; "
        f"make one, once: python run.py runner=profile model={model}"
    )


def _candidates(fingerprint: str) -> list[Path]:
    names = [(user_directory(), fingerprint), (SHIPPED, "profile"), (SHIPPED, fingerprint)]
    return [directory / f"{name}{suffix}" for directory, name in names for suffix in SUFFIXES]
