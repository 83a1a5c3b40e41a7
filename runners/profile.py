"""runner=profile: take the head profile of a model and put it where methods find it by themselves.

Texts are read before the model loads. Beside the profile lies a picture of its roles, layer by head.
Knows no method; which roles a method makes of the scores is the method's business.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from hcache.models import LoadedModel, load
from hcache.profiling import HeadProfile, Role, Roles, profile_heads
from hcache.profiling.library import default_path
from hcache.profiling.profile import SIMILARITY_THRESHOLD, STABLE_THRESHOLD, check_suffix
from hcache.scoring import Group
from runners import CellOutcome
from runners.config import ConfigError, RunConfig, one_line

log = logging.getLogger(__name__)
CALIBRATION = Path(__file__).resolve().parent.parent / "hcache" / "profiling" / "calibration.txt"
_COLOURS = {
    Role.ANCHOR: "#4477aa",
    Role.VOLATILE: "#ee6677",
    Role.PIVOT: "#ccbb44",
    Role.SATELLITE: "#bbbbbb",
}


@dataclass
class ProfileRunner:
    """Settings of runner=profile, the section `profile` of the configuration.

    Args:
        text: file with the calibration text; None takes the one that ships.
        texts: several files instead; their statistics are pooled.
        prompt_tokens: tokens taken from the start of each text.
        decode_steps: tokens generated after each text.
        topk: positions in a head's set.
        kernel: width of the smoothing of attention, odd.
        group: how query heads of one KV head are joined.
        stable_threshold, similarity_threshold: stored as the profile's own, which methods take where they set
            none.
        out: where the profile goes (.safetensors or .json); None takes the user's profile directory.
    """

    text: str | None = None
    texts: list[str] = field(default_factory=list)
    prompt_tokens: int = 5000
    decode_steps: int = 100
    topk: int = 1024
    kernel: int = 5
    group: Group = Group.mean
    stable_threshold: float = STABLE_THRESHOLD
    similarity_threshold: float = SIMILARITY_THRESHOLD
    out: str | None = None

    def __post_init__(self) -> None:
        for key in ("prompt_tokens", "decode_steps", "topk"):
            if getattr(self, key) < 1:
                raise ConfigError(f"profile.{key}={getattr(self, key)} must be at least 1")
        for key in ("stable_threshold", "similarity_threshold"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"profile.{key}={getattr(self, key)} must be between 0 and 1 (an overlap)")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(f"profile.kernel={self.kernel} must be odd and at least 1")
        if self.text is not None and self.texts:
            raise ConfigError("set profile.text or profile.texts, not both")


def run(run: RunConfig) -> CellOutcome:
    """Profile the model; the outcome's message says what was found and where it lies."""
    try:
        return CellOutcome("completed", message=_profile(run))
    except (ValueError, OSError) as error:
        return CellOutcome("failed", message=f"runner=profile: {error}")
    except Exception as error:  # an outcome, never an exception, goes to the launcher
        log.exception("runner=profile failed")
        return CellOutcome("failed", message=f"runner=profile: {type(error).__name__}: {error}")


def settings_of(section: Any) -> ProfileRunner:
    """The section `profile` as typed settings. Raises ConfigError for an unknown key or a wrong value."""
    if isinstance(section, ProfileRunner):
        return section
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ProfileRunner), section or {}))
    except OmegaConfBaseException as error:
        raise ConfigError(f"profile: {one_line(error)}") from error
    assert isinstance(typed, ProfileRunner)
    return typed


