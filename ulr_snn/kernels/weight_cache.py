"""The cache of weights in the memory layouts of the kernels. A layout is made once for as long as the weight stays."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

Kept = dict[tuple[int, str], tuple[Tensor, int, Tensor]]
_kept: ContextVar[Kept | None] = ContextVar("kept", default=None)


@contextmanager
def weight_cache() -> Iterator[None]:
    """Within this context, weight layouts are cached. It is for one step with many scans."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def once(weight: Tensor, order: str, make: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns make(weight), the weight in this order. Inside `weight_cache`, the result for a parameter is cached until
    the parameter changes."""
    kept = _kept.get()
    if kept is None or not isinstance(weight, nn.Parameter):
        return make(weight)
    found = kept.get((id(weight), order))  # the id stays unique, since the cache keeps the tensor alive
    if found is None or found[1] != weight._version:
        found = kept[id(weight), order] = weight, weight._version, make(weight)
    return found[2]
