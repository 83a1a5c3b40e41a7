"""Quest against a slow reference: pages, bounds, selection, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hcache import Budget, Generator, Geometry, InfeasibleBudget, KVCache
from hcache.attention.backends import BACKENDS, CHUNK
from hcache.cache.state import LayerState, StoreLayer
from hcache.contract.masked import attend_to
from hcache.contract.tiny_models import prompts as random_ids
from hcache.contract.tiny_models import tiny_model
from hcache.methods import quest
from hcache.methods.quest import Quest, QuestGroup, QuestLayer, page_bounds
from tests.operations import Operations
from tests.padding import Qkv, left_padded

DIM, HEADS, SHARE, PAGE = 16, 2, 2, 8
GROUPS = list(QuestGroup)


def geometry(layers: int = 1, heads: int = HEADS, share: int = SHARE, dim: int = DIM) -> Geometry:
    return Geometry(layers=layers, query_heads=heads * share, kv_heads=heads, head_dim=dim)


def random_qkv(batch: int, tokens: int, seed: int, heads: int = HEADS, share: int = SHARE) -> Qkv:
    generator = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(batch, heads * share, tokens, DIM, generator=generator)
    k, v = torch.randn(2, batch, heads, tokens, DIM, generator=generator)
    return q, k, v


def token_at(step: int, batch: int = 1, share: int = SHARE) -> Qkv:
    return random_qkv(batch, 1, seed=1000 + step, share=share)


def layer_of(
    lengths: list[int], budget: int | float, share: int = SHARE, reserve: int = CHUNK, **hyper: Any
) -> QuestLayer:
    method = Quest(**{"page_size": PAGE, **hyper})
    (state,) = method.layers(geometry(share=share), Budget.of(budget), lengths)
    assert isinstance(state, QuestLayer)
    state.backend, state.reserve_tokens = BACKENDS["sdpa"], reserve
    return state


def chosen_pages(q_HqD: Tensor, k_HnD: Tensor, page: int, allowed: int, group: QuestGroup) -> list[list[int]]:
    """Pages of each query head, page by page: the best bounds among the earlier ones, and the current one."""
    share, last = q_HqD.shape[0] // k_HnD.shape[0], (k_HnD.shape[1] - 1) // page
    if last == 0:
        return [[0]] * q_HqD.shape[0]
    bounds = torch.zeros(q_HqD.shape[0], last, dtype=torch.float64)
    for i in range(last):
        keys = k_HnD[:, i * page : (i + 1) * page].double()
        for h, q in enumerate(q_HqD.double()):
            k = keys[h // share]
            bounds[h, i] = torch.maximum(q * k.amax(0), q * k.amin(0)).sum()
    rows = []
    for h in range(q_HqD.shape[0]):
        together = bounds[h // share * share : (h // share + 1) * share]
        worth = {
            QuestGroup.max_softmax: (together / DIM**0.5).softmax(-1).amax(0),
            QuestGroup.mean: together.mean(0),
            QuestGroup.max: together.amax(0),
            QuestGroup.per_query_head: bounds[h],
        }[group].tolist()
        best = sorted(range(last), key=lambda i: (-worth[i], i))
        rows.append([*best[: allowed - 1], last])
    return rows


def attend(q_HqD: Tensor, k_HnD: Tensor, v_HnD: Tensor, pages: list[list[int]], page: int) -> Tensor:
    """Each query head over its own pages, by a mask."""
    share = q_HqD.shape[0] // k_HnD.shape[0]
    visible = torch.zeros(q_HqD.shape[0], k_HnD.shape[1], dtype=torch.bool)
    for h, chosen in enumerate(pages):
        for i in chosen:
            visible[h, i * page : (i + 1) * page] = True
    return attend_to(q_HqD, k_HnD.repeat_interleave(share, 0), v_HnD.repeat_interleave(share, 0), visible)


class Sequence:
    """What one sequence has been fed, and what its latest token attends to."""

    def __init__(self, prompt: Qkv, allowed: int, group: QuestGroup = GROUPS[0], page: int = PAGE) -> None:
        self.q, self.k, self.v = prompt
        self.prompt, self.allowed, self.group, self.page = self.k.shape[1], allowed, group, page
        self.choose()

    def choose(self) -> None:
        self.pages = chosen_pages(self.q[:, -1], self.k, self.page, self.allowed, self.group)

    def append(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        pairs = zip((self.q, self.k, self.v), (q, k, v), strict=True)
        self.q, self.k, self.v = (torch.cat([old, new], 1) for old, new in pairs)

    def feed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append one token; its output [Hq, D]."""
        self.append(q, k, v)
        self.choose()
        return attend(self.q[:, -1], self.k, self.v, self.pages, self.page)

    def kept(self) -> list[list[int]]:
        """Prompt positions of each KV head, those of its query heads together."""
        share = self.q.shape[0] // self.k.shape[0]
        heads = [set().union(*self.pages[h : h + share]) for h in range(0, len(self.pages), share)]
        return [[t for t in range(self.prompt) if t // self.page in head] for head in heads]


def prompt_of(tokens: int, share: int = SHARE) -> Qkv:
    q, k, v = random_qkv(1, tokens, seed=tokens, share=share)
    return q[0], k[0], v[0]


def as_lists(kept: list[list[Tensor]]) -> list[list[list[int]]]:
    return [[head.tolist() for head in sequence] for sequence in kept]


def full_attention(state: StoreLayer, prompt: Qkv, steps: int) -> None:
    """Assert that a prefilled state gives what attention over everything gives, for some steps."""
    _, k, v = prompt
    for t in range(steps):
        q1, k1, v1 = token_at(t)
        k, v = torch.cat([k, k1], 2), torch.cat([v, v1], 2)
        out = state.step(q1, k1, v1, None)
        everything = torch.ones(HEADS, k.shape[2], dtype=torch.bool)
        torch.testing.assert_close(
            out[0, :, 0], attend_to(q1[0, :, 0], k[0], v[0], everything), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(("page", "steps"), [(1, 6), (8, 18), (16, 34)])
@pytest.mark.parametrize("group", GROUPS)
def test_every_step_attends_as_the_slow_reference_does(group: QuestGroup, page: int, steps: int) -> None:
    """Sequences of different lengths and budgets in one batch, page rollover, growth, tokens left out."""
    lengths = [70, 131, 64]
    prompts = [prompt_of(n) for n in lengths]
    sequences = [Sequence(p, n // 2 // page, group, page) for p, n in zip(prompts, lengths, strict=True)]
    state = layer_of(lengths, 0.5, reserve=5, page_size=page, group=group)
    state.prefill(*left_padded(prompts))
    assert as_lists(state.kept()) == [s.kept() for s in sequences]
    for t in range(steps):
        token = token_at(t, batch=3)
        real = torch.tensor([[t % 3 > 0], [t % 4 > 0], [True]])
        for x in token:
            x[~real[:, 0]] = torch.nan
        out = state.step(*token, real)
        for b in real[:, 0].nonzero()[:, 0].tolist():
            expected = sequences[b].feed(*(x[b] for x in token))
            torch.testing.assert_close(out[b, :, 0], expected, rtol=1e-4, atol=1e-5)
        assert as_lists(state.kept()) == [s.kept() for s in sequences]


def test_with_one_query_head_a_kv_head_all_groups_choose_the_same_pages() -> None:
    q, k, v = random_qkv(1, 200, seed=3, share=1)
    chosen = []
    for group in GROUPS:
        state = layer_of([200], 80, share=1, group=group)
        state.prefill(40 * q, k, v, None)  # shares that all but one page round to zero
        chosen.append(as_lists(state.kept()))
    assert all(pages == chosen[0] for pages in chosen)


def test_bounds_are_above_every_logit_of_their_page_and_equal_it_for_single_tokens() -> None:
    q, k, v = random_qkv(1, 100, seed=1)
    logits = q[0, :, -1].unflatten(0, (HEADS, SHARE)) @ k[0].transpose(1, 2)
    for page in (1, 4, 16):
        state = layer_of([100], 50, page_size=page, group=QuestGroup.per_query_head)
        state.prefill(q, k, v, None)
        whole = 100 // page
        everything = torch.full((HEADS,), whole)
        scores = state._scores(q[:, :, -1], everything)[:, :whole]
        best = logits[..., : whole * page].unflatten(-1, (whole, page)).amax(-1).flatten(0, 1)
        assert (scores >= best - 1e-4).all()
        if page == 1:
            torch.testing.assert_close(scores, best)


@pytest.mark.parametrize("n", [1, 16, 21, 64, 100])
@pytest.mark.parametrize("group", GROUPS)
def test_a_budget_for_everything_is_full_attention(group: QuestGroup, n: int) -> None:
    """kept_tokens for the prompt and 20 tokens more, far more than is ever needed, or all of the prompt."""
    prompt = random_qkv(1, n, seed=n)
    room = -(-n // PAGE) * PAGE - n
    for budget, steps in ((n + 20, 20), (100_000, 20), (1.0, room)):
        state = layer_of([n], budget, group=group)
        state.prefill(*prompt, None)
        assert as_lists(state.kept()) == [[list(range(n))] * HEADS]
        full_attention(state, prompt, steps)
        assert as_lists(state.kept()) == [[list(range(n))] * HEADS]


def test_beyond_a_budget_for_the_prompt_pages_are_left_out() -> None:
    """A layer that has begun without a choice to make grows into one that chooses."""
    prompt = random_qkv(1, 60, seed=2)
    state = layer_of([60], 130, reserve=4)
    state.prefill(*prompt, None)
    sequence = Sequence((prompt[0][0], prompt[1][0], prompt[2][0]), -(-130 // PAGE))
    left_out = 0
    for t in range(160):
        token = token_at(t)
        out = state.step(*token, None)
        expected = sequence.feed(*(x[0] for x in token))
        torch.testing.assert_close(out[0, :, 0], expected, rtol=1e-4, atol=1e-5)
        left_out += as_lists(state.kept())[0] != [list(range(60))] * HEADS
    assert left_out > 30


def test_the_current_page_is_always_attended_to() -> None:
    """And what is attended to is the other pages of the budget, all full, and the current one."""
    n, allowed = 100, 5
    q, k, v = random_qkv(1, n, seed=4)
    state = layer_of([n], allowed * PAGE)
    state.prefill(q, k, v, None)
    for t in range(20):
        q1, _, v1 = token_at(t)
        state.step(q1, -q1[:, ::SHARE], v1, None)  # a current page that no query wants
        last, current = divmod(n + t, PAGE)
        assert state._limits_R.tolist() == [(allowed - 1) * PAGE + current + 1] * HEADS
        for row in state._chosen_RM[:, :allowed].tolist():
            assert row[-1] == last
            assert len(set(row)) == allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bounds_after_any_appends_are_those_from_scratch(dtype: torch.dtype) -> None:
    lengths = [30, 61]
    state = layer_of(lengths, 0.7, reserve=1)
    q, k, v, valid = left_padded([prompt_of(n) for n in lengths])
    state.prefill(q.to(dtype), k.to(dtype), v.to(dtype), valid)
    for t in range(90):
        tokens, real = 1 + 4 * (t % 5 == 4), torch.rand(2, 1 + 4 * (t % 5 == 4)) < 0.8
        q, k, v = (x.to(dtype) for x in random_qkv(2, tokens, seed=t))
        (state.step if tokens == 1 else state.extend)(
            q, k.masked_fill(~real[:, None, :, None], torch.nan), v, real
        )
    for s, length in enumerate(state.store.lengths.tolist()):
        scratch = page_bounds(state.store.read(s, length)[0], PAGE)
        assert scratch.dtype == state._bounds_SP2D.dtype == dtype
        assert torch.equal(state._bounds_SP2D[s, : scratch.shape[0]], scratch)
        assert (state._bounds_SP2D[s, scratch.shape[0] :] == -torch.inf).all()


def test_page_bounds_are_maximum_and_negated_minimum() -> None:
    keys = torch.randn(21, DIM)
    bounds = page_bounds(keys, PAGE)
    for i, rows in enumerate((slice(0, 8), slice(8, 16), slice(16, 21))):
        assert torch.equal(bounds[i], torch.cat([keys[rows].max(0).values, -keys[rows].min(0).values]))
    assert page_bounds(keys[:0], PAGE).shape == (0, 2 * DIM)


@pytest.mark.parametrize(("layers", "skip", "dense"), [(16, None, 2), (15, None, 0), (6, 1, 1), (32, 0, 0)])
def test_the_first_layers_attend_to_everything(layers: int, skip: int | None, dense: int) -> None:
    method = Quest(page_size=PAGE, skip_layers=skip)
    states: list[LayerState] = method.layers(geometry(layers), Budget(kept_tokens=2 * PAGE), [50])
    assert [isinstance(state, QuestLayer) for state in states] == [i >= dense for i in range(layers)]
    for state in states[:dense]:
        prompt = random_qkv(1, 50, seed=5)
        state.backend = BACKENDS["sdpa"]
        state.prefill(*prompt, None)
        assert isinstance(state, StoreLayer)
        full_attention(state, prompt, 4)


@pytest.mark.parametrize("group", GROUPS)
def test_several_tokens_at_once_see_everything(group: QuestGroup) -> None:
    """And the step after them chooses among their pages too."""
    prompt = random_qkv(2, 50, seed=6)
    state = layer_of([50, 50], 0.5, group=group)
    state.prefill(*prompt, None)
    sequences = [Sequence((q, k, v), 25 // PAGE, group) for q, k, v in zip(*prompt, strict=True)]
    valid = torch.tensor([[True, False, True] * 4, [False] * 4 + [True] * 7 + [False]])
    more = random_qkv(2, 12, seed=7)
    out = state.extend(*more, valid)
    for b, sequence in enumerate(sequences):
        for t in valid[b].nonzero()[:, 0].tolist():
            q, k, v = (x[b, :, t : t + 1] for x in more)
            sequence.append(q, k, v)
            everything = torch.ones(HEADS, sequence.k.shape[1], dtype=torch.bool)
            expected = attend_to(q[:, 0], sequence.k, sequence.v, everything)
            torch.testing.assert_close(out[b, :, t], expected, rtol=1e-4, atol=1e-5)
        sequence.choose()
    assert as_lists(state.kept()) == [s.kept() for s in sequences]
    token = token_at(0, batch=2)
    out = state.step(*token, None)
    for b, sequence in enumerate(sequences):
        torch.testing.assert_close(out[b, :, 0], sequence.feed(*(x[b] for x in token)), rtol=1e-4, atol=1e-5)


def test_a_far_key_like_the_query_brings_its_page_with_a_budget_of_two() -> None:
    q, k, v = random_qkv(1, 200, seed=8)
    q1, k1, v1 = token_at(0)
    k[0, :, 83] = 3 * q1[0, ::SHARE, 0]
    state = layer_of([200], 2 * PAGE)
    state.prefill(q, k, v, None)
    state.step(q1, k1, v1, None)
    assert as_lists(state.kept()) == [[list(range(80, 88))] * HEADS]


def test_single_token_pages_are_the_exact_top_tokens() -> None:
    q, k, v = random_qkv(1, 90, seed=9, share=1)
    state = layer_of([90], 30, share=1, page_size=1)
    state.prefill(q, k, v, None)
    for t in range(10):
        q1, k1, v1 = token_at(t, share=1)
        state.step(q1, k1, v1, None)
        logits = (k[0] @ q1[0, :, 0].unsqueeze(-1)).squeeze(-1)
        k = torch.cat([k, k1], 2)
        for h in range(HEADS):
            top = logits[h].sort(descending=True, stable=True).indices[:29]
            assert as_lists(state.kept())[0][h] == top[top < 90].sort().values.tolist()


@pytest.mark.parametrize("group", GROUPS)
def test_equal_pages_are_taken_from_the_front(group: QuestGroup) -> None:
    state = layer_of([100], 4 * PAGE, group=group)
    state.prefill(torch.ones(1, 4, 100, DIM), *torch.ones(2, 1, HEADS, 100, DIM), None)
    assert as_lists(state.kept()) == [[[*range(24), 96, 97, 98, 99]] * HEADS]


def test_a_sequence_is_the_same_alone_and_in_a_batch() -> None:
    lengths, steps = [40, 150, 75], 30
    prompts = [prompt_of(n) for n in lengths]
    together = layer_of(lengths, 0.5)
    together.prefill(*left_padded(prompts))
    outs = [together.step(*token_at(t, batch=3), None) for t in range(steps)]
    for b, n in enumerate(lengths):
        alone = layer_of([n], 0.5)
        alone.prefill(*(x.unsqueeze(0) for x in prompts[b]), None)
        for t in range(steps):
            out = alone.step(*(x[b : b + 1] for x in token_at(t, batch=3)), None)
            torch.testing.assert_close(out[0], outs[t][b], rtol=1e-5, atol=1e-6)
        assert as_lists(alone.kept())[0] == as_lists(together.kept())[b]


@pytest.mark.parametrize("budget", [0.5, 1000], ids=["choosing", "everything"])
@pytest.mark.parametrize("group", GROUPS)
def test_a_step_has_fixed_shapes_and_asks_the_device_for_nothing(
    group: QuestGroup, budget: float | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [60, 93]
    state = layer_of(lengths, budget, group=group)
    state.prefill(*left_padded([prompt_of(n) for n in lengths]))
    monkeypatch.setattr(Tensor, "tolist", None)
    traces = []
    for t in range(2 * PAGE):
        token, real = token_at(t, batch=2), torch.tensor([[True], [t % 2 == 0]])
        with Operations() as operations:
            state.step(*token, real)
        assert operations.synchronised() == []
        traces.append(operations.trace)
    assert all(trace == traces[0] for trace in traces)


def shape_of_the_embedded_model(layers: int = 1) -> Geometry:
    return geometry(layers, heads=4, share=2, dim=32)


def long_prompt(tokens: int) -> Qkv:
    q, k, v = (torch.randn(1, heads, tokens, 32) for heads in (8, 4, 4))
    return q, k, v


@pytest.mark.parametrize("n", [8192, 32768])
@pytest.mark.parametrize(("skip", "charged"), [(0, False), (1, False), (1, True)])
def test_measured_bytes_and_attention_are_those_of_the_plan(n: int, skip: int, charged: bool) -> None:
    method, budget = Quest(skip_layers=skip, charge_skipped=charged), Budget(kept_fraction=0.6)
    shape = shape_of_the_embedded_model(layers=2)
    plan = method.usage(shape, budget, n, 4)
    states = method.layers(shape, budget, [n])
    prompt, measured, attended = long_prompt(n), 0, 0
    for state in states:
        state.backend = BACKENDS["sdpa"]
        state.prefill(*prompt, None)
        device = state.nbytes()["device"]
        measured += device["payload"] + device["metadata"]
        attended += sum(head.numel() for head in state.kept()[0])
        assert sum(state.nbytes()["host"].values()) == 0
    assert measured == pytest.approx(plan.device_bytes, rel=0.01)
    assert attended / shape.heads == plan.attended_tokens
    assert plan.host_bytes == plan.moved_bytes == 0
    assert plan.parts == {"pages": method.pages(shape, budget, n), "dense_layers": skip}
    asked = budget.tokens(n) + (0 if charged or not skip else (n - budget.tokens(n)) / 2)
    assert asked - method.page_size < plan.attended_tokens <= asked


@pytest.mark.parametrize("n", [100, 101, 112])
@pytest.mark.parametrize("tokens", [32, 57, 99, 100, 500])
def test_planned_attention_is_that_of_the_state_for_short_prompts(n: int, tokens: int) -> None:
    method, budget = Quest(page_size=PAGE), Budget(kept_tokens=tokens)
    state = layer_of([n], tokens)
    state.prefill(*random_qkv(1, n, seed=n), None)
    attended = sum(head.numel() for head in state.kept()[0]) / HEADS
    assert method.usage(geometry(), budget, n, 4).attended_tokens == attended


def test_a_long_prompt_makes_no_copy_of_the_layer() -> None:
    """Beside what is kept, a sixteenth of it for the bounds at a time."""
    n = 32768
    (state,) = Quest().layers(shape_of_the_embedded_model(), Budget(kept_fraction=0.25), [n])
    state.backend = BACKENDS["sdpa"]
    prompt = long_prompt(n)
    with Operations() as operations:
        state.prefill(*prompt, None)
    kept = state.store.keys.nbytes + state.store.values.nbytes
    assert kept < operations.peak_bytes < kept + 16 * 2**20


def test_every_tensor_of_the_state_is_counted() -> None:
    state = layer_of([500, 300], 0.5, reserve=200)
    state.prefill(*left_padded([prompt_of(n) for n in (500, 300)]))
    state.step(*token_at(0, batch=2), None)
    tensors = [x for part in (state, state.store) for x in vars(part).values() if isinstance(x, Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    device = state.nbytes()["device"]
    assert sum(device.values()) == sum(storages.values())
    payload = 802 * HEADS * 2 * DIM * 4
    assert device["payload"] == payload
    bounds = (-(-501 // PAGE) + -(-301 // PAGE)) * HEADS * 2 * DIM * 4
    assert device["metadata"] - bounds < 0.03 * payload


@pytest.mark.parametrize("charged", [False, True], ids=["free", "charged"])
@pytest.mark.parametrize(("n", "smallest"), [(640, 32), (20, 20)])
def test_the_smallest_budget_is_two_pages(n: int, smallest: int, charged: bool) -> None:
    """With the first of 4 layers charged it is a quarter of the prompt more; named, feasible and smallest."""
    method, shape = Quest(skip_layers=1, charge_skipped=charged), geometry(layers=4)
    if charged and n > 32:
        smallest = (3 * 32 + n) // 4
    for call in (method.layers, lambda g, b, lengths: method.usage(g, b, lengths[0], 4)):
        with pytest.raises(
            InfeasibleBudget, match="page_size=16.*lower page_size or raise the budget"
        ) as caught:
            call(shape, Budget(kept_tokens=smallest - 1), [n])
        assert caught.value.smallest_tokens == smallest
        call(shape, Budget(kept_tokens=smallest), [n])
    assert method.pages(shape, Budget(kept_tokens=smallest), n) == 2
    assert ("charge_skipped" in str(caught.value)) == charged


def test_charged_layers_leave_the_average_at_the_budget() -> None:
    shape, n = geometry(layers=32), 32768
    for fraction in (0.1, 0.25, 0.5):
        budget = Budget(kept_fraction=fraction)
        average = Quest(charge_skipped=True).usage(shape, budget, n, 2).attended_tokens
        assert budget.tokens(n) - 16 < average <= budget.tokens(n)


def test_notes_say_what_is_attended_to_where_the_skipped_layers_are_free() -> None:
    budget, n = Budget(kept_fraction=0.25), 4096
    (everywhere,) = Quest().notes(geometry(layers=6), budget, n)
    assert "keeps everything on the device" in everywhere
    _, average = Quest().notes(geometry(layers=32), budget, n)
    assert "first 2 of 32 layers" in average
    assert "attends to 0.297 of 4096 tokens on average, where 0.250 was asked" in average
    assert Quest(charge_skipped=True).notes(geometry(layers=32), budget, n) == [everywhere]
    assert Quest().notes(geometry(layers=32), Budget(kept_fraction=1.0), n) == [everywhere]
    _, union = Quest(group=QuestGroup.per_query_head).notes(geometry(layers=6), budget, n)
    assert "each of the 2 query heads" in union


@pytest.mark.parametrize("page", [0, -16, 3, 48, 128])
def test_a_page_that_does_not_divide_a_chunk_is_refused(page: int) -> None:
    with pytest.raises(ValueError, match=f"method.page_size={page} must be 1, 2, 4"):
        Quest(page_size=page)


def test_bad_layer_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="method.skip_layers=-1 must be 0 or more"):
        Quest(skip_layers=-1)
    with pytest.raises(ValueError, match="method.skip_layers=6 must be smaller than the model's 6 layers"):
        Quest(skip_layers=6).layers(geometry(layers=6), Budget(kept_fraction=0.5), [100])


def test_a_model_generates_with_it_and_all_is_as_full_with_every_page() -> None:
    model = tiny_model("qwen3")
    ids, mask = random_ids(3, 60, padded=True)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)[:, 60:]
    full = Generator(model, "quest", 80, page_size=PAGE).generate(ids, mask, 20)
    assert torch.equal(full.tokens, expected)
    part = Generator(model, "quest", 0.5, page_size=PAGE).generate(ids, mask, 20)
    assert not torch.equal(part.tokens, expected)
    assert 0.3 < part.counters["attended_fraction"] <= 0.5
    assert quest.Quest.name == "quest"


@pytest.mark.parametrize("more", [10, 70, 130])
def test_a_question_longer_than_the_room_sees_itself(more: int) -> None:
    """The store moves while the question comes in."""
    model = tiny_model("llama", 2)
    ids, _ = random_ids(2, 60 + more)
    full, ours = (KVCache(model, name, 1000) for name in ("fullkv", "quest"))
    with torch.inference_mode():
        for cache in (full, ours):
            model(ids[:, :60], past_key_values=cache)
        expected, out = (model(ids[:, 60:], past_key_values=cache).logits for cache in (full, ours))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
