"""The embedded model's tokenizer: one token a byte, ids 0 to 255, then pad, begin and end.

A byte-level BPE without merges, so that `AutoTokenizer.from_pretrained` loads it without any code of ours.
Adds no special token by itself. Reading replaces bytes that are no UTF-8; writing never does.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIALS = ("<|pad|>", "<|begin|>", "<|end|>")  # ids 256, 257, 258


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE: itself where it is printable."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A fresh tokenizer."""
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    pad, begin, end = SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=begin,
        eos_token=end,
        padding_side="left",
        model_max_length=16384,
        clean_up_tokenization_spaces=False,
    )


def write_tokenizer(directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    byte_tokenizer().save_pretrained(directory)
