"""Several tensors as one: the form of outputs and inputs inside the library, and the form that users know.

Inside, a pass has one output tensor: [T, B, ...] over time, or [B, F] without a time axis. A model may return several
tensors, with the batch first, or images. A `View` converts between both forms, differentiably.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ulr_snn.model.trees import mapped, tensors


@dataclass(frozen=True)
class Slot:
    """The form of one tensor. axes: "TB", "BT" (both over time) or "B". shape: that of a sample in a time step. dtype:
    the user's, if it is not the one inside the library."""

    axes: str
    shape: torch.Size
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, tensor: Tensor, steps: int, samples: int, batch_first: bool = False) -> "Slot | None":
        """Returns the form of a tensor of so many steps and samples; None if none fits."""
        shape, turned = tensor.shape, (steps, samples) if batch_first else (samples, steps)
        if batch_first and shape[:2] == (samples, steps):
            return cls("BT", shape[2:])
        if not batch_first and shape[:2] == (steps, samples):
            return cls("TB", shape[2:])
        static = shape[:1] == (samples,) and not (len(shape) > 2 and shape[:2] == turned)
        return cls("B", shape[1:]) if static else None

    @property
    def over_time(self) -> bool:
        return self.axes != "B"

    def internal(self, tensor: Tensor) -> Tensor:
        """Returns the tensor as [T, B, ...] or [B, F]."""
        if not self.over_time:
            return tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]
        tensor = tensor.transpose(0, 1) if self.axes == "BT" else tensor
        return tensor if tensor.ndim > 2 else tensor[..., None]

    def external(self, tensor: Tensor) -> Tensor:
        """Returns a tensor [T, B, ...] or [B, F] in the user's form."""
        tensor = tensor if self.dtype is None else tensor.to(self.dtype)
        if not self.over_time:
            return tensor.reshape(-1, *self.shape)
        tensor = tensor.reshape(*tensor.shape[:2], *self.shape)
        return tensor.transpose(0, 1) if self.axes == "BT" else tensor


@dataclass(frozen=True)
class Index:
    """The place of a tensor in the tree of a `View`."""

    number: int


@dataclass(frozen=True)
class View:
    """The form of a tree of tensors. slots: one for each tensor; tree: the tree with the index of its slot in place of
    each tensor. Without slots, the form is the one inside the library."""

    slots: tuple[Slot, ...] = ()
    tree: Any = 0

    @classmethod
    def of(cls, tree: Any, slots: list[Slot]) -> "View":
        """Returns the view of a tree, whose tensors have these forms."""
        numbers = iter(range(len(slots)))
        return cls(tuple(slots), mapped(tree, lambda _: Index(next(numbers))))

    @property
    def over_time(self) -> bool:
        """True if a tensor has a time axis."""
        return any(slot.over_time for slot in self.slots)

    def turned(self, axes: str) -> "View":
        """Returns the same form with these axes, "TB" or "BT", in all tensors over time."""
        return replace(self, slots=tuple(replace(slot, axes=axes) if slot.over_time else slot for slot in self.slots))

    @property
    def time_first(self) -> "View":
        """The same form with time first."""
        return self.turned("TB")

    def internal(self, tree: Any) -> Tensor:
        """Returns the tensors of a tree as one tensor [T, B, ...] or [B, F]. A tensor without a time axis beside others
        over time is repeated over time."""
        found = tensors(tree)
        if not self.slots:
            return found[0]
        parts = [slot.internal(tensor) for slot, tensor in zip(self.slots, found, strict=True)]
        if len(parts) == 1:
            return parts[0]
        if not self.over_time:
            return torch.cat(parts, 1)
        steps = next(len(part) for slot, part in zip(self.slots, parts, strict=True) if slot.over_time)
        sequences = [
            part.flatten(2) if slot.over_time else part.expand(steps, *part.shape)
            for slot, part in zip(self.slots, parts, strict=True)
        ]
        return torch.cat(sequences, 2)

    def external(self, tensor: Tensor) -> Any:
        """Returns the tree in the user's form from a tensor [T, B, ...] or [B, F]. A tensor without a time axis beside
        others over time is read at the first time step, which is no padding in any sample."""
        if not self.slots:
            return tensor
        if len(self.slots) == 1:
            parts = [self.slots[0].external(tensor)]
        else:
            pieces = tensor.split([math.prod(slot.shape) for slot in self.slots], -1)
            parts = [
                slot.external(piece[0] if self.over_time and not slot.over_time else piece)
                for slot, piece in zip(self.slots, pieces, strict=True)
            ]
        return mapped(self.tree, lambda index: parts[index.number], Index)


AS_IS = View()  # one tensor in the form inside the library
