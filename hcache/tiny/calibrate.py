"""Calibration texts for the embedded model's head profile: prompts in which it retrieves.

`python -m hcache.tiny.calibrate DIR` writes them; README.md beside this file has the command that makes the
profile of them. The profile's generated tokens then are answers, so a head that moves from fact to fact while
answering is seen to move. Keys, values and prose are of a seed that no benchmark uses by default.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hcache.benchmarks.retrieval import Retrieval

SEED = 999
TEXTS = 4
LENGTH = 2048


def write(directory: Path) -> list[Path]:
    """Write text-0.txt and so on, LENGTH bytes each, ending in a question for four codes; the paths."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = Retrieval(tasks=("multi",), lengths=(LENGTH,), examples_per_task=TEXTS, seed=SEED)
    paths = []
    for example in settings.examples(None):
        path = directory / f"text-{example.id}.txt"
        path.write_text(example.prompt, encoding="utf-8")
        paths.append(path)
    return paths


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m hcache.tiny.calibrate DIR")
    print(*write(Path(sys.argv[1])), sep="\n")
