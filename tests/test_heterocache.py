"""HeteroCache: role budgets, drift, refresh. Small states with planted keys, and brute force."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor

from hcache import Budget, Generator, Geometry, HeadProfile, InfeasibleBudget
from hcache.attention.backends import BACKENDS
from hcache.cache.room import Held, Room, StickyRoom, tensors_of
from hcache.contract.masked import causal_attention
from hcache.contract.tiny_models import prompts, tiny_model
from hcache.methods import make
from hcache.methods.drift import HeteroLayer
from hcache.methods.heterocache import HeteroCache, OffloadSettings
from hcache.profiling import Graph, Role
from hcache.role_weights import RoleSettings, fit_roles
from tests.operations import Operations

N, DIM = 60, 16
GEOMETRY = Geometry(layers=1, query_heads=8, kv_heads=4, head_dim=DIM, fingerprint="x")


def profile(stability: list[list[float]], pairs: dict[tuple[int, int, int], float]) -> HeadProfile:
    """A profile of four-headed layers with these similar pairs (layer, head, head)."""
    layers, heads = len(stability), len(stability[0])
    similarity = torch.zeros(layers, heads, heads, dtype=torch.float64)
    for (layer, a, b), score in pairs.items():
        similarity[layer, a, b] = similarity[layer, b, a] = score
    scores = torch.tensor(stability, dtype=torch.float64)
    return HeadProfile(layers, heads, scores, dict.fromkeys(Graph, similarity), fingerprint="x")


PIVOT_AND_SATELLITE = profile([[0.9, 0.9, 0.9, 0.9]], {(0, 0, 1): 0.8})


def layer(budget: float = 0.5, **hyper: object) -> HeteroLayer:
    """One layer: head 0 is the pivot of head 1, heads 2 and 3 are anchors."""
    method = make("heterocache", profile=PIVOT_AND_SATELLITE, **hyper)
    (state,) = method.layers(GEOMETRY, Budget(kept_fraction=budget), [N])
    state.backend = BACKENDS["reference"]
    assert isinstance(state, HeteroLayer)
    return state


def planted(where: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """A prompt whose last query attends to `where`, in every head: q, k, v of one sequence.

    Token i's key is the i-th of N nearly orthogonal directions.
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(N, DIM, generator=generator), dim=-1)
    k = (4 * directions).expand(1, 4, N, DIM).contiguous()
    v = torch.randn(1, 4, N, DIM, generator=generator)
    q = torch.randn(1, 8, N, DIM, generator=generator)
    q[:, :, -1] = query(k, where)
    return q, k, v


def query(k: Tensor, where: list[int]) -> Tensor:
    """A query that attends to the positions `where` of the planted prompt."""
    return 3 * k[0, 0, where].sum(0)


def feed(state: HeteroLayer, k: Tensor, where: list[int], steps: int, start: int = 0) -> None:
    """Decode steps whose queries look at `where`."""
    for t in range(steps):
        noise = torch.randn(2, 1, 4, 1, DIM, generator=torch.Generator().manual_seed(start + t))
        state.step(query(k, where).expand(1, 8, 1, DIM), 0.01 * noise[0], noise[1], None)


EARLY, LATE = [10, 11, 12], [40, 41, 42]


def test_a_drift_triggers_and_the_refreshed_set_contains_what_is_looked_at_now() -> None:
    state = layer()
    q, k, v = planted(EARLY)
    state.prefill(q, k, v, None)
    assert set(EARLY) <= set(state.kept()[0][1].tolist())
    feed(state, k, LATE, 5)
    assert state.counters()["triggers"] == 1
    assert set(LATE) <= set(state.kept()[0][1].tolist())
    feed(state, k, LATE, 1)
    positions = state.kept()[0][1]
    keys, values = state.store.read(1, positions.numel())
    torch.testing.assert_close(keys, k[0, 1, positions], rtol=0, atol=0)
    torch.testing.assert_close(values, v[0, 1, positions], rtol=0, atol=0)


def test_without_drift_nothing_is_triggered_and_nothing_moves() -> None:
    state = layer()
    q, k, v = planted(EARLY)
    state.prefill(q, k, v, None)
    before = state.kept()
    feed(state, k, EARLY, 25)
    counters = state.counters()
    assert (counters["windows"], counters["triggers"], counters["host_to_device_bytes"]) == (5, 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(before[0], state.kept()[0], strict=True))


