"""Reads what loaders give: which parts of a batch are inputs, targets and lengths, in the form inside the library."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence, pad_sequence

from ulr_snn.errors import UsageError
from ulr_snn.model.interface import Interface, axes_in_words
from ulr_snn.model.targets import as_tensors, of_array, ragged
from ulr_snn.model.trees import mapped, tensors
from ulr_snn.model.view import Slot, View

TARGETS = ("label", "labels", "label_ids", "target", "targets", "y")
LENGTHS = ("length", "lengths", "lens", "seq_len", "seq_lens", "seq_lengths")
INDICES = (torch.int32, torch.int64)
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
FORMS = "(x, y) or (x, y, lengths) of tensors, a dict with a key such as 'label', or x alone"


_taken: WeakKeyDictionary[Any, float] = WeakKeyDictionary()  # by forward, whose signature takes long to make


def takes(model: nn.Module) -> float:
    """Returns the number of inputs that a model's forward can take as arguments; infinite for *args or **kwargs."""
    forward: Any = model.forward
    if getattr(forward, "__self__", None) is not model:  # a forward of the instance's own
        return _takes(forward)
    function = forward.__func__
    if function not in _taken:
        _taken[function] = _takes(forward)
    return _taken[function]


def _takes(forward: Callable[..., Any]) -> float:
    arguments = inspect.signature(forward).parameters.values()
    return math.inf if any(argument.kind in VARIABLE for argument in arguments) else len(arguments)


