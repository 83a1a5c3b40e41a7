"""ShadowKV against a slow reference: outliers, landmarks, selection, output, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from hcache import Budget, Generator, Geometry, InfeasibleBudget, KVCache
from hcache.attention.backends import BACKENDS
from hcache.attention.rope import Rope
from hcache.cache.exchange import Changed, fetch
from hcache.cache.room import Room, StickyRoom
from hcache.cache.state import StoreLayer
from hcache.contract.masked import attend_to
from hcache.contract.tiny_models import FAMILIES, VOCABULARY, positions_of, prompts, tiny_model
from hcache.methods.chunks import ChunkPlan, ShadowLayer, summarise
from hcache.methods.heterocache import OffloadSettings
from hcache.methods.shadowkv import ShadowKV
from tests.on_kernels import kernel_device
from tests.operations import Operations
from tests.padding import Qkv, left_padded

DIM, HEADS, SIZE = 16, 2, 4
WIDTH = HEADS * DIM
EMBEDDED = Geometry(layers=6, query_heads=8, kv_heads=4, head_dim=32)
"""Shape of the embedded model."""


def rope_of(dim: int = DIM, device: str = "cpu") -> Rope:
    heads = {"hidden_size": dim, "num_attention_heads": 1, "head_dim": dim}
    return Rope(LlamaRotaryEmbedding(LlamaConfig(**heads)).to(device), apply_rotary_pos_emb, 1.0)


def turn(x_HnD: Tensor, sign: int = 1) -> Tensor:
    """Rotary embedding at positions 0 to n - 1 in float64; sign -1 takes it off."""
    dim = x_HnD.shape[-1]
    angles = torch.arange(x_HnD.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, dim, 2).double() / dim)
    turned = torch.complex(*x_HnD.double().chunk(2, -1)) * torch.polar(torch.ones_like(angles), sign * angles)
    return torch.cat([turned.real, turned.imag], -1)


def prompt_of(tokens: int, share: int = 2, loud: float = 2.0) -> Qkv:
    """q [Hq, n, D], k and v [H, n, D]; keys weigh less and less along mixed directions before rotation."""
    generator = torch.Generator().manual_seed(tokens)
    mixed = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    plain_nW = torch.randn(tokens, WIDTH, generator=generator) * 3 * 0.9 ** torch.arange(WIDTH) @ mixed
    k = turn(plain_nW.unflatten(1, (HEADS, DIM)).transpose(0, 1)).float()
    q = loud * torch.randn(HEADS * share, tokens, DIM, generator=generator)
    return q, k, torch.randn(HEADS, tokens, DIM, generator=generator)


def token_at(step: int, batch: int = 1, share: int = 2, loud: float = 2.0) -> Qkv:
    generator = torch.Generator().manual_seed(1000 + step)
    q = loud * torch.randn(batch, HEADS * share, 1, DIM, generator=generator)
    k, v = torch.randn(2, batch, HEADS, 1, DIM, generator=generator)
    return q, k, v


def layer_of(plans: list[ChunkPlan], size: int = SIZE, reserve: int = 64, **options: Any) -> ShadowLayer:
    state = ShadowLayer(plans, size, **options)
    state.backend, state.rope, state.reserve_tokens = BACKENDS["sdpa"], rope_of(), reserve
    return state


class Sequence:
    """One sequence by the written rules: what it holds, and what its latest query selects."""

    def __init__(self, prompt: Qkv, plan: ChunkPlan, size: int = SIZE) -> None:
        (q, self.k, self.v), self.plan, self.size = prompt, plan, size
        self.prompt = self.k.shape[1]
        self.rebuilt = self._low_rank()
        chunks = [self._chunk(c) for c in range(plan.chunks)]
        self.means = [[k[chunk].double().mean(0) for chunk in chunks] for k in self.k]
        self.outliers = [self._outliers(k) for k in self.k]
        self.choose(q[:, -1])

    def _low_rank(self) -> Tensor:
        """Keys before rotation, all heads together, at rank r by SVD; rotated again."""
        u, s, v = torch.linalg.svd(turn(self.k, -1).transpose(0, 1).flatten(1), full_matrices=False)
        rank = self.plan.rank
        plain_nW = u[:, :rank] * s[:rank] @ v[:rank]
        return turn(plain_nW.unflatten(1, (self.k.shape[0], -1)).transpose(0, 1)).float()

    def _chunk(self, c: int) -> range:
        return range(c * self.size, (c + 1) * self.size)

    def _outliers(self, k_nD: Tensor) -> list[int]:
        """Chunks whose worst key is least like the chunk's mean."""
        worst = []
        for c in range(self.plan.chunks):
            keys = k_nD[self._chunk(c)].double()
            worst.append(float(torch.cosine_similarity(keys, keys.mean(0, keepdim=True), dim=1).min()))
        return sorted(range(len(worst)), key=worst.__getitem__)[: self.plan.outliers]

    def choose(self, q_HqD: Tensor) -> None:
        """Per KV head the ordinary chunks with the largest softmax share in any head of the group."""
        share, self.selected = q_HqD.shape[0] // self.k.shape[0], []
        for h, outliers in enumerate(self.outliers):
            ordinary = [c for c in range(self.plan.chunks) if c not in outliers]
            best = [0.0] * len(ordinary)
            if ordinary:
                means = torch.stack([self.means[h][c] for c in ordinary])
                for q in q_HqD[h * share : (h + 1) * share].double():
                    shares = (means @ q / DIM**0.5).softmax(0).tolist()
                    best = [max(pair) for pair in zip(best, shares, strict=True)]
            ranked = sorted(range(len(ordinary)), key=lambda j: -best[j])
            self.selected.append([ordinary[j] for j in ranked[: self.plan.selected]])

    def kept(self) -> list[list[int]]:
        tail = list(range(self.plan.chunks * self.size, self.prompt))
        heads = zip(self.selected, self.outliers, strict=True)
        return [sorted([t for c in [*s, *o] for t in self._chunk(c)] + tail) for s, o in heads]

    def feed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append one token; its output [Hq, D]."""
        self.k, self.v = torch.cat([self.k, k], 1), torch.cat([self.v, v], 1)
        self.choose(q[:, 0])
        keys, visible = self.k.clone(), torch.ones(self.k.shape[:2], dtype=torch.bool)
        visible[:, : self.prompt] = False
        for h, positions in enumerate(self.kept()):
            visible[h, positions] = True
            for c in self.selected[h]:
                keys[h, self._chunk(c)] = self.rebuilt[h, self._chunk(c)]
        return attend_to(q[:, 0], keys, self.v, visible)


def as_lists(kept: list[list[Tensor]]) -> list[list[list[int]]]:
    return [[head.tolist() for head in sequence] for sequence in kept]


def plan_of(tokens: int, rank: int = WIDTH, outliers: int = 2, selected: int | None = None) -> ChunkPlan:
    """One local chunk; every chunk selected if `selected` is None."""
    chunks = tokens // SIZE - 1
    return ChunkPlan(rank, chunks, outliers, chunks - outliers if selected is None else selected)


RAGGED = [(61, plan_of(61, 8, 2, 3)), (20, ChunkPlan()), (102, plan_of(102, 12, 3, 5))]
"""Lengths and plans of a batch, one sequence too short for chunks."""


def ragged_batch(share: int = 2, loud: float = 2.0, **options: Any) -> tuple[ShadowLayer, list[Qkv]]:
    """A prefilled state of that batch."""
    batch = [prompt_of(n, share, loud) for n, _ in RAGGED]
    state = layer_of([plan for _, plan in RAGGED], **options)
    state.prefill(*left_padded(batch))
    return state, batch


# What is kept and selected


@pytest.mark.parametrize("loud", [2.0, 60.0], ids=["plain", "loud"])
@pytest.mark.parametrize("share", [1, 2, 4])
def test_every_step_is_that_of_the_slow_reference(share: int, loud: float) -> None:
    """Different lengths, ranks and selections, pads, growth, tokens left out; loud: shares round to zero."""
    state, batch = ragged_batch(share, loud, reserve=5)
    sequences = [Sequence(prompt, plan) for prompt, (_, plan) in zip(batch, RAGGED, strict=True)]
    assert as_lists(state.kept()) == [s.kept() for s in sequences]
    for t in range(40):
        token, real = token_at(t, 3, share, loud), torch.tensor([[t % 3 > 0], [t % 4 > 0], [True]])
        for x in token:
            x[~real[:, 0]] = torch.nan
        out = state.step(*token, real)
        for b in real[:, 0].nonzero()[:, 0].tolist():
            expected = sequences[b].feed(*(x[b] for x in token))
            torch.testing.assert_close(out[b, :, 0], expected, rtol=1e-3, atol=2e-4)
        assert as_lists(state.kept()) == [s.kept() for s in sequences]
    lengths = state.store.lengths.unflatten(0, (3, HEADS))[:, 0].tolist()
    assert [n - len(s.kept()[0]) for n, s in zip(lengths, sequences, strict=True)] == [26, 30, 40]


def test_all_directions_and_chunks_are_full_attention_for_64_steps() -> None:
    """Outliers, local tail, selected and generated tokens are everything there is, once."""
    batch = [prompt_of(n) for n in (61, 90)]
    state = layer_of([plan_of(n) for n in (61, 90)])
    state.prefill(*left_padded(batch))
    assert as_lists(state.kept()) == [[list(range(n))] * HEADS for n in (61, 90)]
    for t in range(64):
        token = token_at(t, batch=2)
        out = state.step(*token, None)
        for b, (_, k, v) in enumerate(batch):
            k, v = (torch.cat([old, new[b]], 1) for old, new in zip((k, v), token[1:], strict=True))
            batch[b] = (batch[b][0], k, v)
            expected = attend_to(token[0][b, :, 0], k, v, torch.ones(k.shape[:2], dtype=torch.bool))
            torch.testing.assert_close(out[b, :, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_sees_no_difference_with_all_directions_and_chunks(
    family: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(self: ShadowKV, geometry: Geometry, budget: Budget, n: int) -> ChunkPlan:
        return plan_of(n, min(n, WIDTH))

    monkeypatch.setattr(ShadowKV, "plan", plan)
    model = tiny_model(family)
    ids, mask = prompts(3, 50, padded)
    steps = torch.randint(3, VOCABULARY, (3, 64), generator=torch.Generator().manual_seed(5))
    everything = torch.cat([mask, torch.ones_like(steps)], 1)
    positions = positions_of(everything)
    ours, theirs = KVCache(model, "shadowkv", 0.5, chunk=SIZE), DynamicCache(config=model.config)
    for start, end in [(0, 50), *((t, t + 1) for t in range(50, 114))]:
        options = {"attention_mask": everything[:, :end], "position_ids": positions[:, start:end]}
        fed = torch.cat([ids, steps], 1)[:, start:end]
        with torch.inference_mode():
            a, b = (model(fed, past_key_values=c, **options).logits[:, -1] for c in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert all(isinstance(state, ShadowLayer) for state in ours.states)
    assert ours.counters()["chunks_selected"] > 0


def test_what_is_selected_always_kept_and_generated_is_disjoint_and_each_head_s_own() -> None:
    state, _ = ragged_batch()
    for t in range(10):
        state.step(*token_at(t, batch=3), None)
        chunks = state._landmarks.chunks(state._held_SM)
        for s in range(3 * HEADS):
            (n, plan), h = RAGGED[s // HEADS], s % HEADS
            selected = {c * SIZE + i for c in chunks[s, : plan.selected].tolist() for i in range(SIZE)}
            always = set(state._kept[s // HEADS][h].tolist())
            assert selected.isdisjoint(always)
            assert set(range(plan.chunks * SIZE, n)) <= always
            assert len(selected) + len(always) == n - (plan.chunks - plan.outliers - plan.selected) * SIZE
    kept = as_lists(state.kept())
    assert kept[0][0] != kept[0][1]
    assert as_lists(state._kept)[2][0] != as_lists(state._kept)[2][1]


def test_the_local_tail_is_the_local_chunks_and_what_is_left_of_the_last() -> None:
    for n in (8192, 8197, 8199):
        plan = ShadowKV().plan(EMBEDDED, Budget(kept_fraction=0.4), n)
        assert n - plan.chunks * 8 == 32 + n % 8
    assert plan.chunks == 1020


def test_one_key_unlike_its_mates_makes_an_outlier_and_equal_keys_never_do() -> None:
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(DIM, generator=generator)
    keys = direction + 0.3 * torch.randn(40 * SIZE, DIM, generator=generator)
    keys[7 * SIZE + 2] = -direction  # opposed
    keys[23 * SIZE] = torch.randn(DIM, generator=generator).roll(1) * 3  # elsewhere
    keys[30 * SIZE : 31 * SIZE] = torch.randn(DIM, generator=generator)  # all the same, wherever they point
    for count in (0, 1, 2, 39):
        means, outliers = summarise(keys, SIZE, count)
        assert outliers.tolist() == sorted(outliers.tolist())
        assert {7, 23} <= set(outliers.tolist()) or count < 2
        assert 30 not in outliers.tolist()
    torch.testing.assert_close(means[3], keys[3 * SIZE : 4 * SIZE].mean(0))


def test_the_order_of_query_heads_in_a_group_makes_no_difference() -> None:
    def kept(order: list[int]) -> list[list[list[int]]]:
        state = layer_of([plan_of(90, 8, 2, 6)])
        q, k, v = (x.unsqueeze(0) for x in prompt_of(90, share=4))
        state.prefill(q.unflatten(1, (HEADS, 4))[:, :, order].flatten(1, 2), k, v, None)
        return as_lists(state.kept())

    assert kept([0, 1, 2, 3]) == kept([2, 0, 3, 1])
    assert kept([0, 1, 2, 3]) != kept([0, 0, 0, 0])


def test_a_token_left_out_changes_nothing() -> None:
    state, _ = ragged_batch()
    before, store, counters = as_lists(state.kept()), state.store.keys.clone(), state.counters()
    token = token_at(0, batch=3)
    for x in token:
        x[:] = torch.nan
    state.step(*token, torch.zeros(3, 1, dtype=torch.bool))
    assert as_lists(state.kept()) == before
    assert torch.equal(state.store.keys, store)
    assert state.counters() == counters


def test_several_tokens_are_as_many_steps() -> None:
    (block, _), (single, _) = ragged_batch(), ragged_batch()
    tokens = [token_at(t, batch=3) for t in range(6)]
    valid = torch.tensor([[True, False, True] * 2, [False] * 3 + [True] * 3, [True] * 6])
    together = block.extend(*(torch.cat(parts, 2) for parts in zip(*tokens, strict=True)), valid)
    for t, token in enumerate(tokens):
        out = single.step(*token, valid[:, t : t + 1])
        assert torch.equal(out, together[:, :, t : t + 1])
    assert as_lists(block.kept()) == as_lists(single.kept())


# What moves


def test_a_hit_gives_what_fetching_everything_gives_and_values_are_exact() -> None:
    state, batch = ragged_batch()
    for t in range(30):
        state.step(*token_at(t // 2, batch=3), None)  # every other query is the one before
        stored = state.store.keys.clone(), state.store.values.clone()
        slots = torch.arange(state._most, dtype=torch.int32).repeat(3 * HEADS, 1)
        everything = Changed(slots, state._selected_S)
        fetch(state._host, state.store, state._chunks(), everything, SIZE)
        state._factors.restore(state.store, state._chunks(), everything, SIZE)
        assert all(map(torch.equal, stored, (state.store.keys, state.store.values)))
        for s, rows in enumerate(state._landmarks.chunks(state._held_SM)):
            _, plan = RAGGED[s // HEADS]
            positions = [c * SIZE + i for c in rows[: plan.selected].tolist() for i in range(SIZE)]
            stored = state.store.read(s, len(positions))[1]
            assert torch.equal(stored, batch[s // HEADS][2][s % HEADS, positions])
    assert state.counters()["chunk_hits"] >= 15 * HEADS * 8


def test_what_moves_is_counted_and_no_more_than_what_is_missed() -> None:
    state, batch = ragged_batch()
    sequences = [Sequence(prompt, plan) for prompt, (_, plan) in zip(batch, RAGGED, strict=True)]
    asked = missed = 0
    for t in range(20):
        token, real = token_at(t, batch=3), torch.tensor([[True], [True], [t % 2 == 0]])
        state.step(*token, real)
        for b in real[:, 0].nonzero()[:, 0].tolist():
            before = [set(chunks) for chunks in sequences[b].selected]
            sequences[b].choose(token[0][b, :, 0])
            missed += sum(len(set(c) - old) for c, old in zip(sequences[b].selected, before, strict=True))
            asked += sum(len(chunks) for chunks in before)
    assert 0 < missed < asked
    assert state.counters() == {
        "chunk_hits": asked - missed,
        "chunks_selected": asked,
        "host_to_device_bytes": missed * SIZE * DIM * 4,
    }


def test_without_offloading_all_is_the_same_but_where_the_values_are() -> None:
    (far, _), (near, _) = ragged_batch(), ragged_batch(offload=False)
    host = sum(plan.chunks * SIZE for _, plan in RAGGED) * WIDTH * 4
    assert far.nbytes()["host"] == {"payload": host, "metadata": 0, "reserved": 0}
    assert not any(near.nbytes()["host"].values())
    assert near.nbytes()["device"]["payload"] == far.nbytes()["device"]["payload"] + host
    for t in range(20):
        token = token_at(t, batch=3)
        assert torch.equal(far.step(*token, None), near.step(*token, None))
    assert as_lists(far.kept()) == as_lists(near.kept())
    assert near.counters() == {**far.counters(), "host_to_device_bytes": 0}
    assert far.counters()["host_to_device_bytes"] > 0


def test_a_step_has_fixed_shapes_and_asks_the_device_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    state, _ = ragged_batch()
    for name in ("tolist", "item", "cpu"):
        monkeypatch.setattr(Tensor, name, None)
    for masks in ([None] * 12, [torch.tensor([[True], [t % 2 == 0], [False]]) for t in range(12)]):
        traces = []
        for t, real in enumerate(masks):
            token = token_at(t, batch=3)
            with Operations() as operations:
                state.step(*token, real)
            assert not operations.synchronised()
            traces.append(operations.trace)
        assert all(trace == traces[0] for trace in traces)


# Steps that were captured, and kernels


def prompts_and_plans(lengths: list[int]) -> tuple[list[Qkv], list[ChunkPlan]]:
    """Prompts of which 14 tokens or fewer are kept whole, each with a plan of its own."""
    plans = [ChunkPlan() if n < 15 else plan_of(n, n // 8, n // 40, n // 12) for n in lengths]
    return [prompt_of(n) for n in lengths], plans


def prefilled_in(room: Room, lengths: list[int], device: str = "cpu") -> ShadowLayer:
    batch, plans = prompts_and_plans(lengths)
    state = layer_of(plans, reserve=40)
    state.rope, state.room = rope_of(device=device), room
    state.prefill(*(x.to(device) for x in left_padded(batch)))
    room.adopt(state)
    return state


@pytest.mark.parametrize(
    ("first", "later"),
    [([102], [[61], [90]]), ([70, 102, 90], [[90, 20, 61], [12, 33, 100], [102, 61, 70]])],
    ids=["one", "batch"],
)
def test_steps_of_the_first_prompt_s_state_serve_other_prompts(
    first: list[int], later: list[list[int]]
) -> None:
    """A captured step knows tensors alone: the state it was captured with does the next prompt's steps."""
    room = StickyRoom()
    captured, batch = prefilled_in(room, first), len(first)
    for t in range(3):
        captured.step(*token_at(t, batch), None)
    for lengths in later:
        ours, plain = prefilled_in(room, lengths), prefilled_in(Room(), lengths)
        assert room.forget_changes() == 0
        for t in range(20):
            token = token_at(50 + t, batch)
            turn = ours.ready(even=True)
            assert turn.kind == 0
            out = captured.advance(*token, None)
            torch.testing.assert_close(out, plain.step(*token, None), rtol=0, atol=1e-6)
            assert as_lists(ours.kept()) == as_lists(plain.kept())
        assert ours.counters() == plain.counters()
        assert 0 < ours.counters()["chunk_hits"] < ours.counters()["chunks_selected"]


