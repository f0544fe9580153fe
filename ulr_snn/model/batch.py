"""The batch of a training step: frames or listed events with time first, on the model's device."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.errors import UsageError
from ulr_snn.losses.named import Objective
from ulr_snn.model.event_list import EventList
from ulr_snn.model.events import Events, Frames


@dataclass(frozen=True)
class Batch:
    """A batch of samples with targets. frames [T, B, ...] in their own dtype; dtype: the model's; targets [B, ...];
    lengths [B] or None: later steps are padding."""

    frames: Frames
    dtype: torch.dtype
    targets: Tensor
    lengths: Tensor | None
    objective: Objective

    @classmethod
    def of(
        cls,
        model: nn.Module,
        x: Tensor,
        targets: Tensor,
        lengths: Tensor | None,
        objective: Objective,
        time_first: bool,
    ) -> "Batch":
        """Makes a batch on the model's device from x [T, B, ...] ([B, T, ...] unless time_first). x is dense, or a
        sparse COO tensor that lists events. Raises UsageError if x, targets and lengths do not fit."""
        check_shapes(x, targets, time_first)
        if x.layout is torch.sparse_coo and x.dense_dim():
            x = x.to_dense()  # the values of a hybrid tensor are no single events
        x = x if time_first else x.transpose(0, 1)
        if lengths is not None and (lengths.shape != targets.shape[:1] or lengths.min() < 1 or lengths.max() > len(x)):
            raise UsageError(f"lengths must be [B], each from 1 to the {len(x)} steps of the batch")
        reference = next((p for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()), None)
        dtype = reference.dtype if reference is not None else torch.get_default_dtype()
        frames = EventList.of(x) if x.layout is torch.sparse_coo else x
        values = frames.values if isinstance(frames, EventList) else frames
        if values.is_floating_point() and not torch.isfinite(values).all():
            raise UsageError("events contain NaN or infinite values; clean the recordings first")
        device = reference.device if reference is not None else x.device
        lengths = None if lengths is None else lengths.to(device)
        return cls(frames.to(device), dtype, targets.to(device), lengths, objective)

    @property
    def steps(self) -> int:
        return self.frames.shape[0]

    @property
    def samples(self) -> int:
        return self.frames.shape[1]

    @cached_property
    def x(self) -> Tensor:
        """The frames in the model's dtype, as `Events` where they are sparse."""
        return Events.of(self.frames, self.dtype)

    def first_samples(self, count: int) -> Tensor:
        """All time steps of the first samples, as in `x`."""
        return Events.of(self.frames[:, :count], self.dtype)

    @cached_property
    def valid(self) -> Tensor:
        """[T, B]: True where a time step is not padding. Without lengths it is one expanded number."""
        if self.lengths is None:
            return torch.ones((), dtype=torch.bool, device=self.frames.device).expand(self.steps, self.samples)
        return torch.arange(self.steps, device=self.frames.device)[:, None] < self.lengths

    @cached_property
    def share(self) -> Tensor:
        """[T, B]: the weight of each time step in a mean over the sample's own steps."""
        if self.lengths is None:
            one = torch.ones((), dtype=self.dtype, device=self.frames.device)
            return (one / self.steps).expand(self.steps, self.samples)
        return self.valid.to(self.dtype) / self.valid.sum(0)

    def part(self, first: tuple[slice, slice]) -> "Batch":
        """Returns the batch of these first time steps and samples."""
        steps, samples = first
        lengths = None if self.lengths is None else self.lengths[samples].clamp(max=steps.stop)
        return replace(self, frames=self.frames[first], targets=self.targets[samples], lengths=lengths)


def check_shapes(x: Any, targets: Tensor, time_first: bool) -> None:
    """Raises UsageError unless x can hold one sequence of events for each target."""
    if not isinstance(x, Tensor) or x.ndim < 3:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise UsageError(
            f"events have shape {shape}; they must be a tensor [T, B, ...] (or [B, T, ...], time_first=False)"
        )
    steps, samples = x.shape[:2] if time_first else (x.shape[1], x.shape[0])
    if not (steps and samples):
        shape = (steps, samples, *x.shape[2:])
        raise UsageError(f"events have shape {shape}, without a step or a sample; leave empty batches out")
    if samples != len(targets):
        hint = "give one target a sample"
        if steps == len(targets):
            hint = f"the time axis looks swapped, pass time_first={not time_first}"
        raise UsageError(
            f"events hold {samples} samples of {steps} steps, but there are {len(targets)} targets; {hint}"
        )
