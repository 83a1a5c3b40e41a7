"""Invariant 3: bytes are the formula's, real, and freed; nothing of query-head width is cached."""

from __future__ import annotations

import gc
import weakref
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from hcache import Generator, InfeasibleBudget, KVCache
from hcache.contract.cases import CASES, Case
from hcache.contract.tiny_models import prompts, tiny_model
from hcache.methods import Usage

TOKENS = 700


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def filled(case: Case, budget: float | int, padded: bool = False) -> KVCache:
    model = case.model()
    ids, mask = prompts(2, TOKENS, padded)
    cache = case.cache(model, budget)
    with torch.inference_mode():
        model(ids, attention_mask=mask, past_key_values=cache)
    return cache


def planned(cache: KVCache) -> list[Usage]:
    """What the method plans for each prompt of the cache."""
    return [cache.method.usage(cache.geometry, cache.budget, n, 4) for n in cache.prompt_tokens]


@pytest.mark.parametrize("budget", [0.43, 0.5, 301])
def test_measured_bytes_are_those_planned(case: Case, budget: float | int) -> None:
    """Within 1%, beside the store's own tables, a few bytes for every 64 slots."""
    cache = filled(case, budget)
    plans, measured = planned(cache), cache.nbytes()
    device = measured["device"]["payload"] + measured["device"]["metadata"]
    store_tables = 24 * len(cache.states) * len(plans) * cache.geometry.kv_heads * -(-TOKENS // 64)
    assert device == pytest.approx(sum(p.device_bytes for p in plans), rel=0.01, abs=store_tables)
    assert measured["host"]["payload"] == pytest.approx(sum(p.host_bytes for p in plans), rel=0.01)


@pytest.mark.parametrize("budget", [0.43, 0.5, 301])
def test_payload_is_exact_where_a_budget_is_nothing_but_tokens(case: Case, budget: float | int) -> None:
    cache = filled(case, budget, padded=True)
    plans, token = planned(cache), 2 * cache.geometry.head_dim * 4
    assert cache.full_nbytes() == sum(cache.prompt_tokens) * cache.geometry.heads * token
    if any(set(plan.parts) != {"tokens"} for plan in plans):
        pytest.skip("also keeps other things than tokens")
    kept = sum(int(plan.parts["tokens"]) for plan in plans)
    assert cache.nbytes()["device"]["payload"] == kept * cache.geometry.heads * token


@pytest.mark.parametrize("budget", [0.43, 0.5, 301])
def test_a_budget_is_spent_and_never_exceeded(case: Case, budget: float | int) -> None:
    """Of what a budget of this method means: what is held, or what is attended to where all is held."""
    cache = filled(case, budget)
    if not cache.method.uses_budget:
        pytest.skip("keeps everything whatever the budget")
    (plan, *_), n = planned(cache), TOKENS
    asked, full = cache.budget.tokens(n) / n, cache.full_nbytes() / len(cache.prompt_tokens)
    held, attended = plan.device_bytes / full, plan.attended_tokens / n
    spent = attended if held >= 1 else held
    step = case.grain / n
    tables = 0.05  # charged by nobody: a few bytes a token beside keys and values of 16 numbers
    assert asked - step <= spent <= asked + tables


def test_kept_positions_are_what_is_planned_to_be_attended_to(case: Case) -> None:
    cache = filled(case, 0.45)
    plans = planned(cache)
    total = sum(h.numel() for layer in range(cache.geometry.layers) for h in cache.kept(layer)[0])
    assert total / cache.geometry.heads == pytest.approx(plans[0].attended_tokens)
    assert cache.attended_fraction() == pytest.approx(plans[0].attended_tokens / TOKENS)


OUTSIDE = (torch.nn.Module, type, ModuleType, FunctionType)


def reachable_bytes(root: object) -> int:
    """Bytes of all tensor storages that are reachable from an object without passing a module or function."""
    storages, seen, queue = {}, set(), [root]
    while queue:
        thing = queue.pop()
        if id(thing) in seen or isinstance(thing, OUTSIDE):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        else:
            queue += gc.get_referents(thing)
    return sum(storages.values())


def test_nbytes_count_every_tensor_that_the_states_hold(case: Case) -> None:
    cache = filled(case, 0.45)
    # Positions are a record for kept(), on the host; no step reads them.
    kept = [p for state in cache.states for sequence in getattr(state, "_kept", []) for p in sequence]
    record = sum({p.data_ptr(): p.nbytes for p in kept}.values())
    counted = sum(sum(side.values()) for side in cache.nbytes().values())
    held = reachable_bytes([vars(state) for state in cache.states])
    assert held == pytest.approx(counted + record, rel=0.01)


def test_freeing_the_cache_frees_its_states(case: Case) -> None:
    cache = filled(case, 0.45)
    alive = [weakref.ref(state) for state in cache.states]
    del cache
    assert all(state() is None for state in alive), "states must not wait for the garbage collector"


def test_nothing_of_query_head_width_is_cached(case: Case) -> None:
    """With one KV head for four query heads, a cache of query-head width is four times the full one."""
    model = case.model(kv_heads=1)
    ids, _ = prompts(1, 200)
    cache = case.cache(model, 0.6)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    for side in cache.nbytes().values():
        assert side["payload"] <= cache.full_nbytes()


def test_constant_methods_stay_and_others_grow_by_one_token_a_step(case: Case) -> None:
    model = case.model()
    ids, _ = prompts(1, 80)
    cache = case.cache(model, 0.5)
    token = 2 * cache.geometry.head_dim * 4 * cache.geometry.heads
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        start = cache.nbytes()["device"]["payload"]
        for t in range(1, 90):
            model(ids[:, t % 80 : t % 80 + 1], past_key_values=cache)
            growth = 0 if cache.method.constant_size else t * token
            assert cache.nbytes()["device"]["payload"] == start + growth


def test_a_constant_size_begins_where_the_budget_is_reached() -> None:
    model = tiny_model()
    ids, _ = prompts(1, 20)
    cache = KVCache(model, "streaming_llm", 30)
    token = 2 * 16 * 4 * cache.geometry.heads
    sizes = []
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        for _ in range(15):
            sizes.append(cache.nbytes()["device"]["payload"] // token)
            model(ids[:, :1], past_key_values=cache)
    assert sizes == [*range(20, 31), 30, 30, 30, 30]


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_prefill_lets_go_of_a_layer_before_the_next_one_starts(
    case: Case, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a layer's keys and values come, the storages of those of all layers before it are gone."""
    seen: list[StorageWeakRef] = []
    original = KVCache.update

    def update(self: KVCache, keys: torch.Tensor, values: torch.Tensor, *rest: Any, **named: Any) -> Any:
        assert all(storage.expired() for storage in seen)
        seen.extend(StorageWeakRef(x.untyped_storage()) for x in (keys, values))
        return original(self, keys, values, *rest, **named)

    monkeypatch.setattr(KVCache, "update", update)
    cache = filled(case, 0.45, padded)
    assert len(seen) == 2 * cache.geometry.layers


def test_an_infeasible_budget_names_the_smallest(case: Case) -> None:
    model = case.model()
    ids, _ = prompts(1, 100)
    if not case.make(model).uses_budget:
        pytest.skip("keeps everything whatever the budget")
    with pytest.raises(InfeasibleBudget) as caught:
        Generator(model, case.make(model), 0.01).generate(ids, max_new_tokens=1)
    smallest = caught.value.smallest_tokens
    out = Generator(model, case.make(model), smallest).generate(ids, max_new_tokens=1)
    assert min(out.memory.resident_fraction, out.counters["attended_fraction"]) < 1
    if smallest > 2:
        with pytest.raises(InfeasibleBudget):
            Generator(model, case.make(model), smallest - 1).generate(ids, max_new_tokens=1)
