"""How a task of lm-evaluation-harness wants text generated, in the Generator's terms.

What the Generator doesn't have and what would change the text is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DEFAULT_NEW_TOKENS = 256
"""Where a task doesn't say; the library's own default."""

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of one setting; the library takes the first that is there."""

KNOWN = (*LIMITS, "until", "do_sample", "temperature", "top_p")
# Settings with which a value changes nothing: in any decoding, and in greedy decoding only.
_NEUTRAL = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1,),
    "use_cache": (True,),
    "top_k": (None, 0, -1),
    "min_p": (None, 0),
    "typical_p": (None, 1),
}
_SAMPLING = ("top_k", "min_p", "typical_p")


@dataclass(frozen=True)
class Wish:
    """What one generate_until request asks for.

    Args:
        max_new_tokens: most tokens.
        stop: texts that end the answer; it is cut at the first of them.
        temperature, top_p: as hcache.tape.Sampling; 0 and 1 are greedy.
    """

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0

    def cut(self, text: str) -> str:
        """The text before the first stop text."""
        for stop in self.stop:
            text = text.split(stop, 1)[0]
        return text


def wish_of(asked: Mapping[str, Any], task: str) -> Wish:
    """A request's generation_kwargs.

    Args:
        asked: as the library hands them over.
        task: named in messages.

    Raises:
        ValueError: a setting the Generator doesn't have, or one that can't be.
    """
    temperature = _temperature(asked, task)
    for key in asked:
        _check(key, asked[key], temperature == 0, task)
    limits = [asked[key] for key in LIMITS if asked.get(key) is not None]
    most = int(limits[0]) if limits else DEFAULT_NEW_TOKENS
    if most < 1:
        raise ValueError(f"task {task}: max_gen_toks={most} must be at least 1")
    until = asked.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    top_p = asked.get("top_p")
    sampled = 1.0 if temperature == 0 or top_p is None else float(top_p)
    return Wish(most, tuple(text for text in stop if text), temperature, sampled)


def _temperature(asked: Mapping[str, Any], task: str) -> float:
    """0 where a task doesn't sample; as in the library, a temperature alone asks for sampling too."""
    sample, given = asked.get("do_sample"), float(asked.get("temperature") or 0.0)
    if sample is False:
        return 0.0
    if given < 0 or (sample and not given):
        raise ValueError(
            f"task {task}: do_sample={sample} needs a temperature above 0, it is {given:g}; "
            "set benchmark.gen_kwargs='temperature=1.0' or 'do_sample=false'"
        )
    return given


def _check(key: str, value: Any, greedy: bool, task: str) -> None:
    neutral = key in _NEUTRAL and value in _NEUTRAL[key]
    if key in KNOWN or neutral or (greedy and key in _SAMPLING):
        return
    raise ValueError(
        f"task {task} asks for {key}={value!r}, which the Generator doesn't have (it has {LIMITS[0]}, "
        f"{', '.join(KNOWN[len(LIMITS) :])}); set another value with benchmark.gen_kwargs, or leave the "
        "task out"
    )
