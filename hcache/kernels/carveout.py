"""Shared memory that an SM offers while a kernel is on it, asked for kernels that run beside others.

An SM splits its memory into cache and shared memory, and must be empty to change the split. A program of a
kernel that needs little shared memory makes an SM offer little; until it ends, no program fits there that
needs much, and what runs beside it on the device loses that SM.

CUDA driver API, cuFuncSetAttribute, CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

PREFERRED_CARVEOUT, ALL_SHARED = 9, 100
"""The attribute, and its value in percent of the most that there is."""


def beside(kernel: Any) -> None:
    """From its next launch on, a compiled kernel wants SMs to offer all shared memory.

    Args:
        kernel: what a launch has returned; None under Triton's interpreter.

    Raises:
        RuntimeError: the driver refuses.
    """
    if kernel is not None:
        _prefer(int(kernel.function))


@cache
def _prefer(function: int) -> None:
    code = ctypes.CDLL("libcuda.so.1").cuFuncSetAttribute(
        ctypes.c_void_p(function), PREFERRED_CARVEOUT, ALL_SHARED
    )
    if code:
        raise RuntimeError(f"cuFuncSetAttribute failed with CUDA error {code}")
