"""runner.trace: the first examples of each task leave what was kept of them, what pivots saw (hcache.trace).

A batch with such an example decodes eagerly, with plain torch where pivots are watched, since nothing can be
looked at inside captured steps: `engine.reasons` and a note of the record say so, and its times are those of
a run that is looked at. Knows no method by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hcache import trace
from hcache.engine import Generation, Generator, Session
from hcache.kv_cache import KVCache
from hcache.trace import Positions, Trace, Window
from runners.prompts import Prompt


class Tracing:
    """The examples of a cell that are traced.

    Args:
        directory: of the cell.
        count: examples of each task; 0 traces nothing.
        prompts: all of the cell, in order.
    """

    def __init__(self, directory: Path, count: int, prompts: Sequence[Prompt]) -> None:
        self._directory = directory
        by_task: dict[str, list[tuple[str, str]]] = {}
        for prompt in prompts:
            by_task.setdefault(prompt.example.task, []).append(prompt.key)
        self._keys = {key for keys in by_task.values() for key in keys[:count]}

    def notes(self) -> list[str]:
        """What a reader must know."""
        few = f"traced examples: {len(self._keys)}; their batches decode eagerly, and looking takes time"
        return [few] if self._keys else []

    def wants(self, batch: Sequence[Prompt]) -> bool:
        """Whether any of the batch is traced."""
        return any(prompt.key in self._keys for prompt in batch)

    def generate(self, generator: Generator, batch: Sequence[Prompt], *ids: Any, **asked: Any) -> Generation:
        """Generator.generate of an eager one, which leaves the traces."""
        session = generator.begin(*ids, **asked)
        first = _kept(session.cache)
        for state in session.cache.states:
            state.journal = []
        session.decode()
        generation = session.result()
        for b, one in enumerate(batch):
            if one.key in self._keys:
                trace.write(self._directory, _trace(session, generation, one, b, first[b]))
        return generation


def _trace(session: Session, generation: Generation, prompt: Prompt, b: int, first: Positions) -> Trace:
    cache, (task, name) = session.cache, prompt.key
    tokens = cache.prompt_tokens[b]
    return Trace(
        task,
        name,
        cache.method.name,
        tokens,
        generation.lengths[b],
        first,
        _kept(cache)[b],
        [
            Window(layer, note.head, note.number, note.overlap, note.drifted)
            for layer, state in enumerate(cache.states)
            for note in state.journal or ()
            if note.sequence == b
        ],
        cache.method.outline(cache.geometry, cache.budget, tokens),
    )


def _kept(cache: KVCache) -> list[Positions]:
    """[sequence][layer][KV head] positions."""
    layers = [cache.kept(layer) for layer in range(len(cache.states))]
    return [
        [[head.cpu().numpy() for head in layer[b]] for layer in layers]
        for b in range(len(cache.prompt_tokens))
    ]
