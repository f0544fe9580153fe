"""Memory of large temporaries on a CPU, kept from one training step to the next.

What is given back to the system has to come from it again, page by page, each page zeroed: a third of the time of a
convolutional step. numpy's arrays, since they tell who refers to them, and since large ones ask for large pages.
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

SMALLEST = 1 << 20  # bytes; what is smaller seldom goes back to the system
UNUSED = 2  # steps that an array is kept without being used
ALIGNED = 64  # bytes, as torch's own memory is


class Pool:
    """Arrays that `empty` makes tensors of, each of one tensor and its views at a time. lean: it has none, for steps
    that are to take little."""

    def __init__(self, lean: bool = False) -> None:
        self.lean = lean
        self._arrays: list[tuple[np.ndarray, int]] = []  # and the step that used them last
        self._step = 0

    @contextmanager
    def used(self) -> Iterator[None]:
        """One step, whose large temporaries come from here."""
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
        """float32, of any values. What refers to it still when it is wanted again keeps it."""
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
        """The smallest array of this size, or up to twice it, that only the list refers to."""
        sizes = [array.nbytes for array, _ in self._arrays]
        free = [i for i, size in enumerate(sizes) if needed <= size <= 2 * needed]
        free = [i for i in free if _references(self._arrays, i) == _ALONE]
        return min(free, key=sizes.__getitem__, default=None)

    def __reduce__(self) -> Any:
        return Pool, (self.lean,)  # a copy has memory of its own


def _references(arrays: list[tuple[np.ndarray, int]], i: int) -> int:
    """To array i, as they are counted here."""
    return sys.getrefcount(arrays[i][0])


_current: ContextVar[Pool | None] = ContextVar("pool", default=None)
_ALONE = _references([(np.empty(0), 0)], 0)  # where only such a list has it


def in_step() -> bool:
    """Whether this is in a step of a pool."""
    return _current.get() is not None


def lean() -> bool:
    """Whether there is no step of a pool, or one of a lean one."""
    pool = _current.get()
    return pool is None or pool.lean


def empty(*shape: int) -> Tensor:
    """A float32 tensor on the CPU, of any values; within a step of a pool, and where it is large, of its memory."""
    large = 4 * math.prod(shape) >= SMALLEST
    return _current.get().take(shape) if large and not lean() else torch.empty(shape, dtype=torch.float32)


def fits(x: Tensor) -> bool:
    """Whether tensors like this one are of the kind that `empty` makes."""
    return x.dtype == torch.float32 and x.device.type == "cpu"


def empty_like(x: Tensor) -> Tensor:
    """`torch.empty_like`, of such memory where it can be."""
    return empty(*x.shape) if fits(x) else torch.empty_like(x)


BLOCK = 1 << 22  # bytes of a block of rows: what torch needs besides then stays in the cache, and with the process


def blocks(rows: int, size: int) -> list[slice]:
    """Of rows with this many float32 numbers, in their order."""
    step = max(1, BLOCK // (4 * max(1, size)))
    return [slice(at, min(at + step, rows)) for at in range(0, rows, step)]


def by_blocks(function: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """function(x), which sees each row of x [n, ...] by itself, of x that `fits`; size: of a row, see `blocks`."""
    out = None
    for rows in blocks(len(x), size):
        block = function(x[rows])
        out = empty(len(x), *block.shape[1:]) if out is None else out
        out[rows] = block
    return out
