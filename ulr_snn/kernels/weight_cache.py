"""Weights in the order that kernels read them in, put so once for as long as they stay."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

Kept = dict[tuple[int, str], tuple[Tensor, int, Tensor]]
_kept: ContextVar[Kept | None] = ContextVar("kept", default=None)


@contextmanager
def weight_cache() -> Iterator[None]:
    """One step in many scans, between which parameters hardly ever change."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def once(weight: Tensor, order: str, make: Callable[[Tensor], Tensor]) -> Tensor:
    """make(weight), which is the weight in this order; inside `weight_cache`, of a parameter that is as it was, what
    was made then."""
    kept = _kept.get()
    if kept is None or not isinstance(weight, nn.Parameter):
        return make(weight)
    found = kept.get((id(weight), order))  # of a tensor that lives on, since it is kept with it
    if found is None or found[1] != weight._version:
        found = kept[id(weight), order] = weight, weight._version, make(weight)
    return found[2]
