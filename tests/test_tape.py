"""Choosing tokens and seeing where texts end, on tensors alone."""

from __future__ import annotations

import random

import pytest
import torch

from hcache import tape
from hcache.cache.room import Room, StickyRoom
from hcache.tape import Sampling, Tape, barred, padded, text_span


def slow_span(tokens: list[int], ends: list[tuple[int, ...]]) -> tuple[int, int]:
    for count in range(1, len(tokens) + 1):
        written = tokens[:count]
        reached = [end for end in ends if len(end) <= count and tuple(written[-len(end) :]) == end]
        if reached:
            return count - max(map(len, reached)), count
    return len(tokens), len(tokens)


def test_what_is_barred_is_never_chosen() -> None:
    logits_BV = torch.tensor([[3.0, 2.0, 1.0], [0.0, 5.0, 4.0]])
    assert Sampling().choose(barred(logits_BV, [0, 1])).tolist() == [2, 2]
    assert Sampling().choose(barred(logits_BV, [0])).tolist() == [1, 1]
    assert torch.equal(barred(logits_BV, []), logits_BV)
    torch.manual_seed(0)
    drawn = [Sampling(5.0).choose(barred(logits_BV, [1])).tolist() for _ in range(50)]
    assert {token for row in drawn for token in row} == {0, 2}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("room", [Room, StickyRoom])
def test_the_tape_sees_an_end_with_the_token_that_completes_it(seed: int, room: type[Room]) -> None:
    draw = random.Random(seed)
    ends = [tuple(draw.choices(range(3), k=draw.randint(1, 4))) for _ in range(draw.randint(0, 3))]
    rows = [[draw.randrange(3) for _ in range(12)] for _ in range(4)]
    written = Tape(torch.tensor([row[0] for row in rows]), 12, ends, room())
    for count in range(1, 13):
        spans = [slow_span(row[:count], ends) for row in rows]
        ended = [any(slow_span(row[:n], ends)[0] < n for n in range(1, count + 1)) for row in rows]
        assert written.done_B.tolist() == ended
        assert written.finished.tolist() == [all(ended)]
        assert [text_span(row[:count], ends) for row in rows] == spans
        if count < 12:
            written.write(torch.tensor([row[count] for row in rows]))
    assert written.rows(12) == rows


def test_a_tape_with_other_ends_fits_in_the_room_of_the_first() -> None:
    room = StickyRoom()
    first = Tape(torch.tensor([5, 5]), 8, [(1, 2, 3), (9,)], room)
    room.adopt(first)
    second = Tape(torch.tensor([5, 7]), 6, [(7,)], room)
    room.adopt(second)
    assert room.forget_changes() == 0
    assert second.done_B.tolist() == [False, True]
    first.write(torch.tensor([7, 8]))  # as a captured step does: with the first one's tensors
    assert second.done_B.tolist() == [True, True]
    assert second.rows(2) == [[5, 7], [7, 8]]


def test_greedy_takes_the_most_likely_token() -> None:
    logits = torch.randn(5, 40)
    assert torch.equal(Sampling().choose(logits), logits.argmax(-1))


def test_tokens_are_drawn_by_their_shares() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    drawn = Sampling(temperature=0.7).choose(logits.expand(20000, -1))
    shares = (logits[0] / 0.7).softmax(-1)
    torch.testing.assert_close(drawn.bincount(minlength=4) / 20000, shares, rtol=0, atol=0.012)


def test_top_p_leaves_the_fewest_tokens_that_reach_it() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().expand(5000, -1)
    seen = {p: set(Sampling(1.0, p).choose(logits).tolist()) for p in (0.4, 0.6, 0.8, 1.0)}
    assert seen == {0.4: {1}, 0.6: {1, 3}, 0.8: {1, 2, 3}, 1.0: {0, 1, 2, 3}}


@pytest.mark.parametrize(("temperature", "top_p"), [(-1.0, 1.0), (1.0, 0.0), (1.0, 1.5), (0.0, 0.9)])
def test_sampling_that_cannot_be_is_refused(temperature: float, top_p: float) -> None:
    with pytest.raises(ValueError, match=r"temperature|top_p"):
        Sampling(temperature, top_p)


def test_what_is_behind_a_text_is_padding() -> None:
    assert padded([[4, 5, 6], [7, 8, 9]], [3, 1], 0).tolist() == [[4, 5, 6], [7, 0, 0]]


@pytest.mark.parametrize("size", [100, 128, 1024])
def test_the_largest_is_found_piece_by_piece(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    logits = torch.randint(0, 4, (50, size)).float()
    logits[:, : size // 2] -= torch.randint(0, 3, (50, 1))
    assert torch.equal(tape.largest(logits), logits.argmax(-1))
