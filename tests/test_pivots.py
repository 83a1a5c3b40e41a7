"""Kernels of HeteroCache's pivots against plain torch: on a GPU, or on a CPU under Triton's interpreter.

pytest -m gpu tests/test_pivots.py                        # on a CUDA device
TRITON_INTERPRET=1 pytest -m gpu tests/test_pivots.py     # without; Triton must be installed
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hcache.cache.room import Room
from hcache.methods import drift
from hcache.methods.drift import BEHIND, DriftRule
from hcache.scoring import Group, Pooling, top_positions
from tests import test_kernels
from tests.test_heterocache import random_prompt, two_pivots

pytestmark = pytest.mark.gpu

device = test_kernels.device

STEPS = 5


def rule(**fields: object) -> DriftRule:
    values = {
        "window": 1,
        "kernel": 5,
        "pooling": Pooling.avg,
        "group": Group.max,
        "steps": STEPS,
        "threshold": 0.5,
        "visible_after": 1,
    }
    return DriftRule(**{**values, **fields})  # type: ignore[arg-type]


def logits_of(tokens: list[int], width: int, steps: int = STEPS, heads: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(len(tokens), steps, heads, width, generator=generator)
    behind = torch.arange(width) >= torch.tensor(tokens).view(-1, 1, 1, 1)
    return logits.masked_fill(behind, -torch.inf)


def parts_of(logits_PWGN: Tensor, block: int = 64) -> Tensor:
    """What a scan says of each block: its maximum, and the sum of exponentials below that."""
    rows_PRN = logits_PWGN.flatten(1, 2)
    missing = -rows_PRN.shape[-1] % block
    blocks = torch.nn.functional.pad(rows_PRN, (0, missing), value=-torch.inf).unflatten(-1, (-1, block))
    peaks = blocks.amax(-1)
    below = blocks - peaks.masked_fill(peaks == -torch.inf, 0).unsqueeze(-1)
    return torch.stack([peaks, below.exp().sum(-1)])


@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("group", list(Group))
@pytest.mark.parametrize("kernel", [1, 5])
def test_scores_are_those_of_the_rule(device: str, pooling: Pooling, group: Group, kernel: int) -> None:
    from hcache.kernels import pivots

    tokens, width, how = [4100, 9, 50, 1300], 4200, rule(pooling=pooling, group=group, kernel=kernel)
    logits = logits_of(tokens, width)
    histograms = torch.zeros(len(tokens) * STEPS, pivots.HISTOGRAMS, dtype=torch.int32, device=device)
    full = torch.tensor([True, True, False, True], device=device)
    scores = pivots.smooth(
        logits.to(device),
        parts_of(logits).to(device),
        torch.tensor(tokens, device=device),
        full,
        histograms,
        kernel=kernel,
        average=pooling is Pooling.avg,
        group=group.value,
    )
    counted = histograms.view(len(tokens), STEPS, -1).cpu()
    assert (counted[..., pivots.BINS :] == 0).all()
    for p, n in enumerate(tokens):
        if not full[p]:
            assert (counted[p] == 0).all()
            continue
        for w, row in enumerate(scores[p, :, :n].cpu()):
            digits = row.view(torch.int32) >> 23
            assert torch.equal(counted[p, w, : pivots.BINS], digits.bincount(minlength=pivots.BINS))
        alone = logits[p, ..., :n].softmax(-1)
        torch.testing.assert_close(scores[p, :, :n].cpu(), how.smooth(alone), rtol=1e-5, atol=1e-9)
        assert (scores[p, :, n:] == BEHIND).all()


class Scene:
    """Pivots with references and satellites; scores are given, as exact logarithms of shares."""

    def __init__(self, tokens: list[int], width: int, steps: int = STEPS, seed: int = 0) -> None:
        self.tokens, self.width, self.steps = tokens, width, steps
        self.generator = torch.Generator().manual_seed(seed)
        self.base = [max(1, n // 3) for n in tokens]
        # Few different scores, so that ties are many: pooling of width 1 leaves them as they are.
        self.logits = logits_of(tokens, width, steps, heads=1, seed=seed).round()
        self.sizes = [n - 1 if i % 2 else n // 5 for i, n in enumerate(tokens)] + [0, 3]
        self.pivot = [*range(len(tokens)), 0, 0]
        self.full = [p % 3 != 1 for p in range(len(tokens))]
        self.reference = torch.zeros(len(tokens), width, dtype=torch.bool)
        for p, base in enumerate(self.base):
            known = top_positions(self.scores(p)[0], base)
            other = torch.randperm(tokens[p], generator=self.generator)[:base]
            keep = base * (p + 1) // (len(tokens) + 1)
            self.reference[p, torch.cat([known[:keep], other[: base - keep]])] = True
        self.chosen = torch.full((len(self.sizes), max(self.sizes) + 2), -7, dtype=torch.int32)
        self.windows = torch.arange(len(tokens))

    def scores(self, p: int) -> Tensor:
        """[W, n]."""
        return self.logits[p, :, 0, : self.tokens[p]].softmax(-1)

    def expected(self, threshold: float, every: int | None) -> tuple[list[bool], Tensor, Tensor, list[int]]:
        """Drifts, references, positions and fresh rows, one by one."""
        reference, chosen = self.reference.clone(), self.chosen.clone()
        drifted = []
        for p, base in enumerate(self.base):
            tops = [top_positions(row, base) for row in self.scores(p)]
            shares = torch.tensor([self.reference[p, top].float().mean().item() for top in tops])
            low = shares.sort().values[[(self.steps - 1) // 2, self.steps // 2]].mean() < threshold
            if every is not None:
                low = torch.tensor(every > 0 and (p + self.full[p]) % every == 0)
            drifted.append(bool(low) and self.full[p])
            if drifted[p]:
                reference[p] = False
                reference[p, tops[-1]] = True
        fresh = [size if drifted[p] else 0 for p, size in zip(self.pivot, self.sizes, strict=True)]
        for q, (p, count) in enumerate(zip(self.pivot, fresh, strict=True)):
            chosen[q, :count] = top_positions(self.scores(p)[-1], count).int()
        return drifted, reference, chosen, fresh


@pytest.mark.parametrize("steps", [1, 4, 5])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.75, 1.01])
def test_a_review_decides_and_chooses_as_sorting_does(device: str, steps: int, threshold: float) -> None:
    check_review(device, Scene([9000, 60, 500, 4097], 9100, steps), threshold, None)


def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two(device: str) -> None:
    """Thresholds just above and below it, between the two; and at it, which is no drift."""
    scene = Scene([500, 300], 512, steps=4)
    tops = [top_positions(row, scene.base[0]) for row in scene.scores(0)]
    shares = sorted(scene.reference[0, top].float().mean().item() for top in tops)
    middle = (shares[1] + shares[2]) / 2
    assert shares[1] < middle - 1e-4
    for threshold, drifts in ((middle + 1e-4, True), (middle, False), (middle - 1e-4, False)):
        assert scene.expected(threshold, None)[0][0] == drifts
        check_review(device, scene, threshold, None)


@pytest.mark.parametrize("every", [0, 1, 2, 3])
def test_every_so_many_th_window_drifts_whatever_the_overlap(device: str, every: int) -> None:
    check_review(device, Scene([60, 50, 40, 30, 20, 10], 64), 0.5, every)


@pytest.mark.parametrize("level", [0.0, 2.0])
def test_scores_that_are_all_alike_or_nearly_so(device: str, level: float) -> None:
    """All of a chunk in one value of a digit; a third of them differ in their last bits only."""
    scene = Scene([9000, 4097], 9100)
    scene.logits = torch.where(scene.logits > -torch.inf, level, -torch.inf)
    scene.logits[..., 1::3] += torch.where(scene.logits[..., 1::3] > -torch.inf, 1e-6 * level, 0)
    for threshold in (0.2, 0.5, 1.01):
        check_review(device, scene, threshold, None)


def check_review(device: str, scene: Scene, threshold: float, every: int | None) -> None:
    from hcache.kernels import pivots

    def there(numbers: list[int] | Tensor) -> Tensor:
        return torch.as_tensor(numbers).to(device, copy=True)

    reference, chosen, windows = there(scene.reference), there(scene.chosen), there(scene.windows)
    triggers, full = torch.zeros_like(windows), there(torch.tensor(scene.full))
    coming = torch.arange(len(scene.sizes), device=device) == 1
    fresh = pivots.review(
        there(scene.logits), there(parts_of(scene.logits)), there(scene.tokens), there(scene.base),
        there(scene.pivot), there(scene.sizes), full, reference, chosen, windows, triggers, coming,
        kernel=1, average=True, group="max", threshold=threshold, every=every,
    )  # fmt: skip
    expected = scene.expected(threshold, every)
    assert triggers.tolist() == expected[0]
    assert torch.equal(reference.cpu(), expected[1])
    assert torch.equal(chosen.cpu(), expected[2])
    assert fresh.tolist() == expected[3]
    assert coming.tolist() == [count > 0 or q == 1 for q, count in enumerate(expected[3])]
    assert not full.any()
    assert windows.tolist() == [n + full for n, full in zip(scene.windows.tolist(), scene.full, strict=True)]


def test_queries_are_collected_and_whole_windows_set_aside(device: str) -> None:
    """Two pivots of two sequences whose windows end at different steps."""
    from hcache.kernels import pivots

    tokens, segments = torch.tensor([10, 20]), torch.tensor([1, 2])
    lengths = torch.tensor([0, 10, 22, 0], dtype=torch.int32)  # the second is two tokens ahead
    queries, finished = (torch.zeros(2, 3, 2, 8, device=device) for _ in range(2))
    full = torch.zeros(2, dtype=torch.bool, device=device)
    history = torch.randn(9, 4, 2, 8, generator=torch.Generator().manual_seed(0))
    for t, q in enumerate(history):
        lengths += 1
        before, was_full = finished.clone(), full.clone()
        pivots.observe(
            q.view(2, 4, 1, 8).to(device), lengths.to(device), segments.to(device), tokens.to(device),
            queries, finished, full,
        )  # fmt: skip
        for p, ahead in enumerate((0, 2)):
            if (t + 1 + ahead) % 3 == 0 and t >= 2:
                assert torch.equal(finished[p].cpu(), history[t - 2 : t + 1, segments[p]])
                assert full[p]
                full[p] = False
            elif (t + 1 + ahead) % 3:
                assert torch.equal(finished[p], before[p])
                assert full[p] == was_full[p]


@pytest.mark.parametrize(("visible_after", "uneven"), [(1, False), (3, False), (3, True)])
def test_a_layer_does_the_same_with_kernels_and_without(
    device: str, visible_after: int, uneven: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one device, so that nothing but the pivots' own work differs; more query rows than a scan takes.

    With `uneven`, the second sequence misses every third token.
    """
    monkeypatch.setattr(drift, "MOST_ROWS", 4)
    prompts = [random_prompt(tokens, seed=tokens) for tokens in (100, 70)]
    tokens = [[x[:, :, 0:1].to(device) for x in random_prompt(1, 100 + t)] for t in range(18)]
    for prompt in prompts:
        states = [two_pivots(Room(), [x.to(device) for x in prompt], visible_after) for _ in range(2)]
        for t, token in enumerate(tokens):
            real = torch.tensor([[True], [t % 3 != 1]], device=device) if uneven else None
            outs = []
            for with_kernels, state in enumerate(states):
                monkeypatch.setattr(drift, "fused", lambda x, on=bool(with_kernels): on)
                outs.append(state.step(*token, real))
            assert torch.equal(*outs)
            plain, ours = ([[h.tolist() for h in s] for s in state.kept()] for state in states)
            assert plain == ours
        assert states[0].counters() == states[1].counters()
        assert states[0].counters()["triggers"] > 0
