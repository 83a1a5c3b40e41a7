"""A recorder of what a piece of torch code does: operations, waits for the device, peak memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SYNCHRONISES = {
    *("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "bincount", "is_nonzero"),
    *("equal", "allclose", "_unique", "_unique2", "unique_dim", "unique_consecutive"),
}
"""Operations whose result, or its size, the host must know, or whose input it sends. `Tensor.tolist` and
`Tensor.cpu` dispatch nothing on a CPU: a test takes them away (monkeypatch)."""


class Operations(TorchDispatchMode):
    """Records what happens while it is entered.

    Attributes:
        trace: every operation with the shapes it gave, in order.
        peak_bytes: most bytes of storages made in here that were alive at one time. What an operation
            allocates inside itself and gives back is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trace: list[tuple[str, tuple[torch.Size, ...]]] = []
        self.peak_bytes = 0
        self._synchronised: list[str] = []
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def synchronised(self) -> list[str]:
        """Operations that make the host wait for the device."""
        return list(self._synchronised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = _tensors((args, kwargs))
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        out = func(*args, **(kwargs or {}))
        outputs = _tensors(out)
        self.trace.append((str(func), tuple(x.shape for x in outputs)))
        if _synchronises(func, args, kwargs or {}):
            self._synchronised.append(str(func))
        given = {x.untyped_storage()._cdata for x in inputs}
        for storage in (x.untyped_storage() for x in outputs):
            # A storage that is referred to keeps its address, so that no later one is taken for it.
            if storage._cdata not in given | self._alive.keys():
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._alive.values()))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _synchronises(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    name = func.overloadpacket.__name__
    if name in ("index", "index_put", "index_put_"):
        return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1]))
    if name == "repeat_interleave":
        return func._overloadname == "Tensor" and kwargs.get("output_size") is None
    return name in SYNCHRONISES
