"""Lists of events that stand for frames, made from torch's sparse tensors (COO)."""

import math
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from ulr_snn.kernels.sparse import Rows


@dataclass(frozen=True, eq=False)
class EventList:
    """Frames [T, B, ...] as a list of events. places: int64 [E], ascending positions in the flattened frames. values:
    [E], the number of events at each."""

    places: Tensor
    values: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, x: Tensor) -> "EventList":
        """Makes the list from a sparse COO tensor [T, B, ...] without dense axes. Repeated entries are summed."""
        if not x.is_floating_point():
            x = x.to(torch.float32)  # before summation: sums may overflow small integers
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
        """Returns the events in rows of `width` inputs, or None if there are more than `most`."""
        if len(self.places) > most:
            return None
        starts = torch.zeros(self.numel() // width + 1, dtype=torch.int64)
        row = self.places // width
        starts[1:] = torch.bincount(row, minlength=len(starts) - 1).cumsum(0)
        return Rows(starts, (self.places - row * width).int(), self.values.to(torch.float32), width)

    @overload
    def to(self, target: torch.dtype) -> Tensor: ...
    @overload
    def to(self, target: torch.device) -> "EventList": ...
    def to(self, target: torch.dtype | torch.device) -> "Tensor | EventList":
        """Returns the list on a device, or the frames as a tensor of a dtype."""
        if isinstance(target, torch.device):
            return EventList(self.places.to(target), self.values.to(target), self.shape)
        frames = torch.zeros(self.numel(), dtype=target, device=self.device)
        frames[self.places] = self.values.to(target)
        return frames.view(self.shape)

    def equal(self, other: "EventList") -> bool:
        """Returns whether both lists stand for the same frames."""
        same = self.shape == other.shape and torch.equal(self.places, other.places)
        return same and torch.equal(self.values, other.values)

    # -- methods of a tensor -------------------------------------------------------------------------------

    def changed(self, name: str, *arguments: Any, **named: Any) -> "EventList":
        """Applies a tensor's method by name: repeat, roll, or one that only changes the shape."""
        if name in ("repeat", "roll"):
            return getattr(self, name)(*arguments, **named)
        shape = getattr(torch.empty(self.shape, device="meta"), name)(*arguments, **named).shape
        return EventList(self.places, self.values, shape)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> "EventList":
        """Returns a part of the first axes, given by slices without a step."""
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
        """Repeats the frames as `Tensor.repeat` does."""
        times = tuple(times[0]) if isinstance(times[0], tuple | list) else times
        places, shape = self.places[None], [1] * (len(times) - len(self.shape)) + list(self.shape)
        for axis, count in enumerate(times):
            block = math.prod(shape[axis:])
            copies = torch.arange(count, device=self.device)[:, None, None] * block
            places = (places + places // block * (block * (count - 1)) + copies).flatten(0, 1)
            shape[axis] *= count
        return self._sorted(places.flatten(), self.values.repeat(len(places)), torch.Size(shape))

    def roll(self, shifts: int | tuple[int, ...], dims: int | tuple[int, ...] | None = None) -> "EventList":
        """Rolls the frames as `Tensor.roll` does."""
        if dims is None or dims == ():
            (shift,) = shifts if isinstance(shifts, tuple) else (shifts,)
            return self._sorted((self.places + shift) % self.numel(), self.values, self.shape)
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
