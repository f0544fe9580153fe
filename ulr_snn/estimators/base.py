"""What a training step is given, and what it gave."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ulr_snn.losses.named import Objective
from ulr_snn.model.events import Events, Frames


@dataclass(frozen=True)
class Batch:
    """frames [T, B, ...] as they came; dtype: of the model; targets [B, ...]; lengths [B], steps past them are padding,
    or None."""

    frames: Frames
    dtype: torch.dtype
    targets: Tensor
    lengths: Tensor | None
    objective: Objective

    @property
    def steps(self) -> int:
        return self.frames.shape[0]

    @property
    def samples(self) -> int:
        return self.frames.shape[1]

    @cached_property
    def x(self) -> Tensor:
        """The frames as a model sees them."""
        return Events.of(self.frames, self.dtype)

    @cached_property
    def valid(self) -> Tensor:
        """[T, B]: which time steps are no padding; one number of them all, where there is none."""
        if self.lengths is None:
            return torch.ones((), dtype=torch.bool, device=self.frames.device).expand(self.steps, self.samples)
        return torch.arange(self.steps, device=self.frames.device)[:, None] < self.lengths

    @cached_property
    def share(self) -> Tensor:
        """[T, B]: of each time step in a mean over the sample's own."""
        if self.lengths is None:
            one = torch.ones((), dtype=self.dtype, device=self.frames.device)
            return (one / self.steps).expand(self.steps, self.samples)
        return self.valid.to(self.dtype) / self.valid.sum(0)

    def part(self, first: tuple[slice, slice]) -> "Batch":
        """First time steps, and samples."""
        steps, samples = first
        lengths = None if self.lengths is None else self.lengths[samples].clamp(max=steps.stop)
        return replace(self, frames=self.frames[first], targets=self.targets[samples], lengths=lengths)


@dataclass
class Estimate:
    """What one step gave. loss: [B], mean over copies; outputs: [K, ...model's output...]; stats: plain numbers."""

    loss: Tensor
    outputs: Tensor
    stats: dict[str, Any]
