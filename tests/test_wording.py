"""Prompts as text: chat templates around them, and what is cut out of long ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hcache.benchmarks import Example
from runners.prompts import _first
from runners.wording import SPARE_TOKENS, frame_of, shortened, worded

EXAMPLE = Example("t", "0", "some context. ", "what is it? ", "It is", ("x",), 5, (), "exact", chat=True)
LONG = replace(EXAMPLE, context="".join(f"c{i} " for i in range(90)))


class Words:
    """A tokenizer of words and the space behind them, with a start token of its own."""

    bos_token = "<s>"

    def __init__(self, template: str | None = None) -> None:
        self.chat_template = template
        self.known: list[str] = ["<s>"]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [0] if add_special_tokens else []
        for word in text.replace(" ", " \n").split("\n"):
            if word:
                if word not in self.known:
                    self.known.append(word)
                ids.append(self.known.index(word))
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.known[i] for i in ids if i or not skip_special_tokens)

    def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        assert add_generation_prompt
        assert not tokenize
        assert self.chat_template is not None
        system = "".join(f"[S]{m['content']}" for m in messages if m["role"] == "system")
        user = messages[-1]["content"]
        return self.chat_template.format(system=system, user=user, trimmed=user.strip())


PLAIN, TRIMMING = "<s>{system}[U]{user}[A]", "<s>{system}[U]{trimmed}[A]"


def test_without_a_template_parts_are_joined() -> None:
    words = worded(Words(), EXAMPLE, None, 100)
    assert words.context + words.question == EXAMPLE.prompt
    assert not words.cut


def test_an_example_that_wants_no_chat_gets_none() -> None:
    words = worded(Words(PLAIN), replace(EXAMPLE, chat=False), None, 100)
    assert words.context + words.question == EXAMPLE.prompt


def test_the_answer_prefix_stands_in_the_models_own_turn() -> None:
    words = worded(Words(PLAIN), EXAMPLE, None, 100)
    assert words.context == "<s>[U]some context. "
    assert words.question == "what is it? [A]It is"


def test_a_template_that_trims_trims_here_too() -> None:
    example = replace(EXAMPLE, context=" a ", question=" b ", system="be short")
    words = worded(Words(TRIMMING), example, None, 100)
    assert words.context + words.question == "<s>[S]be short[U]a  b[A]It is"
    plain = worded(Words(PLAIN), example, None, 100)
    assert plain.context + plain.question == "<s>[S]be short[U] a  b [A]It is"
    alone = worded(Words(TRIMMING), replace(example, question=""), None, 100)
    assert alone.context == "<s>[S]be short[U]a"


def test_a_template_without_the_message_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves the user's message out"):
        frame_of(Words("<s>[U][A]"), None)


def test_a_start_token_of_the_template_is_not_doubled() -> None:
    tokenizer = Words(PLAIN)
    assert _first(tokenizer, "a b").tolist().count(0) == 1
    assert _first(tokenizer, "a b<s>").tolist().count(0) == 1
    assert _first(tokenizer, "<s> [U]a b").tolist().count(0) == 0  # with its space it is a word here


@pytest.mark.parametrize("most", [8, 9, 20])
def test_the_middle_is_taken_out(most: int) -> None:
    """As many tokens as are allowed stay, half of them at each end; the start token counts, and goes."""
    tokenizer = Words()
    context, question = "".join(f"c{i} " for i in range(50)), "q0 q1 q2"
    short, asked, cut = shortened(tokenizer, context, question, most)
    assert cut
    assert asked == question
    half = most // 2
    ids = tokenizer.encode(context + question)
    assert short + asked == tokenizer.decode(ids[1:half]) + tokenizer.decode(ids[-half:])


def test_what_fits_stays_as_it_is() -> None:
    assert shortened(Words(), "a b ", "c", 4) == ("a b ", "c", False)
    assert shortened(Words(), "a b ", "c", 3)[2]


def test_two_tokens_are_the_fewest_that_are_kept() -> None:
    assert shortened(Words(), "a b ", "c", 2) == ("", "c", True)
    for most in (1, 0, -5):
        with pytest.raises(ValueError, match=f"window leaves {most} tokens"):
            shortened(Words(), "a b ", "c", most)


def test_a_question_longer_than_half_keeps_its_end() -> None:
    assert shortened(Words(), "a b c d ", "e f g h i j", 6) == ("a b ", "h i j", True)


def test_a_rule_that_leaves_no_room_for_the_answer_is_lowered() -> None:
    tokenizer = Words(PLAIN)
    words = worded(tokenizer, LONG, 1000, 60)
    assert words.cut
    total = len(tokenizer.encode(words.context + words.question))
    assert 30 < total <= 60 - LONG.max_new_tokens - SPARE_TOKENS + 2
    assert not worded(tokenizer, LONG, 1000, 500).cut


def test_a_rule_is_of_context_and_question_alone() -> None:
    words = worded(Words(PLAIN), LONG, 20, 500)
    middle = words.context.removeprefix("<s>[U]") + words.question.removesuffix("[A]It is")
    assert len(Words().encode(middle)) == 20


@pytest.mark.parametrize("prefix", ["It is", "It " * 15])
def test_a_lowered_rule_leaves_room_for_frame_and_answer(prefix: str) -> None:
    """Even where the frame or the beginning of the answer takes most of the window."""
    tokenizer = Words("<s>{system}" + "be kind " * 20 + "[U]{user}" + "be brief " * 10 + "[A]")
    words = worded(tokenizer, replace(LONG, answer_prefix=prefix), 1000, 110)
    total = len(tokenizer.encode(words.context + words.question)) + LONG.max_new_tokens
    assert 110 - SPARE_TOKENS - 4 <= total <= 110


def test_a_window_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="window leaves"):
        worded(Words(), EXAMPLE, 1000, 12)
