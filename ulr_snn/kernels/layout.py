"""Where the channels of pictures [..., C, H, W] lie in memory: before the places, or last, as convolutions like them.

Shapes do not tell: a picture with channels last is a view of one that is stored as [..., H, W, C]. torch's functions
take both, but for `Tensor.view`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_free: ContextVar[bool] = ContextVar("free", default=False)


@contextmanager
def free_layout(free: bool) -> Iterator[None]:
    """Within this context, convolutions in two dimensions choose the layout of their outputs."""
    token = _free.set(free)
    try:
        yield
    finally:
        _free.reset(token)


def layout_is_free() -> bool:
    """Returns whether convolutions choose the layout of their outputs."""
    return _free.get()


class Views(TorchFunctionMode):
    """While it is entered, notes whether `Tensor.view` joins axes that may be those of pictures, for which channels
    have to be first. Scripted modules, into which it does not see, count as such. model: the model that runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found = any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if func in (Tensor.view, Tensor.view_as) and args[0].numel() == result.numel() > 0:
            before, after = ([n for n in x.shape if n > 1] for x in (args[0], result))
            # The first two of three or five axes are those of time and samples.
            self.found |= any(axes != (0, 2) or len(before) == 4 for axes in joined(before, after))
        return result


def joined(before: list[int], after: list[int]) -> Iterator[tuple[int, int]]:
    """Yields the ranges (first, end) of axes that a view from one shape to another joins."""
    i = j = 0
    while i < len(before):
        first, left, right = i, before[i], after[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        if i > first + 1:
            yield first, i


def channels_last(x: Tensor, lead: int = 1) -> bool:
    """Returns whether pictures [..., C, H, W] are stored with channels last, where that differs from the usual order.
    lead: least number of axes before a picture's own, 2 for sequences [T, B, ...]."""
    return x.ndim >= lead + 3 and not x.is_contiguous() and stored(x).is_contiguous()


def stored(x: Tensor, last: bool = True) -> Tensor:
    """Returns a view [..., H, W, C] of pictures with channels last, and x itself otherwise."""
    return x.movedim(-3, -1) if last else x


def shown(x: Tensor, last: bool = True) -> Tensor:
    """Undoes `stored`."""
    return x.movedim(-1, -3) if last else x


def rest(sequence: Tensor) -> Tensor:
    """Returns zeros [B, ...] for one time step of a sequence [T, B, ...], in its layout."""
    last = channels_last(sequence, 2)
    return shown(sequence.new_zeros(stored(sequence, last).shape[1:]), last)


def laid(x: Tensor, last: bool) -> Tensor:
    """Returns x in this layout: itself, or a copy."""
    return shown(stored(x, last).contiguous(), last)
