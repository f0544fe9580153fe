"""Recurrent weights as scans read them, from each source to all targets, turned once for as long as they stay."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

_turned: ContextVar[dict[int, tuple[Tensor, int, Tensor]] | None] = ContextVar("turned", default=None)


@contextmanager
def weights_held() -> Iterator[None]:
    """One step in many scans, between which parameters hardly ever change."""
    token = _turned.set({})
    try:
        yield
    finally:
        _turned.reset(token)


def turned_once(weight: Tensor) -> Tensor:
    """W^T in memory of its own; inside `weights_held`, of a parameter that is as it was, what was made then."""
    kept = _turned.get()
    if kept is None or not isinstance(weight, nn.Parameter):
        return weight.detach().T.contiguous()
    found = kept.get(id(weight))  # of a tensor that lives on, since it is kept with it
    if found is None or found[1] != weight._version:
        found = kept[id(weight)] = weight, weight._version, weight.detach().T.contiguous()
    return found[2]
