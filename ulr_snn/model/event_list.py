"""Frames that are never made: the list of the events in them, from torch's own sparse tensors (COO)."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ulr_snn.kernels.sparse import Rows


@dataclass(frozen=True, eq=False)
class EventList:
    """Frames [T, B, ...] as their events: where they are in the flattened frames, ascending, int64 [E], and how many
    each place has, [E]."""

    places: Tensor
    values: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, x: Tensor) -> "EventList":
        """Of a sparse COO tensor [T, B, ...] of sparse axes alone; what is listed twice is added up."""
        if not x.is_floating_point():
            x = x.to(torch.float32)  # before anything is added up: sums of small integers may be too large for them
        x = x.coalesce()
        strides = torch.tensor([math.prod(x.shape[d + 1 :]) for d in range(x.ndim)], device=x.device)
        places, values = (x.indices() * strides[:, None]).sum(0), x.values().detach()
        some = values != 0
        return cls(places[some], values[some], x.shape)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def device(self) -> torch.device:
        return self.places.device

    def numel(self) -> int:
        return self.shape.numel()

    def contiguous(self) -> "EventList":
        return self

    def rows(self, width: int, most: float = math.inf) -> Rows | None:
        """The events in rows of this many inputs; None where there are more than `most`."""
        if len(self.places) > most:
            return None
        starts = torch.zeros(self.numel() // width + 1, dtype=torch.int64)
        row = self.places // width
        starts[1:] = torch.bincount(row, minlength=len(starts) - 1).cumsum(0)
        return Rows(starts, (self.places - row * width).int(), self.values.to(torch.float32), width)

    def to(self, target: torch.dtype | torch.device) -> "Tensor | EventList":
        """The list on a device, or the frames as a tensor of a type."""
        if isinstance(target, torch.device):
            return EventList(self.places.to(target), self.values.to(target), self.shape)
        frames = torch.zeros(self.numel(), dtype=target, device=self.device)
        frames[self.places] = self.values.to(target)
        return frames.view(self.shape)

    def equal(self, other: "EventList") -> bool:
        """Whether both stand for the same frames."""
        same = self.shape == other.shape and torch.equal(self.places, other.places)
        return same and torch.equal(self.values, other.values)

    # -- as of a tensor ------------------------------------------------------------------------------------

    def changed(self, name: str, *arguments: Any, **named: Any) -> "EventList":
        """What a tensor's method of this name gives: repeat and roll, or one that does but change the shape."""
        if name in ("repeat", "roll"):
            return getattr(self, name)(*arguments, **named)
        shape = getattr(torch.empty(self.shape, device="meta"), name)(*arguments, **named).shape
        return EventList(self.places, self.values, shape)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> "EventList":
        """A part of the first axes, by slices without a step."""
        first, *others = index if isinstance(index, tuple) else (index,)
        start, stop, _ = first.indices(len(self))
        block = math.prod(self.shape[1:])
        low, high = torch.searchsorted(self.places, torch.tensor([start, stop], device=self.device) * block).tolist()
        places, values = self.places[low:high] - start * block, self.values[low:high]
        shape = [max(0, stop - start), *self.shape[1:]]
        for axis, part in enumerate(others, 1):
            start, stop, _ = part.indices(shape[axis])
            stride, size = math.prod(shape[axis + 1 :]), max(0, stop - start)
            outer, here = places // (stride * shape[axis]), places // stride % shape[axis]
            inside = (here >= start) & (here < stop)
            places = ((outer * size + here - start) * stride + places % stride)[inside]
            values, shape[axis] = values[inside], size
        return EventList(places, values, torch.Size(shape))

    def repeat(self, *times: Any) -> "EventList":
        """As of a tensor."""
        times = tuple(times[0]) if isinstance(times[0], tuple | list) else times
        places, shape = self.places[None], [1] * (len(times) - len(self.shape)) + list(self.shape)
        for axis, count in enumerate(times):
            block = math.prod(shape[axis:])
            copies = torch.arange(count, device=self.device)[:, None, None] * block
            places = (places + places // block * (block * (count - 1)) + copies).flatten(0, 1)
            shape[axis] *= count
        return self._sorted(places.flatten(), self.values.repeat(len(places)), torch.Size(shape))

    def roll(self, shifts: int | tuple[int, ...], dims: int | tuple[int, ...] | None = None) -> "EventList":
        """As of a tensor."""
        if dims is None or dims == ():
            return self._sorted((self.places + shifts) % self.numel(), self.values, self.shape)
        places = self.places
        for shift, axis in zip(*(item if isinstance(item, tuple) else (item,) for item in (shifts, dims)), strict=True):
            size = self.shape[axis]
            stride = math.prod(self.shape[axis % len(self.shape) + 1 :])
            here = places // stride % size
            places = places + ((here + shift) % size - here) * stride
        return self._sorted(places, self.values, self.shape)

    @classmethod
    def _sorted(cls, places: Tensor, values: Tensor, shape: torch.Size) -> "EventList":
        order = places.argsort()
        return cls(places[order], values[order], shape)