def traced(state: ShadowLayer, batch: int, device: str) -> list[tuple[Tensor, Any]]:
    """Outputs of sequences that had a token, kept positions and counters after each of some steps."""
    trace = []
    for t in range(20):
        real = torch.tensor([[t % 2 == 0 or (t + b) % 3 > 0] for b in range(batch)])
        mask = None if t % 2 == 0 else real.to(device)
        out = state.step(*(x.to(device) for x in token_at(t, batch)), mask).cpu()
        trace.append((out[real[:, 0]], (as_lists(state.kept()), state.counters())))
    return trace


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[102], [61, 12, 102]], ids=["one", "batch"])
def test_kernels_do_the_same_steps(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = traced(prefilled_in(Room(), lengths), len(lengths), "cpu")
    device = kernel_device(monkeypatch)
    state = prefilled_in(StickyRoom(), lengths, device)
    assert state._factors._frequencies_F is not None
    for (ours, found), (theirs, slow) in zip(traced(state, len(lengths), device), expected, strict=True):
        assert found == slow
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# What a budget becomes


def random_prompt(n: int, dtype: torch.dtype = torch.float32) -> Qkv:
    q, k, v = (torch.randn(1, heads, n, 32).to(dtype) for heads in (8, 4, 4))
    return q, k, v


def prefilled(method: ShadowKV, budget: Budget, n: int, dtype: torch.dtype) -> tuple[StoreLayer, int]:
    """One layer of the embedded model's shape, and the most bytes its prefill took at a time."""
    state = method.layers(EMBEDDED, budget, [n])[0]
    assert isinstance(state, StoreLayer)
    state.backend, state.rope = BACKENDS["sdpa"], rope_of(32)
    prompt = random_prompt(n, dtype)
    with Operations() as operations:
        state.prefill(*prompt, None)
    return state, operations.peak_bytes


@pytest.mark.parametrize("n", [8192, 32768])
@pytest.mark.parametrize(
    ("budget", "dtype", "hyper"),
    [
        (0.18, torch.bfloat16, {}),
        (0.25, torch.float32, {}),
        (0.6, torch.bfloat16, {"outlier_chunks": 3, "rank": 50}),
        (0.4, torch.bfloat16, {"offload": OffloadSettings(False), "chunk": 16}),
    ],
)
def test_measured_bytes_are_those_planned(
    n: int, budget: float, dtype: torch.dtype, hyper: dict[str, Any]
) -> None:
    """And prefill takes little more at a time than what it keeps."""
    method = ShadowKV(**hyper)
    plan = method.usage(EMBEDDED, Budget(kept_fraction=budget), n, dtype.itemsize)
    state, peak = prefilled(method, Budget(kept_fraction=budget), n, dtype)
    measured = state.nbytes()
    device = measured["device"]["payload"] + measured["device"]["metadata"]
    assert 6 * device == pytest.approx(plan.device_bytes, rel=0.01)
    assert 6 * measured["host"]["payload"] == plan.host_bytes
    kept = sum(sum(side.values()) for side in measured.values())
    assert peak <= kept + 64 * 2**20
    attended = [len(head) for head in state.kept()[0]]
    assert attended == [plan.attended_tokens] * 4
    if method.offload.enabled:
        spent = plan.device_bytes / (n * 2 * EMBEDDED.heads * 32 * dtype.itemsize)
        assert budget - 2 * method.chunk / n < spent <= budget
        assert plan.moved_bytes == 6 * 4 * int(plan.parts["selected"]) * 32 * dtype.itemsize
    else:
        assert plan.moved_bytes == plan.host_bytes == 0


@pytest.mark.parametrize("hyper", [{}, {"outlier_chunks": 5}, {"rank": 60, "chunk": 16, "local_chunks": 0}])
@pytest.mark.parametrize("n", [150, 1000, 8195, 100_000])
def test_the_smallest_budget_leaves_one_chunk_to_select(n: int, hyper: dict[str, Any]) -> None:
    method = ShadowKV(**hyper)
    smallest = method.minimum_tokens(EMBEDDED, n)
    assert smallest < n
    with pytest.raises(
        InfeasibleBudget, match="leave no chunk to select; raise the budget, or lower"
    ) as caught:
        method.layers(EMBEDDED, Budget(kept_tokens=smallest - 1), [n])
    assert caught.value.smallest_tokens == smallest
    for budget in (Budget(kept_tokens=smallest), Budget(kept_fraction=caught.value.smallest_fraction)):
        plan = method.plan(EMBEDDED, budget, n)
        assert plan.selected >= 1
        assert plan.outliers == (method.outlier_chunks or 0)
        method.layers(EMBEDDED, budget, [n])
    assert method.plan(EMBEDDED, Budget(kept_tokens=smallest), n).selected == 1


@pytest.mark.parametrize("n", [150, 1000, 8195])
def test_every_budget_below_the_prompt_leaves_chunks_out(n: int) -> None:
    """No plan selects more than there is, spends more than it may, or leaves a chunk's worth unspent."""
    method, last = ShadowKV(), 0
    for tokens in range(method.minimum_tokens(EMBEDDED, n), n, max(1, n // 100)):
        plan = method.plan(EMBEDDED, Budget(kept_tokens=tokens), n)
        assert 1 <= plan.selected < plan.landmarks
        spent = method.usage(EMBEDDED, Budget(kept_tokens=tokens), n, 2).device_bytes / (
            EMBEDDED.heads * 2 * 32 * 2
        )
        assert tokens - 8.1 <= spent <= tokens
        assert plan.selected + plan.outliers >= last
        last = plan.selected + plan.outliers
    assert method.plan(EMBEDDED, Budget(kept_tokens=n), n) == ChunkPlan()


def big(width: int) -> Geometry:
    return Geometry(layers=32, query_heads=32, kv_heads=width // 128, head_dim=128)


@pytest.mark.parametrize(("width", "floor"), [(1024, 0.141), (512, 0.219)])
def test_floors_are_those_of_the_paper_s_settings(width: int, floor: float) -> None:
    """160 columns and a landmark for 8 tokens, as prompts grow."""
    n = 4_000_000
    assert ShadowKV(rank=160).minimum_tokens(big(width), n) / n == pytest.approx(floor, abs=5e-4)


@pytest.mark.parametrize(("n", "fraction"), [(131072, 0.162), (32768, 0.219), (8192, 0.450)])
def test_the_paper_s_buffers_take_the_known_share(n: int, fraction: float) -> None:
    """2048 selected tokens and 48 outlier chunks on Llama-3.1-8B; our chunk numbers take fewer bytes."""
    method, shape = ShadowKV(rank=160, outlier_chunks=48), big(1024)
    tokens = next(t for t in range(n // 10, n) if _selected(method, shape, t, n) == 256)
    usage = method.usage(shape, Budget(kept_tokens=tokens), n, 2)
    assert usage.device_bytes / (n * 2 * 1024 * 32 * 2) == pytest.approx(fraction, abs=4e-3)
    assert usage.host_bytes == pytest.approx(n * 1024 * 2 * 32, rel=0.01)
    scaled = ShadowKV().plan(shape, Budget(kept_tokens=tokens), n)
    assert (scaled.rank, scaled.outliers, scaled.selected) == (160, 48, 256)


def _selected(method: ShadowKV, shape: Geometry, tokens: int, n: int) -> int:
    try:
        return method.plan(shape, Budget(kept_tokens=tokens), n).selected
    except InfeasibleBudget:
        return 0


def test_prompts_too_short_are_kept_whole_and_notes_say_so() -> None:
    model, method = tiny_model("llama", 4), ShadowKV()
    shape = Geometry(2, 4, 4, 16)
    (note,) = method.notes(shape, Budget(kept_tokens=100), 39)
    assert note == "prompts of 39 tokens are too short to save anything on: kept whole"
    assert method.notes(shape, Budget(kept_tokens=100), 400) == []
    (note,) = ShadowKV(offload=OffloadSettings(False)).notes(shape, Budget(kept_tokens=100), 400)
    assert "beyond the budget" in note
    with pytest.raises(InfeasibleBudget) as caught:
        method.layers(shape, Budget(kept_tokens=38), [39])
    assert caught.value.smallest_tokens == 39
    ids, _ = prompts(1, 39)
    cache = KVCache(model, method, 100)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    assert as_lists(cache.kept(0)) == [[list(range(39))] * 4]
    # And together with one that isn't, in a batch through the model.
    ids, mask = prompts(2, 200)
    mask[1, : 200 - 39] = 0
    generator = Generator(model, method, 100)
    together = generator.generate(ids.masked_fill(mask == 0, 0), mask, 20).tokens
    for b in range(2):
        alone = generator.generate(ids[b : b + 1, mask[b] == 1], None, 20).tokens
        assert torch.equal(alone[0], together[b])


def test_every_tensor_of_the_state_is_counted() -> None:
    state, _ = ragged_batch()
    state.step(*token_at(0, batch=3), None)
    parts = (state, state.store, state._host, state._factors, state._landmarks)
    tensors = [x for part in parts for x in vars(part).values() if isinstance(x, Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    assert sum(sum(side.values()) for side in state.nbytes().values()) == sum(storages.values())


@pytest.mark.parametrize(
    ("key", "value", "least"),
    [
        ("chunk", 0, "1 token"),
        ("rank", 0, "1 column"),
        ("local_chunks", -1, "0"),
        ("outlier_chunks", -1, "0"),
    ],
)
def test_bad_hyper_parameters_are_refused(key: str, value: int, least: str) -> None:
    with pytest.raises(ValueError, match=f"method.{key}={value} must be at least {least}"):
        ShadowKV(**{key: value})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("offload", [True, False], ids=["host", "device"])
def test_a_gpu_does_the_same_without_waiting(offload: bool) -> None:
    near, batch = ragged_batch(offload=offload)
    far = layer_of([plan for _, plan in RAGGED], offload=offload)
    far.rope = rope_of(device="cuda")
    far.prefill(*(x.cuda() for x in left_padded(batch)))
    for t in range(30):
        token = token_at(t, batch=3)
        there, real = [x.cuda() for x in token], torch.tensor([[True], [True], [t % 3 > 0]])
        mask = real.cuda()
        torch.cuda.set_sync_debug_mode("error" if t else "default")  # the first step compiles a kernel
        try:
            out = far.step(*there, mask)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(out.cpu(), near.step(*token, real), rtol=1e-3, atol=1e-4)
        assert as_lists(far.kept()) == as_lists(near.kept())
    assert far.counters() == near.counters()
