"""Threads that share the rows of a kernel on a CPU.

They are the threads in which torch runs its own operations. After each operation, the threads of OpenMP keep their
cores busy for milliseconds while they wait for the next one, so that threads of Python would have half a core each.
"""

import ctypes
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@lru_cache
def openmp() -> Callable[..., None] | None:
    """Returns GOMP_parallel(task, data, threads, flags) of the OpenMP runtime that torch uses, or None without one. It
    runs a task in so many threads, and returns when all have ended. Compiled programs call it for every parallel
    region, and libgomp and LLVM's runtime have it; torch has no function for this."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        found = ctypes.CDLL(str(library)).GOMP_parallel  # of the libraries that this one has loaded
    except (OSError, AttributeError):
        return None
    found.argtypes, found.restype = [TASK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return found


def in_threads(run: Callable[[], None], count: int) -> None:
    """Calls run() in up to so many threads, of which this is one. It must not raise."""
    parallel = openmp()
    if parallel is not None:
        parallel(TASK(lambda _: run()), None, count, 0)
        return
    others = [_workers().submit(run) for _ in range(1, count)]
    run()
    for other in others:
        other.result()


def shared(rows: int, work: Callable[[int, int], Any]) -> None:
    """Calls work(first, end) for nearly equal ranges of all rows, each in a thread. There are at most as many ranges as
    torch uses threads. An error of `work` is raised when all threads have ended."""
    count = torch.get_num_threads()
    parts = min(count, rows)
    if parts <= 1:
        work(0, rows)
        return
    ranges = iter([(part * rows // parts, (part + 1) * rows // parts) for part in range(parts)])
    errors: list[BaseException] = []
    came: set[int] = set()

    def run() -> None:
        try:
            came.add(threading.get_ident())
            for first, end in ranges:  # each goes to one thread
                work(first, end)
        except BaseException as error:
            errors.append(error)

    in_threads(run, count)  # not fewer: OpenMP would end the others, and make them anew for torch
    if errors:
        raise errors[0]
    if threading.get_ident() not in came:  # ctypes drops what is raised as its callback begins
        raise KeyboardInterrupt


def summed(rows: int, shape: Sequence[int], add: Callable[[int, int, Any], Any]) -> Tensor:
    """Returns the sum [*shape] of terms of all rows. Calls add(first, end, out) for each range, which adds the terms of
    these rows to a flat array of its own."""
    sums: dict[tuple[int, int], Tensor] = {}

    def work(first: int, end: int) -> None:
        own = sums[first, end] = torch.zeros(math.prod(shape), dtype=torch.float32)
        add(first, end, own.numpy())

    shared(rows, work)
    first, *others = (sums[part] for part in sorted(sums))  # a fixed order, whichever thread ends first
    return sum(others, first).view(*shape)


@lru_cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())


def _after_fork() -> None:
    """Lets a forked child go on without its parent's threads, which it lacks. OpenMP would wait for its threads for
    ever, so the child's torch has one thread, as in the workers of a DataLoader."""
    _workers.cache_clear()
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
