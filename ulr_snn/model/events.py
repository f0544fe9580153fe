"""Sparse events as the input of a model. A layer that reads events costs in proportion to their number (sparse.py).

To the model, events are a tensor like any other. Changes of shape keep events sparse. Any other operation makes the
dense frames and runs on them.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ulr_snn.kernels import dispatch
from ulr_snn.kernels.limits import limits
from ulr_snn.kernels.sparse import Rows, convolution, linear
from ulr_snn.model.event_list import EventList

Frames = Tensor | EventList  # [T, B, ...], in their own dtype


class Events(Tensor):
    """A tensor of `dtype` that stands for frames [T, B, ...] that are zero nearly everywhere."""

    @staticmethod
    def __new__(cls, frames: Frames, dtype: torch.dtype, found: dict[int, Rows] | None = None) -> "Events":
        return Tensor._make_wrapper_subclass(cls, frames.shape, dtype=dtype, device=frames.device)

    def __init__(self, frames: Frames, dtype: torch.dtype, found: dict[int, Rows] | None = None) -> None:
        self._frames = frames
        self._dense: Tensor | None = None
        self._found = {} if found is None else found  # by width of a row; all shapes of the same frames share it

    @classmethod
    def of(cls, frames: Frames, dtype: torch.dtype) -> Tensor:
        """Returns events if frames [T, B, ...] are on a CPU and sparse enough, else a dense tensor of `dtype`."""
        known = isinstance(frames, EventList) or frames.dtype in KINDS
        known = known and frames.device.type == "cpu" and dtype == torch.float32 and frames.numel() >= limits.fewest
        if known and dispatch.kernels(torch.empty(0, dtype=torch.float32)) is not None:
            frames, width = frames.contiguous(), math.prod(frames.shape[2:])
            rows = rows_of(frames, width, limits.density * frames.numel())
            if rows is not None:
                return cls(frames, dtype, {width: rows})
        return frames.to(dtype)

    # The default fails for a tensor without storage; torch leaves it untyped.
    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Events({tuple(self.shape)}, {self.dtype})"

    def rows(self, width: int) -> Rows:
        """Returns the events in rows of `width` inputs."""
        if width not in self._found:
            rows = rows_of(self._frames, width)
            assert rows is not None  # there is no limit on their number
            self._found[width] = rows
        return self._found[width]

    def dense(self) -> Tensor:
        """Returns the frames as a tensor, which takes the place of the events from now on."""
        if self._dense is None:
            frames = self._frames
            self._dense = frames.to(self.dtype, copy=True) if isinstance(frames, Tensor) else frames.to(self.dtype)
        return self._dense

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        arguments: tuple[Any, ...] = (),
        named: dict[str, Any] | None = None,
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
        if not isinstance(other, Events) or other._dense is not None:
            return None
        mine, others = self._frames, other._frames
        if isinstance(mine, EventList) or isinstance(others, EventList):
            return mine.equal(others) if isinstance(mine, EventList) and isinstance(others, EventList) else None
        return mine.equal(others) if type(mine) is type(others) and mine.dtype == others.dtype else None

    def _linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        if not float32(weight, bias) or self.shape[-1] != weight.shape[1]:
            return None  # the dense operation says what is wrong
        return linear(self.rows(self.shape[-1]), weight, bias).view(*self.shape[:-1], len(weight))

    def _convolution(self, weight: Tensor, bias: Tensor | None = None, *options: Any, **named: Any) -> Tensor | None:
        if not float32(weight, bias) or self.ndim != 4 or weight.ndim != 4:
            return None
        frame = self.shape[1:]
        return convolution(frame, self.rows(frame.numel()), weight, bias, *options, **named)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares the disabled one
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*map(_dense, args), **{name: _dense(item) for name, item in (kwargs or {}).items()})


def rows_of(frames: Frames, width: int, most: float = math.inf) -> Rows | None:
    """Returns the events of frames in rows of `width` inputs, or None if there are more than `most`."""
    if isinstance(frames, EventList):
        return frames.rows(width, most)
    return Rows.of(frames.reshape(-1, width), most)


def _dense(item: Any) -> Any:
    if isinstance(item, Events):
        return item.dense()
    return type(item)(map(_dense, item)) if type(item) in (list, tuple) else item


def float32(*parameters: Tensor | None) -> bool:
    """Returns whether the kernels take all of these parameters."""
    return all(q is None or (q.dtype == torch.float32 and q.device.type == "cpu") for q in parameters)


# Operations with a sparse implementation, which returns None for arguments that need the frames.
OWN: dict[Callable[..., Any], Callable[..., Any]] = {functional.linear: Events._linear, torch.equal: Events._equal}
OWN[torch.conv2d] = Events._convolution
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