def read(batch: Any, model: nn.Module, device: torch.device | None = None) -> tuple[Any, Any, Tensor | None]:
    """Returns (x, targets, lengths) of a loader's batch, on the device. x and targets may be trees of tensors.

    A batch is (x, y) or (x, y, lengths), a dict with named keys, or x alone, for losses without targets; the targets
    are then the inputs. Raises UsageError for anything else.
    """
    lengths: Any = None
    if isinstance(batch, Mapping):
        x, targets, lengths = parts_of(dict(batch), model)
    elif isinstance(batch, Tensor | numpy.ndarray):
        x = targets = batch
    elif isinstance(batch, tuple | list) and 1 <= len(batch) <= 3:
        x, targets = batch[0], batch[min(1, len(batch) - 1)]
        lengths = batch[2] if len(batch) == 3 else None
    else:
        raise UsageError(f"the loader gave a {type(batch).__name__}; it must give batches {FORMS}")
    if lengths is not None:
        lengths = lengths_of(lengths)
    if device is None:
        return x, targets, lengths

    def moved(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return tree.to(device, non_blocking=True)
        return mapped(tree, lambda tensor: tensor.to(device, non_blocking=True))

    return moved(x), moved(targets), lengths if lengths is None else lengths.to(device)


def lengths_of(given: Any) -> Tensor:
    """Returns lengths as a tensor. Raises UsageError for a third item of a batch that holds no whole numbers."""
    try:
        lengths = of_array(given)
    except (ValueError, TypeError, RuntimeError):
        lengths = None
    if lengths is None or lengths.ndim != 1 or lengths.is_complex() or lengths.dtype == torch.bool:
        held = type(given).__name__ if lengths is None else f"{lengths.dtype} of shape {tuple(lengths.shape)}"
        raise UsageError(
            f"the third item of a batch is a {held}; it must be the lengths [B] of the samples, so leave others out"
        )
    if lengths.is_floating_point() and not bool((lengths == lengths.round()).all()):  # nor is NaN equal to itself
        raise UsageError("the lengths of a batch are no whole numbers; give the number of time steps of each sample")
    return lengths.long()


def parts_of(batch: dict[Any, Any], model: nn.Module) -> tuple[Any, Any, Any]:
    """Returns inputs, targets and lengths of a batch with named parts. Inputs are the parts that the model's forward
    has an argument for, or else the only part that is a tensor."""
    keys = [key for key in TARGETS if key in batch]
    if len(keys) > 1:
        raise UsageError(f"a batch has the keys {keys}, which are all targets; rename all but one")
    lengths = next((batch[key] for key in LENGTHS if key in batch), None)
    rest = {k: v for k, v in batch.items() if k not in (*keys, *LENGTHS)}
    arguments = inspect.signature(model.forward).parameters
    inputs: Any = {key: value for key, value in rest.items() if key in arguments}
    if len(inputs) == 1:
        (inputs,) = inputs.values()
    elif not inputs:
        held = [v for v in rest.values() if isinstance(v, Tensor | numpy.ndarray | list) and not of_words(v)]
        if len(held) != 1:
            raise UsageError(
                f"a batch has the keys {list(batch)}, of which none is an argument of {type(model).__name__}.forward "
                f"({', '.join(arguments)}); name the inputs as its arguments"
            )
        (inputs,) = held
    return inputs, batch[keys[0]] if keys else inputs, lengths


def of_words(value: Any) -> bool:
    """Returns whether a value is a list of strings."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], str)


def one_tensor(x: Any, targets: Any, interface: Interface, model: nn.Module) -> tuple[Tensor, View, Tensor | None]:
    """Returns the inputs of a batch as one tensor [T, B, ...], [1, B, ...] for static inputs, with the form of several
    inputs or of indices (empty for one input of numbers), and the lengths of a list of sequences. Raises UsageError for
    inputs of a wrong shape."""
    lengths, most = None, takes(model)
    if isinstance(x, Tensor) and (x.is_nested or x.is_meta):
        kind = "a nested tensor" if x.is_nested else "on the meta device, without values"
        raise UsageError(f"the input is {kind}; give a tensor {axes_in_words(interface.layout)} or a list of sequences")
    if isinstance(x, numpy.ndarray):
        x = of_array(x)
    if isinstance(x, PackedSequence):
        x, lengths = pad_packed_sequence(x, interface.layout == "BT")
    if isinstance(x, list | tuple) and of_samples(x, targets, interface, most):
        x, lengths = padded(list(x), interface)
    if isinstance(x, list | tuple) and len(x) == 1:
        (x,) = x
    indices = isinstance(x, Tensor) and x.dtype in INDICES and reads_indices(model)
    if isinstance(x, Tensor) and not indices:
        return time_first(x, interface), View(), lengths
    arrays = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else [x] if indices else []
    if not arrays or not all(isinstance(item, Tensor | numpy.ndarray) for item in arrays):
        raise wrong_shape(type(x).__name__, interface)
    parts = as_tensors(x)
    found = [part.to_dense() if part.layout is torch.sparse_coo else part for part in tensors(parts)]
    least = 2 if interface.layout == "B" else 3
    without = found[0].unsqueeze(-1) if found[0].ndim == least - 1 else found[0]  # a feature, as indices are
    first = time_first(next((part for part in found if part.ndim >= least), without), interface)
    slots = [Slot.of(part, len(first), first.shape[1], interface.layout == "BT") for part in found]
    if interface.layout == "B":
        slots = [Slot("B", part.shape[1:]) if len(part) == first.shape[1] else None for part in found]
    known = [slot for slot in slots if slot is not None]
    if len(known) < len(slots):
        shapes = ", ".join(str(tuple(part.shape)) for part in found)
        raise UsageError(f"the inputs of a batch have the shapes {shapes}; give each the same samples and time steps")
    dtype = next((part.dtype for part in found if part.is_floating_point()), torch.get_default_dtype())
    view = View.of(parts, known)
    kept = [part.dtype if not part.is_floating_point() else None for part in found]
    view = replace(view, slots=tuple(replace(slot, dtype=kind) for slot, kind in zip(view.slots, kept, strict=True)))
    whole = view.internal([part.to(dtype) for part in found])
    return (whole if view.over_time else whole[None]), view, lengths


def reads_indices(model: nn.Module) -> bool:
    """Returns whether a model looks up rows of a table, for which torch takes no other numbers than INDICES."""
    return any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module in model.modules())


def time_first(x: Tensor, interface: Interface) -> Tensor:
    """Returns one input as [T, B, ...], a view; [1, B, ...] for a static input."""
    layout, least = interface.layout, 2 if interface.layout == "B" else 3
    if x.ndim < least:
        raise wrong_shape(tuple(x.shape), interface)
    if x.layout is torch.sparse_coo and x.dense_dim():
        x = x.to_dense()  # the values of a hybrid tensor are no single events
    if layout == "B":
        x = (x.to_dense() if x.layout is torch.sparse_coo else x)[None]
    elif layout == "BT":
        x = x.transpose(0, 1)
    if not all(x.shape):
        raise UsageError(
            f"events have shape {tuple(x.shape)}, without a step, a sample or a feature; leave empty batches out"
        )
    return x


def wrong_shape(what: object, interface: Interface) -> UsageError:
    """Returns the error for inputs that cannot be a batch of this layout."""
    if interface.layout == "B":
        return UsageError(f"the input has shape {what}; with layout='B' it must be a tensor [B, ...]")
    others = "[B, T, ...] with time_first=False, [B, ...] with layout='B'"
    if interface.layout == "BT":
        others = "[T, B, ...] with layout='TB', [B, ...] with layout='B'"
    return UsageError(
        f"events have shape {what}; they must be a tensor {axes_in_words(interface.layout)} (or {others})"
    )


def of_samples(x: list[Any] | tuple[Any, ...], targets: Any, interface: Interface, most: float) -> bool:
    """Returns whether a list holds one sequence for each sample, and not several inputs of the model."""
    arrays = all(isinstance(item, Tensor | numpy.ndarray) and item.ndim for item in x)
    if not x or not arrays or interface.layout == "B":
        return False
    if ragged(list(x)):
        return True
    number = len(x) if targets is x else samples_of(targets)
    if number != len(x):
        return False
    axis = int(interface.layout == "TB")  # of the samples, if the items are inputs
    inputs = all(item.ndim > 2 and item.shape[axis] == number for item in x)
    return len(x) > most or (len(x) > 1 and most == 1) or not inputs


def samples_of(targets: Any) -> int | None:
    """Returns the number of samples of targets: that of a list of sequences, or the length of the first tensor."""
    if isinstance(targets, list) and targets and isinstance(targets[0], Tensor | numpy.ndarray):
        return len(targets)
    return next((len(leaf) for leaf in tensors(as_tensors(targets)) if leaf.ndim), None)


def padded(x: list[Any], interface: Interface) -> tuple[Tensor, Tensor]:
    """Returns a list of sequences [T_i, ...] as one tensor in the batch's layout, padded by zeros, and the lengths."""
    parts = [of_array(item) for item in x]
    if interface.layout == "B" or len({part.shape[1:] for part in parts}) > 1:
        raise UsageError(
            f"the input is a list of {len(x)} sequences; give sequences [T_i, ...] with layout 'TB' or 'BT'"
        )
    lengths = torch.tensor([len(part) for part in parts])
    return pad_sequence(parts, batch_first=interface.layout == "BT"), lengths
