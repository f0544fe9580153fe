"""Max pooling of spikes, differentiated as an OR.

The maximum over a window of spikes is 1 if any of them is 1. Its derivative in one spike s_j is the difference that
this spike makes while the others stay: the product of (1 - s_k) over the other spikes k of the window. It is 1 for
every spike of a silent window and for a spike that fires alone, else 0. torch's own derivative is 1 for the first
maximum of every window, and 0 for the others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ulr_snn.kernels import dispatch

AXES = {functional.max_pool1d: 1, functional.max_pool2d: 2, functional.max_pool3d: 3}
LOOK = 1 << 10  # numbers that are checked first: most tensors without spikes are found by these


class SpikePooling(TorchFunctionMode):
    """While it is entered, max pooling of zeros and ones has the derivative of an OR. used: any max pooling has run."""

    def __init__(self) -> None:
        super().__init__()
        self.used = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in AXES:
            self.used = True
            found = or_pooled(AXES[func], *args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)


def or_pooled(
    axes: int,
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    """Returns the OR over windows of spikes x, or None if x has no spikes or needs no derivative."""
    size, step, margin, spread = (
        tuple(value) if isinstance(value, tuple | list) else (value,) * axes
        for value in (kernel_size, kernel_size if stride is None else stride, padding, dilation)
    )
    wanted = x.requires_grad and torch.is_grad_enabled() and not return_indices
    if not wanted or any(d != 1 for d in spread):
        return None
    if axes == 1:  # torch has no undivided averages over one axis
        rows = found_in(x.unsqueeze(-2), Windows(2, (1, *size), (1, *step), (0, *margin), ceil_mode))
        return None if rows is None else rows.squeeze(-2)
    return found_in(x, Windows(axes, size, step, margin, ceil_mode))


@dataclass(frozen=True)
class Windows:
    """The windows of a pooling over two or three axes, in torch's terms."""

    axes: int
    size: tuple[int, ...]
    step: tuple[int, ...]
    margin: tuple[int, ...]
    ceil_mode: bool

    @property
    def _given(self) -> tuple[Any, ...]:
        return self.size, self.step, self.margin, self.ceil_mode, True, 1

    @property
    def _pairs(self) -> tuple[dispatch.Pair, dispatch.Pair, dispatch.Pair]:
        size, step, margin = self.size, self.step, self.margin
        return (size[0], size[1]), (step[0], step[1]), (margin[0], margin[1])

    def spikes(self, x: Tensor) -> Tensor | None:
        """Counts the spikes in each window, or returns None if x has numbers other than 0 and 1."""
        few = x.flatten()[:LOOK] if x.is_contiguous() else x[:1]
        if not binary(few):
            return None
        done = None
        if self.axes == 2:
            high, across = self.total(x.new_empty(x.shape, device="meta")).shape[-2:]
            done = dispatch.window_sums(x, self._pairs, (high, across))
        if done is None:
            return self.total(x) if binary(x) else None
        return done[0] if done[1] else None

    def credit(self, x: Tensor, total: Tensor, g: Tensor) -> Tensor:
        """Returns the gradient at spikes x from the gradient g at the OR. total: spikes in each window."""
        if self.axes == 2 and not torch.is_grad_enabled():  # the kernel is not differentiable
            done = dispatch.window_credit(x, total, g, self._pairs)
            if done is not None:
                return done
        silent = _Spread.apply(g * (total == 0), x, self)
        alone = _Spread.apply(g * (total == 1), x, self)
        return torch.addcmul(silent, x, alone)

    def total(self, x: Tensor) -> Tensor:
        """Sums each window."""
        return (functional.avg_pool2d if self.axes == 2 else functional.avg_pool3d)(x, *self._given)

    def spread(self, g: Tensor, like: Tensor) -> Tensor:
        """Applies the transpose of `total`: adds each number of g to all places of its window."""
        aten = torch.ops.aten
        return (aten.avg_pool2d_backward if self.axes == 2 else aten.avg_pool3d_backward)(g, like, *self._given)


def binary(x: Tensor) -> bool:
    """Returns whether all numbers are 0 or 1."""
    return bool((x * x == x).all())


def found_in(x: Tensor, windows: Windows) -> Tensor | None:
    """Returns the OR over windows of spikes x, or None if x has other numbers."""
    total = windows.spikes(x.detach())
    return None if total is None else _Or.apply(x, total, windows)


class _Or(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, total: Tensor, windows: Windows) -> Tensor:
        ctx.save_for_backward(x, total)
        ctx.windows = windows
        return total.clamp(max=1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return ctx.windows.credit(*ctx.saved_tensors, g), None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, like: Tensor, windows: Windows) -> Tensor:
        ctx.windows = windows
        return windows.spread(g, like)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor, None, None]:
        return ctx.windows.total(h), None, None