def test_after_a_refresh_the_new_set_is_the_reference() -> None:
    state = layer()
    q, k, v = planted(EARLY)
    state.prefill(q, k, v, None)
    feed(state, k, LATE, 25)
    assert state.counters()["triggers"] == 1
    feed(state, k, EARLY, 5)
    assert state.counters()["triggers"] == 2
    assert set(EARLY) <= set(state.kept()[0][1].tolist())


def test_only_satellites_move_and_only_they_wait_on_the_host() -> None:
    state = layer()
    q, k, v = planted(EARLY)
    state.prefill(q, k, v, None)
    before = state.kept()[0]
    feed(state, k, LATE, 6)
    after = state.kept()[0]
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert moved == [False, True, False, False]
    token = 2 * DIM * 4
    assert state.nbytes()["host"]["payload"] == N * token
    counters = state.counters()
    assert counters["refreshed_tokens"] == after[1].numel()
    assert counters["host_to_device_bytes"] == after[1].numel() * token


@pytest.mark.parametrize("visible_after", [1, 2, 4, 5])
def test_a_refresh_is_seen_exactly_when_it_is_said_to_be(visible_after: int) -> None:
    state = layer(visible_after=visible_after)
    q, k, v = planted(EARLY)
    state.prefill(q, k, v, None)
    feed(state, k, LATE, 5)  # decided after token 5
    for t in range(1, visible_after + 1):
        seen_by_next = set(LATE) <= set(state.kept()[0][1].tolist())
        assert seen_by_next == (t == visible_after)
        feed(state, k, LATE, 1, start=50 + t)


def test_the_window_length_is_steps() -> None:
    state = layer(steps=7)
    q, k, v = planted(EARLY)
    state.prefill(q, k, v, None)
    feed(state, k, LATE, 6)
    assert state.counters()["windows"] == 0
    feed(state, k, LATE, 1)
    assert state.counters()["windows"] == 1


def test_one_look_aside_is_not_a_drift_because_the_median_decides() -> None:
    state = layer()
    q, k, v = planted(EARLY)
    state.prefill(q, k, v, None)
    for where in (LATE, EARLY, EARLY, LATE, EARLY):
        feed(state, k, where, 1)
    assert state.counters()["triggers"] == 0


def test_each_sequence_decides_for_itself() -> None:
    method = make("heterocache", profile=PIVOT_AND_SATELLITE)
    (state,) = method.layers(GEOMETRY, Budget(kept_fraction=0.5), [N, N])
    state.backend = BACKENDS["reference"]
    q, k, v = (x.repeat(2, 1, 1, 1) for x in planted(EARLY))
    state.prefill(q, k, v, None)
    both = torch.stack([query(k, EARLY), query(k, LATE)]).view(2, 1, 1, DIM).expand(2, 8, 1, DIM)
    for _ in range(5):
        state.step(both, *torch.zeros(2, 2, 4, 1, DIM), None)
    assert state.counters()["triggers"] == 1
    assert set(LATE) <= set(state.kept()[1][1].tolist())
    assert set(EARLY) <= set(state.kept()[0][1].tolist())


def test_a_journal_notes_a_window_of_each_sequence_when_it_is_full() -> None:
    """The second sequence starts one token late, so that windows end in different steps."""
    method = make("heterocache", profile=PIVOT_AND_SATELLITE)
    (state,) = method.layers(GEOMETRY, Budget(kept_fraction=0.5), [N, N])
    state.backend = BACKENDS["reference"]
    q, k, v = (x.repeat(2, 1, 1, 1) for x in planted(EARLY))
    state.prefill(q, k, v, None)
    state.journal = []
    both = torch.stack([query(k, EARLY), query(k, LATE)]).view(2, 1, 1, DIM).expand(2, 8, 1, DIM)
    seen = []
    for step in range(11):
        valid = torch.tensor([[step < 10], [step > 0]])
        state.step(both, *torch.zeros(2, 2, 4, 1, DIM), valid)
        seen += [(step, note.sequence, note.number, note.drifted) for note in state.journal]
        state.journal.clear()
    assert seen == [(4, 0, 1, False), (5, 1, 1, True), (9, 0, 2, False), (10, 1, 2, False)]


