"""What to train on, and how fast, as training goes on: a ladder of lengths for each kind of question.

Recall must first be found on short rows, then carried to longer ones; every kind climbs by its own held-out
accuracy, `single` first. Knows no model: accuracies come in, lengths and rates go out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from hcache.tiny.text import KINDS

CAPS = (512, 1024, 4096, 12288)  # longest row at each level
TOP = len(CAPS) - 1
MIXES: tuple[dict[int, float], ...] = (
    {256: 0.2, 512: 0.4, 1024: 0.4},
    {256: 0.35, 512: 0.25, 1024: 0.4},
    {256: 0.1, 512: 0.15, 1024: 0.2, 2048: 0.2, 4096: 0.35},
    {256: 0.06, 512: 0.1, 1024: 0.14, 2048: 0.16, 4096: 0.2, 8192: 0.22, 12288: 0.12},
)
PROMOTE = {"single": 0.9, "multi": 0.85, "chain": 0.85}
FORCED = (0.2, 0.27, 0.36)  # shares of the whole training after which a level is left in any case
WARMUP_STEPS = 300
PEAK_RATE = 1e-3
LAST_RATE = 0.03  # of the peak
DECAY_FROM = 0.79


@dataclass
class Ladder:
    """The level of each kind; -1 is not yet asked."""

    levels: dict[str, int] = field(
        default_factory=lambda: {kind: 0 if kind == "single" else -1 for kind in KINDS}
    )

    def length(self, rng: Random) -> int:
        """A row length for the next step."""
        mix = MIXES[self.levels["single"]]
        return rng.choices(list(mix), list(mix.values()))[0]

    def kinds(self, length: int) -> tuple[str, ...]:
        """The kinds that rows of this length may ask."""
        allowed = tuple(k for k in KINDS if self.levels[k] >= 0 and CAPS[self.levels[k]] >= length)
        return allowed or ("single",)

    def tested(self) -> dict[str, int]:
        """The kinds still climbing, each with the length that decides on its next level."""
        return {kind: CAPS[level] for kind, level in self.levels.items() if 0 <= level < TOP}

    def climb(self, accuracy: dict[str, float], progress: float) -> list[str]:
        """Promote the kinds whose held-out accuracy suffices, or whose time is up; the names of those."""
        forced = sum(progress >= share for share in FORCED)
        climbed = [k for k, share in accuracy.items() if share >= PROMOTE[k] or self.levels[k] < forced]
        for kind in climbed:
            self.levels[kind] += 1
        if self.levels["single"] > 0:
            joined = [kind for kind, level in self.levels.items() if level < 0]
            self.levels.update(dict.fromkeys(joined, 0))
            climbed += joined
        return climbed

    def batch_tokens(self, most: int) -> int:
        """Bytes of one step: a quarter until recall is found, for more steps a second."""
        return most // 4 if self.levels["single"] == 0 else most

    @property
    def done(self) -> bool:
        """Every kind is asked at every length."""
        return min(self.levels.values()) == TOP


def learning_rate(step: int, progress: float) -> float:
    """Warm-up by steps, then constant, then linear decay over the last fifth of the planned time."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    decay = min(1.0, max(0.0, (progress - DECAY_FROM) / (1 - DECAY_FROM)))
    return PEAK_RATE * warm * (1 - (1 - LAST_RATE) * decay)


def language_weight(progress: float) -> float:
    """.5 while recall is being found, falling to .1 between 30% and 50% of the planned time.

    Text teaches to look back: with .02 models of this size stayed with picking any of the facts.
    """
    return 0.5 - 0.4 * min(1.0, max(0.0, (progress - 0.3) / 0.2))
