"""Room that stays: sizes and buffers of one layer that are the same for every prompt, so that steps captured
once serve all of them.

A captured step has addresses, shapes and host numbers baked in. Sizes are therefore rounded up and never
shrink, and what a new prompt's state holds is copied into the tensors that the captured step reads. Where it
doesn't fit, the room says that something has changed. Knows tensors and names; nothing of layers, methods or
graphs.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

STEPS_PER_DOUBLING = 8
"""Sizes come in this many steps from one power of two to the next: at most an eighth is reserve."""


class Held:
    """Objects whose tensors a step may use. Lists, dicts and other such objects in them are followed.

    Attributes:
        off_step: names of attributes that no step reads.
    """

    off_step: ClassVar[tuple[str, ...]] = ()


class Room:
    """No memory of earlier prompts: every size is what is needed, every buffer is fresh."""

    def size(self, name: str, needed: int) -> int:
        """Room for `needed` of what `name` counts; at least as much."""
        return needed

    def buffer(self, name: str, shape: tuple[int, ...], like: Tensor, pinned: bool = False) -> Tensor:
        """An uninitialised buffer of at least `shape[0]` rows: on the device of `like`, or in host memory,
        page-locked if `pinned`.
        """
        if not pinned:
            return like.new_empty(shape)
        held = torch.empty(shape, dtype=like.dtype)
        if like.device.type == "cuda":
            _pin(held)
        return held

    def adopt(self, state: Held) -> None:
        """Take over what a fresh state holds, once nothing in it changes its shape any more."""


class StickyRoom(Room):
    """Sizes that only grow, in steps, and host buffers that are used again."""

    def __init__(self) -> None:
        self._changes = 0
        self._sizes: dict[str, int] = {}
        self._buffers: dict[str, Tensor] = {}
        self._tensors: dict[tuple[Any, ...], Tensor] = {}
        self._layout: tuple[Any, ...] | None = None

    def size(self, name: str, needed: int) -> int:
        held = self._sizes.get(name, 0)
        if needed > held:
            self._changes += held > 0  # the host goes by sizes too, if no tensor does
            # What has grown once may again: where scores divide the budget, sizes go up and down.
            held = self._sizes[name] = rounded_up(needed + needed // 4 if held else needed)
        return held

    def buffer(self, name: str, shape: tuple[int, ...], like: Tensor, pinned: bool = False) -> Tensor:
        rows = self.size(name, shape[0])
        held = self._buffers.get(name)
        if held is None or held.shape[0] < rows or held.shape[1:] != shape[1:] or held.dtype != like.dtype:
            self._buffers.pop(name, None)
            del held
            self._buffers[name] = super().buffer(name, (rows, *shape[1:]), like, pinned)
        return self._buffers[name]

    @property
    def pinned_bytes(self) -> int:
        """Host memory that is held for the next prompt already."""
        return sum(x.nbytes for x in self._buffers.values() if not x.is_cuda)

    def adopt(self, state: Held) -> None:
        """Move what a fresh state holds into the tensors of the states before it, where they have one shape.

        The state goes on with those tensors. A tensor that doesn't fit takes the place of the old one.
        """
        found = list(tensors_of(state))
        layout = (type(state), *(path for path, *_ in found))
        # A method may make other states for another prompt: what was captured does not fit those.
        self._changes += self._layout not in (None, layout)
        self._layout = layout
        for path, container, key in found:
            fresh = _get(container, key)
            held = self._tensors.get(path)
            if held is not None and _alike(held, fresh):
                if held.data_ptr() != fresh.data_ptr():
                    held.copy_(fresh)
                    _set(container, key, held)
            else:
                self._changes += held is not None
                self._tensors[path] = fresh

    def forget_changes(self) -> int:
        """How much has become other since the last call: tensors, sizes, kinds of state. 0: nothing."""
        changes, self._changes = self._changes, 0
        return changes


def _pin(held: Tensor) -> None:
    """Lock the pages of a host tensor, for as long as it lives, so that the GPU reads and writes them itself.

    torch's own pinned memory comes in powers of two, which would be up to twice the bytes.
    """
    if not held.nbytes:
        return
    held.view(torch.uint8).fill_(0)  # by all threads: pages are made here, and not one by one while locking
    cudart: Any = torch.cuda.cudart()
    error = cudart.cudaHostRegister(held.data_ptr(), held.nbytes, 0)
    if int(error):
        reason = cudart.cudaGetErrorString(error)
        raise RuntimeError(f"{held.nbytes / 2**30:.2f} GiB of host memory can't be pinned: {reason}")
    weakref.finalize(held.untyped_storage(), cudart.cudaHostUnregister, held.data_ptr())


def rounded_up(number: int) -> int:
    """The next size of the ladder."""
    if number <= STEPS_PER_DOUBLING:
        return number
    step = 1 << max(0, math.floor(math.log2(number - 1)) - int(math.log2(STEPS_PER_DOUBLING)))
    return -(-number // step) * step


def tensors_of(
    holder: Any, path: tuple[Any, ...] = (), seen: set[int] | None = None
) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """(path, container, key) of every tensor that a step of `holder` may use; each object is visited once."""
    seen = set() if seen is None else seen
    if id(holder) in seen:
        return
    seen.add(id(holder))
    items: list[tuple[Any, Any]]
    if isinstance(holder, Held):
        items = [(key, value) for key, value in vars(holder).items() if key not in holder.off_step]
    elif isinstance(holder, dict):
        items = list(holder.items())
    else:
        items = list(enumerate(holder))
    for key, value in items:
        if isinstance(value, Tensor):
            yield (*path, key), holder, key
        elif isinstance(value, Held | list | dict):
            yield from tensors_of(value, (*path, key), seen)


def _get(container: Any, key: Any) -> Any:
    return getattr(container, key) if isinstance(container, Held) else container[key]


def _set(container: Any, key: Any, value: Tensor) -> None:
    if isinstance(container, Held):
        setattr(container, key, value)
    else:
        container[key] = value


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