def test_overlap_and_selection_equal_brute_force() -> None:
    """Random queries: the decision and the refreshed set, computed again with plain loops."""
    q, k, v = (torch.randn(1, h, N, DIM, generator=torch.Generator().manual_seed(h)) for h in (8, 4, 5))
    v = v[:, :4]
    for seed in range(12):
        state = layer(drift_threshold=0.75)
        state.prefill(q, k, v, None)
        state.journal = []
        last = causal_attention(q[0], k[0])[:, -1]
        reference = top_set(last[:2], base_of(0.5))
        queries = torch.randn(5, 8, DIM, generator=torch.Generator().manual_seed(seed)) * 2
        overlaps = []
        for one in queries:
            state.step(one.view(1, 8, 1, DIM), *torch.zeros(2, 1, 4, 1, DIM), None)
            rows = torch.stack([(k[0, 0] @ one[g] * DIM**-0.5).softmax(-1) for g in range(2)])
            overlaps.append(len(top_set(rows, base_of(0.5)) & reference) / base_of(0.5))
        drifted = sorted(overlaps)[2] < 0.75
        assert state.counters()["triggers"] == int(drifted)
        (seen,) = state.journal
        assert (seen.sequence, seen.head, seen.number, seen.drifted) == (0, 0, 1, drifted)
        assert seen.overlap == pytest.approx(tuple(overlaps))
        if drifted:
            count = state.kept()[0][1].numel()
            assert set(state.kept()[0][1].tolist()) == top_set(rows, count)


def base_of(budget: float) -> int:
    """Reference size: one of four heads is full."""
    return int((budget * 4 - 1) * N) // 3


def top_set(rows_Gn: Tensor, count: int) -> set[int]:
    """Positions of the best `count`: smoothed by hand over five neighbours, then the group's maximum."""
    padded = torch.nn.functional.pad(rows_Gn, (2, 2))
    smooth = sum(padded[:, i : i + N] for i in range(5)) / 5
    best = smooth.amax(0)
    return set(sorted(range(N), key=lambda i: (-best[i].item(), i))[:count])


def test_without_offload_the_tokens_are_the_same_and_no_host_memory_is_used() -> None:
    model = tiny_model("llama", 4)
    ids, mask = prompts(2, 80, padded=True)
    from hcache.contract.cases import profile_of

    outs = []
    for enabled in (True, False):
        method = HeteroCache(
            profile=profile_of(model), drift_threshold=1.0, steps=3, offload=OffloadSettings(enabled=enabled)
        )
        outs.append(Generator(model, method, 0.5).generate(ids, mask, 30))
    assert torch.equal(outs[0].tokens, outs[1].tokens)
    assert outs[0].counters["triggers"] == outs[1].counters["triggers"] > 0
    assert outs[0].memory.host_payload == outs[1].memory.device_payload - outs[0].memory.device_payload > 0
    assert outs[1].memory.host_payload == 0
    assert outs[1].counters["host_to_device_bytes"] == 0


FOUR_LAYERS = Geometry(layers=4, query_heads=8, kv_heads=4, head_dim=DIM, fingerprint="x")
MIXED = profile(
    [[0.9, 0.1, 0.3, 0.6], [0.2, 0.9, 0.9, 0.9], [0.9, 0.9, 0.9, 0.9], [0.7, 0.8, 0.4, 0.9]],
    {(2, 0, 1): 0.9, (2, 0, 2): 0.9, (3, 1, 2): 0.9},
)


def test_roles_of_the_mixed_profile() -> None:
    assert MIXED.roles().counts == {"anchor": 8, "volatile": 3, "pivot": 2, "satellite": 3}


