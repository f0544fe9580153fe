"""The batch of a training step: frames or listed events with time first, on the model's device."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.errors import UsageError
from ulr_snn.kernels import ranks
from ulr_snn.losses.named import Objective
from ulr_snn.model.event_list import EventList
from ulr_snn.model.events import Events, Frames
from ulr_snn.model.interface import USUAL, Interface
from ulr_snn.model.mode import all_finite
from ulr_snn.model.reading import lengths_of, one_tensor
from ulr_snn.model.targets import Leaf, Targets, as_tensors, check_samples, of_sequences
from ulr_snn.model.trees import items, mapped
from ulr_snn.model.view import AS_IS, Index, View


@dataclass(frozen=True)
class Batch:
    """A batch of samples with targets. frames [T, B, ...] in their own dtype; dtype: the model's; lengths [B] or None:
    later steps are padding. inputs: the form of several inputs, which `frames` holds as one tensor; view: the form of
    the outputs.

    A batch of static inputs has one frame, until `over` repeats it for each time step that the model runs.
    """

    frames: Frames
    dtype: torch.dtype
    targets: Targets
    lengths: Tensor | None
    objective: Objective
    interface: Interface = USUAL
    inputs: View = AS_IS
    view: View = AS_IS

    @classmethod
    def of(
        cls,
        model: nn.Module,
        x: Any,
        targets: Any,
        lengths: Tensor | None,
        objective: Objective,
        interface: Interface | bool = True,
    ) -> "Batch":
        """Makes a batch on the model's device. x: a dense tensor in the layout of `interface`, a sparse COO tensor that
        lists events, a list of sequences, or a tuple or dict of several inputs. Raises UsageError if x, targets and
        lengths do not fit."""
        interface = Interface.of(interface)
        if interface.layout == "B" and lengths is not None:
            raise UsageError("a static input has no time steps, but the batch has lengths; leave lengths out")
        x_given = x
        x, inputs, own_lengths = one_tensor(x, targets, interface, model)
        x = tracked(x)
        listed = False
        if own_lengths is not None and isinstance(targets, list) and targets is not x_given:
            targets, listed = of_sequences(targets, interface.layout, own_lengths)
        lengths = own_lengths if lengths is None else lengths_of(lengths)
        if targets is x_given and objective.needs_labels:
            raise UsageError("the batches hold no targets, which the loss needs; give (x, y), or a loss of the outputs")
        tree, (steps, samples) = as_tensors(targets), x.shape[:2]
        check_samples(tree, interface.layout, steps, samples)
        if lengths is not None and (lengths.shape != (samples,) or lengths.min() < 1 or lengths.max() > steps):
            raise UsageError(f"lengths must be [B], each from 1 to the {steps} steps of the batch")
        if lengths is not None and ranks.count() == 1 and bool((lengths == steps).all()):
            lengths = None  # there is no padding; of several ranks another may have some
        reference = next((p for p in chain(model.parameters(), model.buffers()) if p.is_floating_point()), None)
        dtype = reference.dtype if reference is not None else torch.get_default_dtype()
        frames = EventList.of(x) if x.layout is torch.sparse_coo else x
        check_events(frames, dtype, inputs, interface.layout == "B")
        placed = Targets.of(tree, interface.layout, steps, samples, listed)
        check_targets(placed, objective)
        device = reference.device if reference is not None else x.device
        lengths = None if lengths is None else lengths.to(device)
        placed = placed.moved(lambda leaf: tracked(leaf.tensor).to(device))
        return cls(frames.to(device), dtype, placed, lengths, objective, interface, inputs)

    @property
    def static(self) -> bool:
        """True if the model repeats or encodes a static input itself."""
        return self.interface.layout == "B"

    def over(self, steps: int) -> "Batch":
        """Returns the batch with a static input repeated for each of these time steps."""
        if not isinstance(self.frames, Tensor) or not self.static:
            return self
        return replace(self, frames=self.frames[:1].expand(steps, *self.frames.shape[1:]))

    def seen_by(self, view: View) -> "Batch":
        """Returns the batch as a model sees it whose outputs have this form. Raises UsageError if the objective does
        not fit the outputs."""
        targets = self.targets.seen_by(view, self.interface.layout, self.steps, self.samples)
        targets = replace(targets, share=targets.labelled(self.valid))
        return replace(self, view=view, targets=targets, objective=self.objective.seen_by(view))

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

    def copies(self, count: int) -> Tensor:
        """Returns `x` of `count` copies, row = copy * B + sample."""
        if count == 1:
            return self.x
        if self.static:
            return self.x[:1].repeat(1, count, *[1] * (self.x.ndim - 2)).expand(self.steps, -1, *self.x.shape[2:])
        return self.x.repeat(1, count, *[1] * (self.x.ndim - 2))

    def first_samples(self, count: int, steps: int) -> Tensor:
        """The first time steps of the first samples, as in `x`."""
        return Events.of(self.frames[:steps, :count], self.dtype)

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

    def joined(self) -> "Batch":
        """Returns the batch of this rank, whose losses are means over the labelled samples of the joined batch."""
        here, own = ranks.share(), self.targets.share
        if here is None or own is None:
            return self
        return replace(self, targets=replace(self.targets, share=torch.full_like(own, here.labelled / here.total)))

    def part(self, first: tuple[slice, slice]) -> "Batch":
        """Returns the batch of these first time steps and samples."""
        steps, samples = first
        lengths = None if self.lengths is None else self.lengths[samples].clamp(max=steps.stop)
        return replace(self, frames=self.frames[first], targets=self.targets.part(steps, samples), lengths=lengths)


def tracked(x: Tensor) -> Tensor:
    """Returns the tensor, or a copy of a tensor of inference mode, which autograd refuses."""
    return x.clone() if x.is_inference() else x


def check_events(frames: Frames, dtype: torch.dtype, inputs: View, static: bool) -> None:
    """Raises UsageError for complex events, and for events that are not finite in the model's type. inputs: the form of
    several inputs; static: the frames are a single one."""
    events = frames.values if isinstance(frames, EventList) else frames
    if events.is_complex():
        raise UsageError("events are complex numbers; give real ones, such as real and imaginary parts as two features")
    if not all_finite(events):
        place = _event(frames, torch.isfinite(events), inputs, static)
        raise UsageError(f"events contain NaN or infinite values, first {place}; clean the recordings")
    kind = torch.finfo(events.dtype) if events.is_floating_point() else None
    most = kind.max if kind is not None else 1 if events.dtype == torch.bool else torch.iinfo(events.dtype).max
    if most > torch.finfo(dtype).max and not (finite := torch.isfinite(events.to(dtype))).all():
        place = _event(frames, finite, inputs, static)
        raise UsageError(f"events are too large for {dtype}, the type of the model, first {place}; scale them down")


def check_targets(targets: Targets, objective: Objective) -> None:
    """Raises UsageError for targets without values, and for targets that are not finite unless the loss is the user's
    own."""
    alone = isinstance(targets.tree, Leaf)
    for key, part in [("", targets.tree)] if alone else items(targets.tree):
        leaves: list[Leaf] = []
        mapped(part, leaves.append, Leaf)
        for leaf in leaves:
            if leaf.tensor.is_meta:
                raise UsageError("the targets are on the meta device, without values; give tensors with values")
            if objective.brought or not leaf.tensor.is_floating_point():
                continue
            if not (finite := torch.isfinite(leaf.tensor)).all():
                place = _place(_first(~finite), leaf.over_time)
                name = "targets" if alone else f"targets {key!r}"
                raise UsageError(
                    f"the {name} contain NaN or infinite values, first {place}; leave them out, or mask them"
                )


def _first(bad: Tensor) -> list[int]:
    """Returns the index of the first True."""
    return [int(index) for index in bad.nonzero()[0]]


def _place(index: list[int], over_time: bool) -> str:
    """Describes an index [t, b, ...], or [b, ...]."""
    return f"at time step {index[0]} of sample {index[1]}" if over_time else f"in sample {index[0]}"


def _event(frames: Frames, finite: Tensor, inputs: View, static: bool) -> str:
    """Describes the place of the first event that is not finite. Several inputs are one tensor here, see `View`."""
    if isinstance(frames, EventList):
        place = int(frames.places[~finite][0])
        index = [int(at) for at in torch.unravel_index(torch.tensor(place), frames.shape)]
    else:
        index = _first(~finite)
    if len(inputs.slots) < 2:
        return _place(index[static:], not static)
    ends = torch.tensor([slot.shape.numel() for slot in inputs.slots]).cumsum(0)
    number = int((ends <= index[2]).sum())
    over_time = inputs.slots[number].over_time and not static
    name = next((key for key, leaf in items(inputs.tree) if leaf == Index(number)), number)
    return f"{_place(index[not over_time :], over_time)}, in the input {name!r}"
