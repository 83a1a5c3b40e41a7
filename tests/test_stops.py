"""Stop texts as tokens, of both kinds of tokenizers."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hcache.stops import stop_ids


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: a space before every text, bytes for what has no token."""
    pieces = [
        "<unk>",
        "<s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "\u2581",
        "a",
        "Q",
        ":",
        "\u2581Q",
        "Q:",
        "\u2581Q:",
    ]
    merges = [("\u2581", "Q"), ("Q", ":"), ("\u2581Q", ":")]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    made = Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    parts = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    made.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


def bytelevel() -> PreTrainedTokenizerFast:
    """As Llama 3 has it: every text is its bytes, and some of them together."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, "\u010a\u010a", "Q:"]
    model = models.BPE({p: i for i, p in enumerate(pieces)}, [("\u010a", "\u010a"), ("Q", ":")])
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("text", ["\n", "\n\n", "a", "\na", "Q:", "a\n"])
@pytest.mark.parametrize("make", [sentencepiece, bytelevel])
def test_they_are_what_comes_in_the_middle_of_a_text(make, text: str) -> None:
    tokenizer = make()
    whole = tokenizer.encode(f"aa{text}", add_special_tokens=False)
    found = stop_ids(tokenizer, text)
    if (make, text) == (sentencepiece, "Q:"):  # alone it is one token with its space
        assert tokenizer.convert_ids_to_tokens(found) == ["\u2581Q:"]
    else:
        assert whole[-len(found) :] == found
        assert tokenizer.decode(whole[: -len(found)]) == "aa"


def test_a_line_break_is_its_last_token() -> None:
    """What LongBench's code takes for samsum."""
    for tokenizer in (sentencepiece(), bytelevel()):
        assert stop_ids(tokenizer, "\n") == tokenizer.encode("\n", add_special_tokens=False)[-1:]
    assert len(sentencepiece().encode("\n", add_special_tokens=False)) == 2
