"""The embedded model: a small Llama that reads bytes and recalls facts, with the code that trained it.

`directory()` is where the shipped weights, tokenizer, training log and scores lie. Nothing here loads a
model.
"""

from pathlib import Path


def directory() -> Path:
    """The folder of the shipped files: weights, config, tokenizer, log and scores."""
    return Path(__file__).parent / "weights"
