"""Where the channels of pictures [..., C, H, W] lie in memory: before the places, or last, as convolutions like them.

Shapes do not tell: a picture with channels last is a view of one that is stored as [..., H, W, C]. Only `Tensor.view`
does not take it, of all that a model's own code may do.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

_free: ContextVar[bool] = ContextVar("free", default=False)


@contextmanager
def free_layout(free: bool) -> Iterator[None]:
    """Within this context, convolutions choose the layout of their outputs."""
    token = _free.set(free)
    try:
        yield
    finally:
        _free.reset(token)


def layout_is_free() -> bool:
    """Returns whether convolutions choose the layout of their outputs."""
    return _free.get()


class Views(TorchFunctionMode):
    """While it is entered, notes whether pictures are reshaped by `Tensor.view`, which needs channels to be first."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if func in (Tensor.view, Tensor.view_as) and args[0].ndim >= 4:
            channels, *places = picture = args[0].shape[-3:]
            self.found |= result.shape[-3:] != picture and channels > 1 and math.prod(places) > 1
        return result


def channels_last(x: Tensor) -> bool:
    """Returns whether pictures [..., C, H, W], with one axis before them at least, are stored with channels last."""
    return x.ndim >= 4 and not x.is_contiguous() and stored(x).is_contiguous()


def stored(x: Tensor, last: bool = True) -> Tensor:
    """Returns a view [..., H, W, C] of pictures with channels last, and x itself otherwise."""
    return x.movedim(-3, -1) if last else x


def shown(x: Tensor, last: bool = True) -> Tensor:
    """Undoes `stored`."""
    return x.movedim(-1, -3) if last else x


def laid(x: Tensor, last: bool) -> Tensor:
    """Returns x in this layout: itself, or a copy."""
    return shown(stored(x, last).contiguous(), last)
