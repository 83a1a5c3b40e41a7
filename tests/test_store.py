"""The ragged store and the attention backends over it."""

from __future__ import annotations

import pytest
import torch

from hcache.attention import backends
from hcache.attention.backends import BACKENDS, CHUNK, resolve
from hcache.cache.room import Room, StickyRoom
from hcache.cache.store import RaggedStore

DIM = 16
PLAIN = sorted(set(BACKENDS) - {"reference", "triton"})
"""Backends that need nothing but torch; for Triton's see test_kernels.py."""


def filled(
    lengths: list[int], dtype: torch.dtype = torch.float32, spare: int = 1
) -> tuple[RaggedStore, list]:
    """A store with random contents, and the contents."""
    generator = torch.Generator().manual_seed(sum(lengths))
    contents = [torch.randn(2, n, DIM, generator=generator).to(dtype) for n in lengths]
    store = RaggedStore(lengths, like=torch.empty(0, DIM, dtype=dtype), spare=spare)
    for s, (k, v) in enumerate(contents):
        store.write(s, 0, k, v)
    return store, contents


def assert_holds(store: RaggedStore, contents: list) -> None:
    for s, (k, v) in enumerate(contents):
        keys, values = store.read(s, k.shape[0])
        torch.testing.assert_close(keys, k, rtol=0, atol=0)
        torch.testing.assert_close(values, v, rtol=0, atol=0)


@pytest.mark.parametrize("lengths", [[3, 0, 64, 65], [1], [200, 5]])
def test_appending_far_beyond_the_room_keeps_every_token(lengths: list[int]) -> None:
    store, contents = filled(lengths)
    for step in range(3 * CHUNK):
        k, v = torch.randn(2, len(lengths), 1, DIM)
        store.expect(1)
        limits = store.append(k, v)
        contents = [torch.cat([old, torch.stack([k[s], v[s]])], 1) for s, old in enumerate(contents)]
        assert limits.flatten().tolist() == [n + step + 1 for n in lengths]
    assert_holds(store, contents)


def test_pads_leave_no_trace_and_unused_slots_stay_zero() -> None:
    store, contents = filled([5, 63])
    valid = torch.tensor([[False, True, False, True], [False, False, True, False]])
    k, v = torch.randn(2, 2, 4, DIM)
    k[~valid] = torch.nan
    store.expect(4)
    limits = store.append(k, v, valid)
    assert limits.tolist() == [[5, 6, 6, 7], [63, 63, 64, 64]]
    contents = [torch.cat([old, torch.stack([k[s], v[s]])[:, valid[s]]], 1) for s, old in enumerate(contents)]
    assert_holds(store, contents)
    used = torch.zeros(store.keys.shape[0], dtype=torch.bool)
    for first, length in zip(store.offsets, store.lengths.tolist(), strict=True):
        used[first : first + length] = True
    assert store.keys[~used].abs().sum() == 0


def test_put_overwrites_one_slot_and_skips_segments_without_a_token() -> None:
    store, contents = filled([5, 7])
    store.grow([6, 8])
    k, v = torch.randn(2, 2, DIM)
    store.put(torch.tensor([5, 2]), k, v, torch.tensor([True, False]))
    contents[0] = torch.cat([contents[0], torch.stack([k[0], v[0]]).unsqueeze(1)], 1)
    assert store.lengths.tolist() == [6, 7]
    assert_holds(store, contents)


def test_nbytes_are_those_of_the_buffers() -> None:
    store, _ = filled([5, 200], dtype=torch.bfloat16)
    sizes = store.nbytes()
    assert sizes["payload"] == 205 * 2 * DIM * 2
    assert sizes["payload"] + sizes["reserved"] == store.keys.nbytes + store.values.nbytes


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 5])
def test_backends_agree_with_the_reference_on_ragged_layouts(
    name: str, dtype: torch.dtype, group: int, tokens: int
) -> None:
    store, _ = filled([3, 64, 0, 130], dtype)
    store.expect(tokens)
    limits = store.append(*torch.randn(2, 4, tokens, DIM).to(dtype))
    q = torch.randn(2, 2 * group, tokens, DIM).to(dtype)
    expected = BACKENDS["reference"].decode(q, store.ragged(), limits)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(
        BACKENDS[name].decode(q, store.ragged(), limits), expected, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("name", PLAIN)
def test_large_logits_keep_their_precision_in_bfloat16(name: str) -> None:
    """Logits of 20 rounded to bfloat16 before the softmax would be off by more than this."""
    store, _ = filled([900, 700], torch.bfloat16)
    q = (5 * torch.randn(1, 4, 1, DIM, generator=torch.Generator().manual_seed(0))).bfloat16()
    limits = torch.tensor([[900], [700]])
    expected = BACKENDS["reference"].decode(q, store.ragged(), limits).float()
    error = (BACKENDS[name].decode(q, store.ragged(), limits).float() - expected).abs().max()
    assert error <= 2**-7 * expected.abs().max()


def test_long_extensions_are_attended_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = filled([3, 130])
    store.expect(11)
    limits = store.append(*torch.randn(2, 2, 11, DIM))
    q = torch.randn(1, 4, 11, DIM)
    whole = BACKENDS["sdpa"].decode(q, store.ragged(), limits)
    monkeypatch.setattr(backends, "SCRATCH_NUMBERS", 3000)
    torch.testing.assert_close(BACKENDS["sdpa"].decode(q, store.ragged(), limits), whole)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("group", [1, 4])
def test_backends_agree_with_the_reference_on_a_prompt(name: str, group: int) -> None:
    q, k, v = torch.randn(2, 2 * group, 33, DIM), torch.randn(2, 2, 33, DIM), torch.randn(2, 2, 33, DIM)
    expected = BACKENDS["reference"].prefill(q, k, v)
    torch.testing.assert_close(BACKENDS[name].prefill(q, k, v), expected, rtol=1e-5, atol=1e-5)


def test_a_row_that_may_see_nothing_is_zero_and_not_nan() -> None:
    store, _ = filled([4, 4])
    q = torch.randn(1, 2, 1, DIM)
    for name in ("reference", *PLAIN):
        one = BACKENDS[name]
        out = one.decode(q, store.ragged(), torch.tensor([[0], [4]]))
        assert out[0, 0].abs().sum() == 0
        assert out[0, 1].abs().sum() > 0


def test_unknown_backend_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'sdpa'.*reference"):
        resolve("spda")


@pytest.mark.parametrize("before", [[], [900, 400, 30]])
def test_a_store_settles_in_a_room_once_its_size_is_known(before: list[int]) -> None:
    """Whatever it held before it was cut; where nothing has to move, nothing does."""
    room = StickyRoom()
    for _ in before[:1]:
        RaggedStore(before, torch.empty(0, DIM), room=room)
    store, contents = filled([700, 5, 130])
    store.keep([torch.arange(0, 700, 7), torch.arange(5), torch.arange(130)])
    store.settle(room)
    contents[0] = contents[0][:, ::7]
    assert_holds(store, contents)
    assert store.moves == 0
    assert store.keys.shape[0] == CHUNK * (room.size("granules", 0) if before else 6)
    assert store.longest == CHUNK * room.size("longest", 0)
    store.expect(1)
    k, v = torch.randn(2, 3, 1, DIM)
    store.append(k, v)
    assert_holds(store, [torch.cat([old, torch.stack([k[s], v[s]])], 1) for s, old in enumerate(contents)])
    plain, _ = filled([70, 5])
    keys = plain.keys
    plain.settle(Room())
    assert plain.keys is keys
