"""From an example's parts to the text that a model reads: cut to length, and put into its chat template.

Cutting follows LongBench's pred.py, which others took over: of a prompt that is too long the first and the
last half of the tokens allowed stay, decoded and joined; the chat template comes around it afterwards.
"""

from __future__ import annotations

from typing import Any, NamedTuple

MARK = "\N{SYMBOL FOR NULL}hcache\N{SYMBOL FOR NULL}"
"""Stands for the user's message while a template is rendered."""

SPARE_TOKENS = 8
"""Left free behind an answer: joined pieces of text may take a few tokens more than the pieces did."""


class Frame(NamedTuple):
    """What a chat template puts around a user's message.

    Args:
        head, tail: before and behind it; both empty without a template.
        trims: space around the message is taken away.
    """

    head: str = ""
    tail: str = ""
    trims: bool = False


class Wording(NamedTuple):
    """An example as text, in two parts.

    Args:
        context: chat header and context; what is compressed where the question comes later.
        question: question, end of the user's turn, and how the answer begins.
        cut: the middle was taken out.
    """

    context: str
    question: str
    cut: bool


def has_template(tokenizer: Any) -> bool:
    """Whether there is a chat template to put prompts into."""
    return bool(getattr(tokenizer, "chat_template", None))


def frame_of(tokenizer: Any, system: str | None) -> Frame:
    """The template's text around a user's message, after a system message if there is one."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": f" {MARK} "})
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    head, mark, tail = text.partition(MARK)
    if not mark:
        raise ValueError("the model's chat template leaves the user's message out; use a model with another")
    trims = not head.endswith(" ")
    return Frame(head, tail, True) if trims else Frame(head[:-1], tail[1:], False)


def worded(tokenizer: Any, example: Any, rule: int | None, window: int) -> Wording:
    """The text of an example.

    Args:
        rule: tokens of context and question at most, by the benchmark's protocol; None cuts nothing.
        window: positions of the model: a rule that leaves no room for frame and answer is lowered.
    """
    frame = frame_of(tokenizer, example.system) if example.chat and has_template(tokenizer) else Frame()
    context, question, cut = example.context, example.question, False
    if rule is not None:
        around = len(tokenizer.encode(frame.head + frame.tail + example.answer_prefix))
        rule = min(rule, window - around - example.max_new_tokens - SPARE_TOKENS)
        context, question, cut = shortened(tokenizer, context, question, rule)
    if frame.trims:
        context, question = context.lstrip(), question.rstrip()
        context = context if question else context.rstrip()
    return Wording(frame.head + context, question + frame.tail + example.answer_prefix, cut)


def shortened(tokenizer: Any, context: str, question: str, most: int) -> tuple[str, str, bool]:
    """Context and question without their middle if they have more than `most` tokens, and whether they had.

    Raises:
        ValueError: `most` leaves nothing.
    """
    if most < 2:
        raise ValueError(f"the model's window leaves {most} tokens for a prompt: too few; use another model")
    ids = tokenizer.encode(context + question)
    if len(ids) <= most:
        return context, question, False
    half = most // 2
    first, last = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
    if last.endswith(question):
        return first + last[: len(last) - len(question)], question, True
    return first, last, True