def _profile(run: RunConfig) -> str:
    settings = settings_of(run.profile)
    texts = _read(settings)
    if settings.out is not None:
        check_suffix(Path(settings.out))
    if run.runtime.threads is not None:
        torch.set_num_threads(run.runtime.threads)
    disable_progress_bar()  # transformers' own, of the weights
    loaded = load(run.model, run.runtime.device)
    out = _place(settings, loaded)
    prompts = [_encode(name, text, loaded, settings.prompt_tokens) for name, text in texts.items()]
    log.info("profiling %s: %s prompt tokens, %d steps", loaded.name, _sizes(prompts), settings.decode_steps)
    profile = profile_heads(
        loaded.model,
        prompts,
        settings.decode_steps,
        settings.topk,
        kernel=settings.kernel,
        group=settings.group,
    )
    profile = _finish(profile, loaded, settings, list(texts))
    profile.save(out)
    return _report(profile.roles(), loaded, out)


def _read(settings: ProfileRunner) -> dict[str, str]:
    """The texts by their files' names. Raises ConfigError for a file that isn't there or isn't text."""
    files = settings.texts or [settings.text or str(CALIBRATION)]
    texts = {}
    for name in files:
        try:
            texts[name] = Path(name).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"profile.text={name} can't be read as a text file ({error})") from error
        if not texts[name].strip():
            raise ConfigError(f"profile.text={name} is empty")
    return texts


def _place(settings: ProfileRunner, loaded: LoadedModel) -> Path:
    if settings.out is not None:
        return Path(settings.out).expanduser()
    if loaded.fingerprint is None:
        raise ConfigError(
            f"{loaded.name} has no fingerprint to file its profile under; set profile.out=FILE.safetensors "
            "and use it with method.profile=FILE.safetensors"
        )
    return default_path(loaded.fingerprint)


def _encode(name: str, text: str, loaded: LoadedModel, tokens: int) -> Tensor:
    # verbose would warn that the whole text exceeds the model's window; only its start is used.
    ids = loaded.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    if len(ids) < tokens:
        log.warning(
            "%s has %d tokens, fewer than profile.prompt_tokens=%d; all are used", name, len(ids), tokens
        )
    return ids[:tokens]


def _sizes(prompts: list[Tensor]) -> str:
    return ", ".join(str(len(prompt)) for prompt in prompts)


def _finish(
    profile: HeadProfile, loaded: LoadedModel, settings: ProfileRunner, texts: list[str]
) -> HeadProfile:
    """With its thresholds, the names of model and texts, and the fingerprint of offloaded weights too."""
    facts: Mapping[str, Any] = {
        "model": loaded.name,
        "files": [Path(name).name for name in texts],
        "stable_threshold": settings.stable_threshold,
        "similarity_threshold": settings.similarity_threshold,
    }
    return dataclasses.replace(
        profile, fingerprint=loaded.fingerprint, settings={**facts, **profile.settings}
    )


def _report(roles: Roles, loaded: LoadedModel, out: Path) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in roles.counts.items())
    share = roles.full_heads / (roles.layers * roles.kv_heads)
    picture = draw_roles(roles, loaded.name, out.with_suffix(".png"))
    shown = f", roles drawn in {picture}" if picture else ""
    return f"{loaded.name}: {counts} ({share:.1%} of heads keep full KV); written to {out}{shown}"


def draw_roles(roles: Roles, title: str, path: Path) -> Path | None:
    """A picture of the roles, layer by head, as PNG; None (and a log line) without matplotlib."""
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        log.warning("no picture of the roles: matplotlib is not installed (pip install 'hcache[analysis]')")
        return None
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it reports its font cache as news
    figure = Figure(figsize=(2.5 + 0.3 * roles.kv_heads, 1.5 + 0.22 * roles.layers), layout="constrained")
    axes = figure.subplots()
    codes = [[int(role) for role in row] for row in roles.matrix]
    axes.imshow(codes, cmap=ListedColormap(list(_COLOURS.values())), vmin=0.5, vmax=4.5, aspect="auto")
    axes.set(title=title, xlabel="KV head", ylabel="layer", xticks=range(roles.kv_heads))
    counts = roles.counts
    handles = [Patch(color=_COLOURS[role], label=f"{name} ({counts[name]})") for role, name in _names()]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)
    return path


def _names() -> list[tuple[Role, str]]:
    return [(role, role.name.lower()) for role in Role]
