"""Quest's kernels: against plain torch on tensors, and against the same steps without them.

pytest -m gpu tests/test_bounds.py                        # on a CUDA device
TRITON_INTERPRET=1 pytest -m gpu tests/test_bounds.py     # without; Triton must be installed
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hcache import Budget, Geometry
from hcache.attention.backends import BACKENDS
from hcache.methods import quest
from hcache.methods.quest import Quest, QuestGroup, QuestLayer, both_signs
from tests.on_kernels import kernel_device
from tests.padding import Qkv, left_padded

pytestmark = pytest.mark.gpu

DIM, HEADS, SHARE, PAGE = 24, 2, 3, 4


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    device = kernel_device(monkeypatch)
    from hcache.kernels import bounds

    monkeypatch.setattr(bounds, "TILE", 16)
    return device


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("choosers", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_is_taken_in(dtype: torch.dtype, choosers: int, device: str) -> None:
    """Into a page that has begun, a new one, and the first of all; rows of k and v are strided."""
    from hcache.kernels.bounds import take_in

    lengths, allowed, room, group = [6, 8, 0, 31], [2, 5, 3, 4], 8, 3
    first = torch.tensor([0, 40, 80, 120])
    q, bounds = normal(4, group, DIM, seed=1).to(dtype), normal(4, room, 2 * DIM, seed=2).to(dtype)
    k, v = normal(2, 4, 2, DIM, seed=3).to(dtype)[:, :, 1]
    for s, length in enumerate(lengths):
        bounds[s, -(-length // PAGE) :] = -torch.inf
    expected = bounds.clone()
    for s, length in enumerate(lengths):
        expected[s, length // PAGE] = torch.maximum(expected[s, length // PAGE], both_signs(k[s]))
    keys, values = torch.zeros(2, 160, DIM, dtype=dtype, device=device)
    grown = torch.tensor(lengths, dtype=torch.int32, device=device)
    allowed_R = torch.tensor(allowed).repeat_interleave(choosers)
    limits_R, there = torch.zeros_like(allowed_R, device=device), bounds.to(device)
    rows, earlier, pages = take_in(
        q.to(device), k.to(device), v.to(device), keys, values, first.to(device), grown,
        there, allowed_R.to(device), limits_R, PAGE,
    )  # fmt: skip
    assert torch.equal(there.cpu(), expected)
    assert torch.equal(rows.cpu(), both_signs(q).relu())
    assert grown.tolist() == [length + 1 for length in lengths]
    last = [length // PAGE for length in lengths]
    assert earlier.tolist() == last
    chosen = [min(most, before + 1) for most, before in zip(allowed, last, strict=True)]
    assert pages.view(4, choosers).tolist() == [[count] * choosers for count in chosen]
    tokens = [(c - 1) * PAGE + n % PAGE + 1 for c, n in zip(chosen, lengths, strict=True)]
    assert limits_R.view(4, choosers).tolist() == [[count] * choosers for count in tokens]
    slots = first + torch.tensor(lengths)
    for buffer, token in ((keys, k), (values, v)):
        assert torch.equal(buffer.cpu()[slots], token)
        assert buffer.count_nonzero() == token.count_nonzero()


@pytest.mark.parametrize("kind", ["softmax", "mean", "max", "each"])
@pytest.mark.parametrize("group", [1, 3])
def test_pages_are_worth_what_plain_torch_says(kind: str, group: int, device: str) -> None:
    from hcache.kernels.bounds import Worth, worth_of

    room, earlier = 45, [0, 1, 16, 37, 44]
    scores = 20 * normal(5, group, room, seed=4)
    for s, count in enumerate(earlier):
        scores[s, :, count:] = -torch.inf
    expected = {
        "softmax": scores.log_softmax(-1).amax(1),
        "mean": scores.mean(1),
        "max": scores.amax(1),
        "each": scores.flatten(0, 1),
    }[kind]
    counts = torch.tensor(earlier, dtype=torch.int32, device=device)
    worth = worth_of(scores.to(device), counts, Worth[kind]).cpu()
    for row, (ours, theirs) in enumerate(zip(worth, expected, strict=True)):
        count = earlier[row // (len(worth) // 5)]
        torch.testing.assert_close(ours[:count], theirs[:count])
        assert ours[count] == torch.inf
        assert (ours[count + 1 :] == -torch.inf).all()


# Against plain torch


def prompt_of(tokens: int) -> Qkv:
    q, k, v = (normal(heads, tokens, DIM, seed=tokens + heads) for heads in (HEADS * SHARE, HEADS, HEADS))
    return q, k, v + 1


def layer_of(lengths: list[int], budget: float | int, group: QuestGroup, device: str) -> QuestLayer:
    shape = Geometry(layers=1, query_heads=HEADS * SHARE, kv_heads=HEADS, head_dim=DIM)
    (state,) = Quest(page_size=PAGE, group=group).layers(shape, Budget.of(budget), lengths)
    assert isinstance(state, QuestLayer)
    state.backend, state.reserve_tokens = BACKENDS["sdpa"], 3
    state.prefill(*(x.to(device) for x in left_padded([prompt_of(n) for n in lengths])))
    return state


@pytest.mark.parametrize("budget", [0.3, 1000], ids=["choosing", "everything"])
@pytest.mark.parametrize("group", list(QuestGroup))
def test_steps_by_kernels_are_those_of_plain_torch(
    group: QuestGroup, budget: float | int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New pages, growth, a follow-up, a step with a token left out; outputs and chosen pages."""
    lengths, kernels = [61, 130, 7], [False]
    if budget == 0.3:
        lengths[2] = 90
    monkeypatch.setattr(quest, "fused", lambda x: kernels[0])
    plain, fast = (layer_of(lengths, budget, group, where) for where in ("cpu", device))
    for t in range(12):
        tokens = 5 if t == 6 else 1
        q, k, v = (normal(3, heads, tokens, DIM, seed=50 * t + heads) for heads in (6, 2, 2))
        real = torch.tensor([[True], [False], [True]]) if t == 3 else None
        outs = []
        for state, where, kernels[0] in ((plain, "cpu", False), (fast, device, True)):
            step = state.step if tokens == 1 else state.extend
            out = step(*(x.to(where) for x in (q, k, v)), None if real is None else real.to(where))
            outs.append(out.cpu()[slice(None) if real is None else real[:, 0]])
        torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(plain.kept(), fast.kept(), strict=True):
            assert [head.tolist() for head in ours] == [head.tolist() for head in theirs]
        assert torch.equal(plain._bounds_SP2D, fast._bounds_SP2D.cpu())
        assert torch.equal(plain._limits_R, fast._limits_R.cpu())
        assert plain.nbytes() == fast.nbytes()
