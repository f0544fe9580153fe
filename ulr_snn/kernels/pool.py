"""The memory pool of large temporaries on a CPU, which keeps memory from one training step to the next.

Memory that returns to the system comes back page by page, and the system zeroes each page. This takes a third of the
time of a convolutional step. The pool uses numpy's arrays: their reference counts tell whether a tensor still uses an
array, which torch does not tell, and large arrays use large pages.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ulr_snn.kernels.layout import channels_last, shown
from ulr_snn.kernels.limits import limits

UNUSED = 2  # number of steps for which the pool keeps an unused array
ALIGNED = 64  # alignment in bytes, equal to that of torch's own memory


class Pool:
    """A pool of arrays for the tensors of `empty`. Each array serves one tensor and its views. A lean pool stays
    empty, for steps that should take little memory."""

    def __init__(self, lean: bool = False) -> None:
        self.lean = lean
        self._arrays: list[tuple[np.ndarray, int]] = []  # each with the step that last used it
        self._step = 0

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within this context, one step takes its large temporaries from the pool."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)
            self._step += 1
            self._arrays = [(array, last) for array, last in self._arrays if self._step - last <= UNUSED]

    def clear(self) -> None:
        self._arrays = []

    def take(self, shape: Sequence[int]) -> Tensor:
        """Returns an uninitialised float32 tensor. Its array is free again when no tensor refers to it."""
        needed = 4 * math.prod(shape) + ALIGNED
        index = self._free(needed)
        if index is None:
            index = len(self._arrays)
            self._arrays.append((np.empty(needed, np.uint8), self._step))
        array = self._arrays[index][0]
        self._arrays[index] = array, self._step
        start = -array.ctypes.data % ALIGNED
        return torch.from_numpy(array[start : start + needed - ALIGNED].view(np.float32).reshape(shape))

    def _free(self, needed: int) -> int | None:
        """Returns the index of the smallest free array with `needed` to twice as many bytes."""
        sizes = [array.nbytes for array, _ in self._arrays]
        free = [i for i, size in enumerate(sizes) if needed <= size <= 2 * needed]
        free = [i for i in free if _references(self._arrays, i) == _ALONE]
        return min(free, key=sizes.__getitem__, default=None)

    def __reduce__(self) -> Any:
        return Pool, (self.lean,)  # a copy has memory of its own


def _references(arrays: list[tuple[np.ndarray, int]], i: int) -> int:
    """Returns the reference count of array i, counted in the same way for `_ALONE`."""
    return sys.getrefcount(arrays[i][0])


_current: ContextVar[Pool | None] = ContextVar("pool", default=None)
_ALONE = _references([(np.empty(0), 0)], 0)  # the count of an array that only the pool's list refers to


def traced() -> bool:
    """Returns whether torch now records operations, to export, trace or compile a model. It does not see kernels."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]  # not exported


def in_step() -> bool:
    """Returns whether a step of a pool is running."""
    return not traced() and _current.get() is not None


def lean() -> bool:
    """Returns whether no step of a pool is running, or a step of a lean pool."""
    pool = _current.get()
    return pool is None or pool.lean


def empty(*shape: int, last: bool = False) -> Tensor:
    """Returns an uninitialised float32 tensor on the CPU. A large one comes from the pool of the running step. last:
    the tensor [..., C, H, W] has channels last in memory."""
    if last:
        *lead, channels, high, across = shape
        return shown(empty(*lead, high, across, channels))
    pool = _current.get()
    if pool is None or pool.lean or 4 * math.prod(shape) < limits.smallest:
        return torch.empty(shape, dtype=torch.float32)
    return pool.take(shape)


def fits(x: Tensor) -> bool:
    """Returns whether `empty` makes tensors of this dtype and device."""
    return x.dtype == torch.float32 and x.device.type == "cpu"


def empty_like(x: Tensor, rows: int | None = None) -> Tensor:
    """Returns an uninitialised tensor like x [n, ...], with so many rows. If x `fits`, it comes from the pool, in the
    layout of x."""
    rows = len(x) if rows is None else rows
    shape = rows, *x.shape[1:]
    return empty(*shape, last=channels_last(x)) if fits(x) else x.new_empty(shape)


def blocks(rows: int, size: int) -> list[slice]:
    """Splits rows into blocks of up to `limits.block` bytes. size: float32 numbers in a row."""
    step = max(1, limits.block // (4 * max(1, size)))
    return [slice(at, min(at + step, rows)) for at in range(0, rows, step)]


def by_blocks(function: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """Returns function(x), computed block by block, for an x [n, ...] that `fits`. The function must treat each row by
    itself. size: float32 numbers that a row needs, see `blocks`."""
    out: Tensor | None = None
    for rows in blocks(len(x), size):
        block = function(x[rows])
        out = empty_like(block, len(x)) if out is None else out
        out[rows] = block
    return function(x) if out is None else out
