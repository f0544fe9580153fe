"""The targets of a batch: a tensor, or a tree of tensors, for each sample or for each of its time steps."""

from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor

from ulr_snn.errors import UsageError
from ulr_snn.model.trees import mapped, tensors
from ulr_snn.model.view import AS_IS, View

IGNORED = -100  # the label that torch's cross-entropies leave out


@dataclass(frozen=True)
class Leaf:
    """A tensor of targets, [T, B, ...] if over_time, else [B, ...]. turned: users gave it as [B, T, ...]. listed: users
    gave a list with an item for each sample."""

    tensor: Tensor
    over_time: bool = False
    turned: bool = False
    listed: bool = False

    @classmethod
    def of(cls, given: Tensor, layout: str, steps: int, samples: int, view: View, listed: bool = False) -> "Leaf":
        """Makes a leaf from a tensor in the batch's layout; [B, ...] if listed. view: the form of the outputs."""
        shape = given.shape
        if given.ndim < 2 or (shape[0] == samples and of_samples(given, view)):
            return cls(given, listed=listed)
        if layout != "BT" and not listed and shape[:2] == (steps, samples):
            return cls(given, over_time=True)
        if (layout != "TB" or listed) and shape[:2] == (samples, steps):
            return cls(given.transpose(0, 1), over_time=True, turned=layout != "TB", listed=listed)
        return cls(given, listed=listed)

    def seen_by(self, view: View, layout: str, steps: int, samples: int) -> "Leaf":
        """Returns the leaf for outputs of this form, which show whether an axis is time."""
        given = self.tensor.transpose(0, 1) if self.listed and self.over_time else self.external()
        return Leaf.of(given, layout, steps, samples, view, self.listed)

    @property
    def axis(self) -> int:
        """The axis of the samples."""
        return int(self.over_time)

    def external(self) -> Tensor:
        """Returns the tensor in the user's form."""
        return self.tensor.transpose(0, 1) if self.turned else self.tensor


@dataclass(frozen=True)
class Targets:
    """The targets of a batch. tree: a `Leaf`, or a tuple, list or dict of leaves. share: the share of a whole batch's
    samples that have a label, if they are class indices and this is a part of them or has copies."""

    tree: Any
    share: Tensor | None = None

    @classmethod
    def of(cls, tree: Any, layout: str, steps: int, samples: int, listed: bool = False) -> "Targets":
        """Makes targets from tensors in the batch's layout. listed: see `Leaf`."""
        return cls(mapped(tree, lambda tensor: Leaf.of(tensor, layout, steps, samples, AS_IS, listed)))

    @classmethod
    def alone(cls, targets: "Targets | Tensor", outputs: Tensor) -> "Targets":
        """Returns targets as they are, or makes them from a tensor in the form inside the library, with outputs
        [T, B, ...] or [B, F]."""
        if isinstance(targets, Targets):
            return targets
        several = targets.ndim > 2 or not targets.is_floating_point() or outputs.shape[-1] == 1  # else [B, C]
        return cls(Leaf(targets, outputs.ndim > 2 and several and targets.shape[:2] == outputs.shape[:2]))

    def moved(self, function: Any) -> "Targets":
        """Returns targets with function(leaf) in place of each tensor."""
        return replace(self, tree=mapped(self.tree, lambda x: replace(x, tensor=function(x)), Leaf))

    def seen_by(self, view: View, layout: str, steps: int, samples: int) -> "Targets":
        """Returns the targets for outputs of this form."""
        return Targets(mapped(self.tree, lambda x: x.seen_by(view, layout, steps, samples), Leaf))

    def repeated(self, count: int) -> "Targets":
        """Returns the targets of `count` copies of the batch, row = copy * B + sample."""
        if count == 1:
            return self
        return self.moved(lambda x: torch.cat([x.tensor] * count, x.axis))

    def part(self, steps: slice, samples: slice) -> "Targets":
        """Returns the targets of these time steps and samples."""
        return self.moved(lambda x: x.tensor[steps, samples] if x.over_time else x.tensor[samples])

    def external(self) -> Any:
        """Returns the targets in the user's form."""
        return mapped(self.tree, Leaf.external, Leaf)

    @property
    def tensor(self) -> Tensor:
        """The tensor of `only`."""
        return self.only.tensor

    @property
    def only(self) -> Leaf:
        """The only tensor, [T, B, ...] or [B, ...]. Raises UsageError for a tree of several."""
        if not isinstance(self.tree, Leaf):
            found: list[Leaf] = []
            mapped(self.tree, found.append, Leaf)
            if len(found) != 1:
                raise UsageError(
                    f"the targets are a {type(self.tree).__name__} of {len(found)} tensors; give a loss and metrics of "
                    "your own that take them"
                )
            return found[0]
        return self.tree

    def labelled(self, valid: Tensor | None = None) -> Tensor | None:
        """Returns the share of samples that have a label, in a time step that is `valid` [T, B]; None if targets are no
        class indices."""
        labels = self.labels
        if self.share is not None or labels is None:
            return self.share
        known = ~left_out(labels)
        if labels.ndim > 1:
            known = (known if valid is None else known & valid).any(0)
        return known.double().mean()

    @property
    def labels(self) -> Tensor | None:
        """The tensor if it holds class indices, [B] or [T, B]; None for other targets."""
        leaf = self.tree
        if not isinstance(leaf, Leaf) or leaf.tensor.is_floating_point() or leaf.tensor.is_complex():
            return None
        return leaf.tensor if leaf.tensor.ndim == 1 + leaf.axis else None


