"""HeteroCache: role budgets, drift, refresh. Small states with planted keys, and brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hcache import Budget, Generator, Geometry, HeadProfile, InfeasibleBudget
from hcache.attention.backends import BACKENDS
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


def test_overlap_and_selection_equal_brute_force() -> None:
    """Random queries: the decision and the refreshed set, computed again with plain loops."""
    q, k, v = (torch.randn(1, h, N, DIM, generator=torch.Generator().manual_seed(h)) for h in (8, 4, 5))
    v = v[:, :4]
    for seed in range(12):
        state = layer(drift_threshold=0.75)
        state.prefill(q, k, v, None)
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
