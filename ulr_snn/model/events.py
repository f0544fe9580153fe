"""Sparse events as the input of a model: a layer that reads them costs in proportion to the events (see sparse.py).

To the model they are a tensor like any other. Changes of shape keep them sparse; whatever else is done with them is
done with the frames that they stand for, which are made then.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ulr_snn.kernels import dispatch
from ulr_snn.kernels.sparse import DENSITY, FEWEST, Rows, convolution, linear
from ulr_snn.model.event_list import EventList

Frames = Tensor | EventList  # [T, B, ...], as they came


class Events(Tensor):
    """Frames [T, B, ...] that are zero nearly everywhere, as a tensor of `dtype`."""

    @staticmethod
    def __new__(cls, frames: Frames, dtype: torch.dtype, found: dict[int, Rows] | None = None) -> "Events":
        return Tensor._make_wrapper_subclass(cls, frames.shape, dtype=dtype, device=frames.device)

    def __init__(self, frames: Frames, dtype: torch.dtype, found: dict[int, Rows] | None = None) -> None:
        self._frames, self._dense = frames, None
        self._found = {} if found is None else found  # by width of a row; the same for all shapes of the same frames

    @classmethod
    def of(cls, frames: Frames, dtype: torch.dtype) -> Tensor:
        """Events of frames [T, B, ...] on a CPU, if they are sparse enough; else the frames, as a tensor of `dtype`."""
        known = isinstance(frames, EventList) or frames.dtype in KINDS
        known = known and frames.device.type == "cpu" and dtype == torch.float32
        if known and frames.numel() >= FEWEST and dispatch.kernels(torch.empty(0, dtype=torch.float32)) is not None:
            frames, width = frames.contiguous(), math.prod(frames.shape[2:])
            rows = rows_of(frames, width, DENSITY * frames.numel())
            if rows is not None:
                return cls(frames, dtype, {width: rows})
        return frames.to(dtype)

    def __repr__(self) -> str:  # of a tensor without storage, the default fails
        return f"Events({tuple(self.shape)}, {self.dtype})"

    def rows(self, width: int) -> Rows:
        """The events in rows of this many inputs."""
        if width not in self._found:
            self._found[width] = rows_of(self._frames, width)
        return self._found[width]

    def dense(self) -> Tensor:
        """The frames as a tensor; from now on that is what this one is."""
        if self._dense is None:
            frames = self._frames
            self._dense = frames.to(self.dtype, copy=True) if isinstance(frames, Tensor) else frames.to(self.dtype)
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
                if function in SHAPES or function in MOVES:
                    changed = events._changed(function.__name__, *arguments[1:], **named)
                    return Events(changed, events.dtype, events._found if function in SHAPES else None)
                if function in COPIES and len(arguments) == 1 and not named:
                    return Events(events._frames, events.dtype, events._found)
                if function in OWN and not torch.is_autocast_enabled("cpu"):
                    found = OWN[function](events, *arguments[1:], **named)
                    if found is not None:
                        return found
                if function is Tensor.__getitem__ and isinstance(events._frames, Tensor):
                    return function(events._frames, *arguments[1:]).to(events.dtype, copy=True)
            return function(*map(_dense, arguments), **{name: _dense(item) for name, item in named.items()})

    def _changed(self, name: str, *arguments: Any, **named: Any) -> Frames:
        if isinstance(self._frames, EventList):
            return self._frames.changed(name, *arguments, **named)
        return getattr(self._frames, name)(*arguments, **named)

    def _equal(self, other: Any) -> bool | None:
        if not isinstance(other, Events) or other._dense is not None or type(self._frames) is not type(other._frames):
            return None
        if isinstance(self._frames, Tensor) and self._frames.dtype != other._frames.dtype:
            return None
        return self._frames.equal(other._frames)

    def _linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        if not float32(weight, bias) or self.shape[-1] != weight.shape[1]:
            return None  # the dense one, which says what is wrong
        return linear(self.rows(self.shape[-1]), weight, bias).view(*self.shape[:-1], len(weight))

    def _convolution(self, weight: Tensor, bias: Tensor | None = None, *options: Any, **named: Any) -> Tensor | None:
        if not float32(weight, bias) or self.ndim != 4 or weight.ndim != 4:
            return None
        frame = self.shape[1:]
        return convolution(frame, self.rows(frame.numel()), weight, bias, *options, **named)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: Any = None) -> Any:
        return function(*map(_dense, arguments), **{name: _dense(item) for name, item in (named or {}).items()})


def rows_of(frames: Frames, width: int, most: float = math.inf) -> Rows | None:
    """The events of frames in rows of this many inputs; None where there are more than `most`."""
    if isinstance(frames, EventList):
        return frames.rows(width, most)
    return Rows.of(frames.reshape(-1, width), most)


def _dense(item: Any) -> Any:
    if isinstance(item, Events):
        return item.dense()
    return type(item)(map(_dense, item)) if type(item) in (list, tuple) else item


def float32(*parameters: Tensor | None) -> bool:
    """Whether parameters are what the kernels take."""
    return all(q is None or (q.dtype == torch.float32 and q.device.type == "cpu") for q in parameters)


# What events do themselves; it gives None where it is to be done with frames.
OWN = {functional.linear: Events._linear, torch.conv2d: Events._convolution, torch.equal: Events._equal}
KINDS = (torch.uint8, torch.bool, torch.float32)
SHAPES = (Tensor.flatten, Tensor.reshape, Tensor.view, Tensor.unflatten, torch.flatten, torch.reshape)
MOVES = (Tensor.repeat, Tensor.roll)
COPIES = (Tensor.clone, Tensor.detach, Tensor.contiguous, torch.clone)
PLAIN = (
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("is_sparse", "is_cuda", "is_mkldnn", "is_quantized", "grad_fn")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, torch.is_floating_point, Tensor.__len__),
    *(Tensor.nelement, Tensor.is_complex, torch.numel),
)