def left_out(labels: Tensor, index: int = IGNORED) -> Tensor:
    """Returns whether each label is the index that a loss leaves out. In uint8, 156 is not -100."""
    return labels.long() == index


def of_array(given: Any) -> Tensor:
    """Returns a tensor of an array or a number. Torch takes only arrays in the machine's byte order with positive
    strides, so others are copied. Raises UsageError for an array of objects."""
    if isinstance(given, numpy.ndarray | numpy.generic):
        if given.dtype.kind not in "biufc":
            raise UsageError(f"a batch holds an array of {given.dtype}; give numbers, as by .astype('float32')")
        if min(given.strides, default=0) < 0 or not given.dtype.isnative:
            given = numpy.array(given, given.dtype.newbyteorder("="), order="C")
    return torch.as_tensor(given)


def as_tensors(given: Any) -> Any:
    """Returns a tree of tensors. NumPy arrays, numbers and lists of numbers become tensors.

    A list of tensors over time of unequal length is padded, class indices by -100 and numbers by 0, to [B, T, ...].
    """
    if isinstance(given, Tensor):
        return given
    if isinstance(given, numpy.ndarray | numpy.generic | int | float):
        return of_array(given)
    if (
        isinstance(given, list | tuple)
        and given
        and all(isinstance(item, int | float | numpy.generic) for item in given)
    ):
        return torch.as_tensor(given)
    if isinstance(given, list) and ragged(given):
        return padded([of_array(item) for item in given], batch_first=True)
    if isinstance(given, dict):
        return {key: as_tensors(item) for key, item in given.items()}
    if isinstance(given, list | tuple):
        parts = [as_tensors(item) for item in given]
        return type(given)(*parts) if hasattr(given, "_fields") else type(given)(parts)
    raise UsageError(f"the targets hold {type(given).__name__} {given!r:.40}; give tensors, arrays or numbers")


def of_samples(targets: Tensor, view: View) -> bool:
    """Returns whether the outputs show that targets [B, N, ...] have no time axis, even if N is the number of steps:
    values of the shape of a sample's outputs, or class indices for all their axes but that of classes."""
    if not view.slots or not view.over_time:
        return bool(view.slots)
    if len(view.slots) > 1:
        return False
    shape, own = view.slots[0].shape, targets.shape[1:]
    if targets.is_floating_point() or targets.dtype == torch.bool:
        return own == shape or (len(own) == 1 and shape[-1:].numel() != 1)  # [B, C] may look like [B, T] or [T, B]
    return len(shape) > 1 and own == shape[1:]


def of_sequences(targets: list[Any], layout: str, lengths: Tensor) -> tuple[Any, bool]:
    """Returns the targets of a list of sequences of these lengths, one item a sample, and whether they are a tensor
    [B, ...], over time or not. Items as long as sequences of unequal lengths are padded over time instead, in the
    layout of the batch: by 0, or by -100 for labels."""
    if not all(isinstance(item, Tensor | numpy.ndarray) for item in targets):
        return targets, False
    parts = [of_array(item) for item in targets]
    if len({part.shape for part in parts}) == 1:
        return torch.stack(parts), True
    if any(part.ndim == 0 or len(part) != length for part, length in zip(parts, lengths.tolist(), strict=True)):
        return targets, False
    return padded(parts, batch_first=layout == "BT"), False


def padded(parts: list[Tensor], batch_first: bool) -> Tensor:
    """Returns targets over time of unequal length as one tensor. Values and bools are padded by 0. Class indices become
    int64 and are padded by -100."""
    values = any(part.is_floating_point() or part.is_complex() or part.dtype == torch.bool for part in parts)
    parts = parts if values else [part.long() for part in parts]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first, 0 if values else IGNORED)


def ragged(items: list[Any]) -> bool:
    """Returns whether a list holds the sequences of its samples, which differ in their length alone."""
    shapes = [tuple(item.shape) if isinstance(item, Tensor | numpy.ndarray) else () for item in items]
    return all(shapes) and len({shape[1:] for shape in shapes}) == 1 and len({shape[0] for shape in shapes}) > 1


def check_samples(tree: Any, layout: str, steps: int, samples: int) -> None:
    """Raises UsageError unless every tensor of the targets has an entry for each sample."""
    for tensor in tensors(tree):
        shape = tuple(tensor.shape)
        over_time = shape[:2] == (steps, samples) and layout != "BT"
        if shape[:1] == (samples,) or over_time:
            continue
        if layout == "B":
            raise UsageError(
                f"a static input holds {samples} samples, but there are {shape[0] if shape else 'no'} targets; give "
                "one target a sample"
            )
        hint = "give one target a sample, or one a step in the batch's layout"
        if shape[:1] == (steps,):
            static = ", or layout='B' for a static input [B, ...]" if layout == "TB" else ""
            hint = f"the time axis looks swapped, pass time_first={layout == 'BT'}{static}"
        count = shape[0] if shape else "no"
        raise UsageError(f"events hold {samples} samples of {steps} steps, but there are {count} targets; {hint}")
