"""Sparse events as the input of a model: a linear layer that reads them costs in proportion to the events.

To the model they are a tensor like any other. Changes of shape keep them sparse; whatever else is done with them is
done with the frames that they stand for, which are made then.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ulr_snn.scan import fused

DENSITY = 0.1  # of active inputs, beyond which a dense product is the faster one
SMALLEST = 1 << 16  # inputs, below which it hardly matters


@dataclass
class Rows:
    """Events in rows [n, inputs]: row r has those from starts[r] to starts[r + 1], at `places`, of size `values`."""

    starts: Tensor
    places: Tensor
    values: Tensor
    inputs: int


class _SparseLinear(torch.autograd.Function):
    """x W^T + b of events x; gradient for W and b alone."""

    @staticmethod
    def forward(ctx, weight, bias, rows):
        ctx.rows = rows
        out = torch.empty(len(rows.starts) - 1, len(weight))
        start = torch.zeros(len(weight)) if bias is None else bias.detach()
        columns = weight.detach().T.contiguous()
        fused.kernels(out).gather(*_arrays(rows), columns.numpy(), start.contiguous().numpy(), out.numpy())
        return out

    @staticmethod
    def backward(ctx, g):
        g = g.contiguous()
        d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            columns = torch.zeros(ctx.rows.inputs, g.shape[1])
            parts = min(torch.get_num_threads(), g.shape[1])
            fused.kernels(g).scatter(*_arrays(ctx.rows), g.detach().numpy(), columns.numpy(), parts)
            d_weight = columns.T.contiguous()
        if ctx.needs_input_grad[1]:
            d_bias = g.sum(0)
        return d_weight, d_bias, None


def _arrays(rows: Rows) -> tuple[Any, ...]:
    return rows.starts.numpy(), rows.places.numpy(), rows.values.numpy()


class Events(Tensor):
    """Frames [T, B, ...] that are zero nearly everywhere, as a tensor of `dtype`."""

    @staticmethod
    def __new__(cls, frames: Tensor, dtype: torch.dtype, found: dict[int, Rows] | None = None) -> "Events":
        return Tensor._make_wrapper_subclass(cls, frames.shape, dtype=dtype, device=frames.device)

    def __init__(self, frames: Tensor, dtype: torch.dtype, found: dict[int, Rows] | None = None) -> None:
        self._frames, self._dense = frames, None
        self._found = {} if found is None else found  # by width of a row; the same for all shapes of the same frames

    @classmethod
    def of(cls, frames: Tensor, dtype: torch.dtype) -> Tensor:
        """Events of frames [T, B, ...] on a CPU, if they are sparse enough; else the frames, as a tensor of `dtype`."""
        known = frames.device.type == "cpu" and dtype == torch.float32 and frames.dtype in KINDS
        if known and frames.numel() >= SMALLEST and fused.kernels(torch.empty(0)) is not None:
            frames = frames.contiguous()
            events = cls(frames, dtype)
            if len(events.rows(frames[0, 0].numel()).places) <= DENSITY * frames.numel():
                return events
        return frames.to(dtype)

    def __repr__(self) -> str:  # of a tensor without storage, the default fails
        return f"Events({tuple(self.shape)}, {self.dtype})"

    def rows(self, width: int) -> Rows:
        """The events in rows of this many inputs."""
        if width not in self._found:
            frames = self._frames.reshape(-1, width)
            frames = frames.view(torch.uint8) if frames.dtype == torch.bool else frames
            cpu = fused.kernels(torch.empty(0))
            starts = torch.zeros(len(frames) + 1, dtype=torch.int64)
            cpu.count(frames.numpy(), starts[1:].numpy())
            starts = starts.cumsum(0)
            places, values = torch.empty(int(starts[-1]), dtype=torch.int32), torch.empty(int(starts[-1]))
            cpu.collect(frames.numpy(), starts.numpy(), places.numpy(), values.numpy())
            self._found[width] = Rows(starts, places, values, width)
        return self._found[width]

    def dense(self) -> Tensor:
        """The frames as a tensor; from now on that is what this one is."""
        if self._dense is None:
            self._dense = self._frames.to(self.dtype)
        return self._dense

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        named = named or {}
        with torch._C.DisableTorchFunctionSubclass():
            events = arguments[0] if arguments and isinstance(arguments[0], Events) else None
            if function in PLAIN:
                return function(*arguments, **named)
            if events is not None and events._dense is None:
                if function in SHAPES:
                    name = function.__name__
                    shaped = getattr(events._frames, name)(*arguments[1:], **named)
                    return Events(shaped, events.dtype, events._found if name != "repeat" else None)
                if function in COPIES and len(arguments) == 1 and not named:
                    return Events(events._frames, events.dtype, events._found)
                if function is functional.linear and not torch.is_autocast_enabled("cpu"):
                    return events._linear(*arguments[1:], **named)
                if function is Tensor.__getitem__:
                    return function(events._frames, *arguments[1:]).to(events.dtype)
            return function(*map(_dense, arguments), **{name: _dense(item) for name, item in named.items()})

    def _linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.dtype != torch.float32 or self.shape[-1] != weight.shape[1]:
            return functional.linear(self.dense(), weight, bias)  # which says what is wrong
        out = _SparseLinear.apply(weight, bias, self.rows(self.shape[-1]))
        return out.view(*self.shape[:-1], len(weight))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: Any = None) -> Any:
        return function(*map(_dense, arguments), **{name: _dense(item) for name, item in (named or {}).items()})


def _dense(item: Any) -> Any:
    if isinstance(item, Events):
        return item.dense()
    return type(item)(map(_dense, item)) if type(item) in (list, tuple) else item


KINDS = (torch.uint8, torch.bool, torch.float32)
SHAPES = (Tensor.flatten, Tensor.reshape, Tensor.view, Tensor.unflatten, Tensor.repeat, torch.flatten, torch.reshape)
COPIES = (Tensor.clone, Tensor.detach, Tensor.contiguous, torch.clone)
PLAIN = (
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("is_sparse", "is_cuda", "is_mkldnn", "is_quantized", "grad_fn")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, torch.is_floating_point, Tensor.__len__),
    *(Tensor.nelement, Tensor.is_complex, torch.numel),
)