@pytest.mark.parametrize("fraction", [0.4, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("tokens", [100, 997, 5000])
def test_plans_add_up_exactly_and_follow_the_weights(fraction: float, tokens: int) -> None:
    method = HeteroCache(profile=MIXED)
    budget = Budget(kept_fraction=fraction)
    plans = method.plan(FOUR_LAYERS, MIXED.roles(), budget, tokens)
    counts = [plan.counts for plan in plans]
    assert sum(map(sum, counts)) == budget.tokens(tokens) * FOUR_LAYERS.heads
    roles = MIXED.roles()
    for at, count in ((at, counts[at[0]][at[1]]) for at in all_heads(FOUR_LAYERS)):
        role = roles.matrix[at[0]][at[1]]
        assert 0 <= count <= tokens
        if role.full:
            assert count == tokens
    compressed = [at for at in all_heads(FOUR_LAYERS) if not roles.matrix[at[0]][at[1]].full]
    ranked = sorted(compressed, key=lambda at: roles.weight_of(*at))
    kept = [counts[layer][head] for layer, head in ranked]
    assert all(a <= b + 1 for a, b in itertools.pairwise(kept))


def all_heads(geometry: Geometry) -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(geometry.layers) for head in range(geometry.kv_heads)]


def test_the_smallest_feasible_fraction_is_named_and_is_feasible() -> None:
    method = HeteroCache(profile=MIXED)
    with pytest.raises(InfeasibleBudget, match="roles.fit_budget") as caught:
        method.layers(FOUR_LAYERS, Budget(kept_fraction=0.3), [1600])
    assert caught.value.smallest_fraction == pytest.approx(6 / 16)  # (5 full heads + 1) of 16
    smallest = caught.value.smallest_tokens
    method.layers(FOUR_LAYERS, Budget(kept_tokens=smallest), [1600])
    with pytest.raises(InfeasibleBudget):
        method.layers(FOUR_LAYERS, Budget(kept_tokens=smallest - 1), [1600])


def test_fitting_demotes_stable_volatile_heads_first_and_small_pivots_next() -> None:
    roles = MIXED.roles()
    volatile_by_stability = [(0, 2), (1, 0), (0, 1)]
    pivots_by_size = [(3, 1), (2, 0)]
    expected = volatile_by_stability + pivots_by_size
    for full in range(5):
        tokens = (full + 1) * 100
        fitted, demoted = fit_roles(roles, tokens, FOUR_LAYERS, 1600)
        assert fitted.full_heads == full
        assert demoted == expected[: 5 - full]
    fitted, _ = fit_roles(roles, 200, FOUR_LAYERS, 1600)
    assert fitted.matrix[3][2] is Role.ANCHOR  # the satellite of a demoted pivot: nobody watches for it
    assert fitted.satellites(3, 1) == ()


def test_fitted_budgets_are_exact_and_the_notes_name_what_was_given_up() -> None:
    method = HeteroCache(profile=MIXED, roles=RoleSettings(fit_budget=True))
    budget = Budget(kept_fraction=0.2)
    plans = method.plan(FOUR_LAYERS, MIXED.roles(), budget, 1600)
    assert sum(sum(plan.counts) for plan in plans) == 320 * 16
    (note,) = method.notes(FOUR_LAYERS, budget, 1600)
    assert "2 of 5 full heads stay full" in note
    assert "L0H2" in note
    assert method.notes(FOUR_LAYERS, Budget(kept_fraction=0.5), 1600) == []


def test_satellites_of_one_pivot_with_different_budgets_get_their_own_top_tokens() -> None:
    """The official code gives a smaller satellite the earliest of the larger one's tokens."""
    unequal = profile([[0.9, 0.9, 0.3, 0.9]], {(0, 0, 1): 0.8, (0, 0, 2): 0.8})
    method = make("heterocache", profile=unequal)
    (state,) = method.layers(GEOMETRY, Budget(kept_fraction=0.5), [N])
    state.backend = BACKENDS["reference"]
    state.prefill(*planted(EARLY), None)
    feed(state, planted(EARLY)[1], [50, 51, 52], 6)
    small, large = (set(state.kept()[0][h].tolist()) for h in (1, 2))
    assert len(small) < len(large)
    assert small < large
    assert {50, 51, 52} <= small


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_a_step_asks_the_device_for_nothing_and_windows_are_alike(
    padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a pivot has drifted or not: one sequence always does, the other never."""
    method = make("heterocache", profile=PIVOT_AND_SATELLITE, visible_after=2)
    (state,) = method.layers(GEOMETRY, Budget(kept_fraction=0.5), [N, N])
    state.backend, state.reserve_tokens = BACKENDS["sdpa"], 60
    q, k, v = (x.repeat(2, 1, 1, 1) for x in planted(EARLY))
    state.prefill(q, k, v, None)
    for _ in range(5):
        state.step(*tokens_of_both(k, [EARLY, LATE], padded))
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "tolist", None)
        windows = []
        for where in (LATE, EARLY, EARLY):
            tokens = tokens_of_both(k, [EARLY, where], padded)
            with Operations() as operations:
                for _ in range(5):
                    state.step(*tokens)
            assert operations.synchronised() == []
            windows.append(operations.trace)
    assert windows[0] == windows[1] == windows[2]
    assert state.counters()["triggers"] >= 2


def tokens_of_both(k: Tensor, where: list[list[int]], padded: bool) -> tuple:
    """What a step is given; with `padded` the mask of two sequences, though nothing is left out."""
    rows = torch.stack([query(k, at) for at in where]).view(2, 1, 1, DIM).expand(2, 8, 1, DIM)
    return rows, *torch.zeros(2, 2, 4, 1, DIM), torch.ones(2, 1, dtype=torch.bool) if padded else None


@pytest.mark.parametrize("visible_after", [1, 3, 5])
def test_a_sequence_that_skips_tokens_decides_as_if_it_were_alone(visible_after: int) -> None:
    """Windows count a sequence's own tokens: pads in a batch move nothing."""
    method = make("heterocache", profile=PIVOT_AND_SATELLITE, visible_after=visible_after)
    states = [method.layers(GEOMETRY, Budget(kept_fraction=0.5), [N] * b)[0] for b in (2, 1)]
    q, k, v = planted(EARLY)
    for state, batch in zip(states, (2, 1), strict=True):
        state.backend = BACKENDS["reference"]
        state.prefill(*(x.repeat(batch, 1, 1, 1) for x in (q, k, v)), None)
    middle = [25, 26, 27]
    looks = [EARLY, LATE, LATE, LATE, middle, EARLY, EARLY, EARLY, EARLY, LATE, LATE, EARLY]
    for t in range(2 * len(looks)):
        row = query(k, looks[t // 2]).expand(1, 8, 1, DIM)
        token = (row.repeat(2, 1, 1, 1), *torch.zeros(2, 2, 4, 1, DIM))
        out = states[0].step(*token, torch.tensor([[True], [t % 2 == 0]]))
        if t % 2 == 0:
            alone = states[1].step(row, *torch.zeros(2, 1, 4, 1, DIM), None)
            torch.testing.assert_close(out[1], alone[0], rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(states[0].kept()[1], states[1].kept()[0], strict=True):
            assert torch.equal(ours, theirs)
    assert states[0].counters()["windows"] == 24 // 5 + 12 // 5


@pytest.mark.parametrize("field", ["window", "steps", "visible_after"])
def test_counts_below_one_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"method.{field}=0"):
        make("heterocache", **{field: 0})


def test_other_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="kernel=4"):
        make("heterocache", kernel=4)
    with pytest.raises(ValueError, match="visible_after=6 must be at most method.steps=5"):
        make("heterocache", visible_after=6)
    with pytest.raises(ValueError, match="drift_threshold"):
        make("heterocache", drift_threshold=1.5)


def test_thresholds_are_separate() -> None:
    strict = HeteroCache(profile=MIXED, roles=RoleSettings(stable_threshold=0.85))
    assert strict.roles.assign(MIXED).counts["volatile"] > MIXED.roles().counts["volatile"]
    assert strict.threshold(strict.roles.assign(MIXED)) == 0.85
    assert HeteroCache(profile=MIXED, drift_threshold=0.2).threshold(MIXED.roles()) == 0.2


@pytest.mark.parametrize("n", [8192, 32768])
def test_a_long_prompt_takes_what_is_planned_and_little_scratch(n: int) -> None:
    """Of the embedded model's shape: bytes within 1% of the plan, on both sides."""
    shape = Geometry(layers=2, query_heads=8, kv_heads=4, head_dim=32, fingerprint="x")
    method = HeteroCache(profile=profile([[0.9, 0.9, 0.2, 0.9], [0.9] * 4], {(0, 0, 1): 0.8, (1, 2, 3): 0.8}))
    budget, device, host = Budget(kept_fraction=0.6), 0, 0
    for state in method.layers(shape, budget, [n]):
        q, k, v = (torch.randn(1, heads, n, 32) for heads in (8, 4, 4))
        state.backend = BACKENDS["sdpa"]
        with Operations() as operations:
            state.prefill(q, k, v, None)
        measured = state.nbytes()
        held = sum(sum(side.values()) for side in measured.values())
        assert operations.peak_bytes <= held + 64 * 2**20
        device += measured["device"]["payload"] + measured["device"]["metadata"]
        host += measured["host"]["payload"]
    plan = method.usage(shape, budget, n, 4)
    assert device == pytest.approx(plan.device_bytes, rel=0.01)
    assert host == plan.host_bytes > 0


class Replays:
    """Steps of one layer, captured as an engine does it: by kind, with the tensors and host numbers of the
    prompt that was first.

    Args:
        late: background work is done just before the turn that joins it, not right after the one that starts
            it.
    """

    def __init__(self, late: bool = False) -> None:
        self.late, self.kinds, self.due = late, {}, []

    def step(self, state: HeteroLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turn = state.ready(True)
        if turn.joins:
            self.join()
        captured = self.kinds.setdefault(turn.kind, copy.copy(state))
        out = captured.advance(q, k, v, None)
        if turn.starts:
            assert not self.due, "one window's work must be joined before the next one's begins"
            self.due.append(captured)
            if not self.late:
                self.join()
        return out

    def join(self) -> None:
        while self.due:
            self.due.pop().background()


def two_pivots(
    room: Room, prompt: tuple[Tensor, Tensor, Tensor], visible_after: int, **hyper: object
) -> HeteroLayer:
    """A layer with pivots 0 (satellite 1) and 2 (satellite 3) after a prompt."""
    pairs = profile([[0.9, 0.8, 0.7, 0.9]], {(0, 0, 1): 0.8, (0, 2, 3): 0.8})
    method = make("heterocache", profile=pairs, drift_threshold=0.52, visible_after=visible_after, **hyper)
    batch, _, tokens, _ = prompt[0].shape
    (state,) = method.layers(GEOMETRY, Budget(kept_fraction=0.76), [tokens] * batch)
    state.backend, state.reserve_tokens, state.room = BACKENDS["sdpa"], 40, room
    state.prefill(*prompt, None)
    state.room.adopt(state)
    return state


def random_prompt(tokens: int, seed: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, tokens, DIM, generator=generator) for heads in (8, 4, 4))
    return 2 * q, k, v


@pytest.mark.parametrize("visible_after", [1, 3, 5])
@pytest.mark.parametrize("enabled", [True, False], ids=["host", "device"])
def test_steps_captured_with_one_prompt_serve_others(visible_after: int, enabled: bool) -> None:
    """Bit for bit, and what is kept and counted too; a smaller prompt changes nothing that was captured."""
    room, replays, seen = StickyRoom(), Replays(), set()
    offload = OffloadSettings(enabled=enabled)
    for seed, tokens in enumerate((128, 90, 121, 64)):
        prompt = random_prompt(tokens, seed)
        fresh = two_pivots(room, prompt, visible_after, offload=offload)
        plain = two_pivots(Room(), prompt, visible_after, offload=offload)
        assert not room.forget_changes()
        for t in range(23):
            token = tuple(x[:, :, 0:1] for x in random_prompt(1, 100 + t))
            assert torch.equal(replays.step(fresh, *token), plain.step(*token, None))
            assert [[h.tolist() for h in s] for s in fresh.kept()] == [
                [h.tolist() for h in s] for s in plain.kept()
            ]
        assert fresh.counters() == plain.counters()
        seen.add(fresh.counters()["triggers"])
    assert len(seen) > 1
    assert len(replays.kinds) == {1: 1, 3: 2, 5: 2}[visible_after]


class Generous(Room):
    """Far more room for some things than for others."""

    def size(self, name: str, needed: int) -> int:
        return {"prompt": needed + 7, "resident": 5 * needed}.get(name, needed)


@pytest.mark.parametrize("visible_after", [1, 3])
def test_how_much_room_there_is_changes_nothing(visible_after: int) -> None:
    prompt = random_prompt(70, 0)
    states = [two_pivots(room, prompt, visible_after) for room in (Room(), Generous())]
    for t in range(17):
        token = tuple(x[:, :, 0:1] for x in random_prompt(1, 100 + t))
        assert torch.equal(*(state.step(*token, None) for state in states))
    assert states[0].counters() == states[1].counters()
    assert states[0].counters()["triggers"] > 0


@pytest.mark.parametrize("visible_after", [1, 2, 5])
def test_when_background_work_is_done_changes_nothing(visible_after: int) -> None:
    """Right after the step that starts it, or just before the one that joins it."""
    prompt = random_prompt(100, 0)
    runs = []
    for late in (False, True):
        replays, state = Replays(late), two_pivots(StickyRoom(), prompt, visible_after)
        tokens = [[x[:, :, 0:1] for x in random_prompt(1, 100 + t)] for t in range(31)]
        outs = [replays.step(state, *token) for token in tokens]
        replays.join()
        runs.append((outs, state.kept(), state.counters()))
    for ours, theirs in zip(*(run[0] for run in runs), strict=True):
        assert torch.equal(ours, theirs)
    assert [[h.tolist() for h in s] for s in runs[0][1]] == [[h.tolist() for h in s] for s in runs[1][1]]
    assert runs[0][2] == runs[1][2]
    assert runs[0][2]["triggers"] > 2


def _at(container: object, key: object) -> Tensor:
    return getattr(container, key) if isinstance(container, Held) else container[key]


def test_what_was_staged_is_delivered_once() -> None:
    """Later windows without a drift leave the store as it is, whatever the staging buffer holds."""
    state = layer(visible_after=3)
    q, k, v = planted(EARLY)
    state.prefill(q, k, v, None)
    feed(state, k, LATE, 8)
    assert state.counters()["triggers"] == 1
    state._staging.keys.fill_(torch.nan)
    feed(state, k, LATE, 12)
    assert state.counters()["triggers"] == 1
    assert not state.store.keys.isnan().any()


def test_windows_start_and_join_work_where_they_must() -> None:
    def turns(visible_after: int, uneven_from: int = 99) -> tuple[list[int], list[int]]:
        state = two_pivots(Room(), random_prompt(64, 0), visible_after)
        all_turns = {t: state.ready(t < uneven_from) for t in range(1, 17)}
        return [t for t, turn in all_turns.items() if turn.joins], [
            t for t in all_turns if all_turns[t].starts
        ]

    assert turns(1) == ([6, 11, 16], [5, 10, 15])
    assert turns(3) == ([8, 13], [5, 10, 15])
    assert turns(5) == ([10, 15], [5, 10, 15])
    assert turns(3, uneven_from=12) == ([8, 12, 13, 14, 15, 16], [5, 10, 12, 13, 14, 15, 16])


@pytest.mark.parametrize(("every", "triggers"), [(0, 0), (1, 6), (2, 3), (3, 2)])
def test_drifts_can_be_had_at_a_given_rate(every: int, triggers: int) -> None:
    """Whatever the queries look at; the windows are looked at as ever."""
    for where in (EARLY, LATE):
        state = layer(drift_every=every)
        q, k, v = planted(EARLY)
        state.prefill(q, k, v, None)
        feed(state, k, where, 30)
        assert state.counters()["triggers"] == triggers
        assert state.counters()["windows"] == 6
        looked_at = set(where) <= set(state.kept()[0][1].tolist())
        assert looked_at == (triggers > 0 or where == EARLY)


def test_a_given_rate_is_checked_and_noted() -> None:
    with pytest.raises(ValueError, match="drift_every=-1"):
        make("heterocache", drift_every=-1)
    budget = Budget(kept_fraction=0.5)
    notes = {
        every: HeteroCache(profile=MIXED, drift_every=every).notes(FOUR_LAYERS, budget, 1600)
        for every in (None, 0, 10)
    }
    assert notes[None] == []
    assert "drift never" in notes[0][0]
    assert "every 10th window" in notes[10][0]


@pytest.mark.parametrize("visible_after", [1, 4])
def test_what_is_staged_is_planned_counted_and_noted(visible_after: int) -> None:
    """A second copy of what satellites keep, only where a refresh waits to be seen."""
    shape = Geometry(layers=1, query_heads=8, kv_heads=4, head_dim=32, fingerprint="x")
    method = HeteroCache(profile=PIVOT_AND_SATELLITE, visible_after=visible_after)
    budget, n = Budget(kept_fraction=0.5), 8192
    (state,) = method.layers(shape, budget, [n])
    state.backend = BACKENDS["sdpa"]
    state.prefill(*(torch.randn(1, heads, n, 32) for heads in (8, 4, 4)), None)
    measured, satellite = state.nbytes()["device"], len(state.kept()[0][1]) * 2 * 32 * 4
    plan = method.usage(shape, budget, n, 4)
    assert measured["payload"] + measured["metadata"] == pytest.approx(plan.device_bytes, rel=0.01)
    staged = measured["metadata"] > satellite
    assert staged == (visible_after > 1)
    assert any("staging buffer" in note for note in method.notes(shape, budget, n)) == staged
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held_tensors(state)}
    total = sum(sum(side.values()) for side in state.nbytes().values())
    assert total == sum(held.values())


def held_tensors(state: HeteroLayer) -> list[Tensor]:
    return [_at(container, key) for _, container, key in tensors_of(state)]
