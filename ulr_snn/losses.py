"""Per-sample losses, named as in snntorch.functional where it has them: (outputs, targets, mask) -> [B].

outputs: [T, B, C] over time (spikes, currents or membranes), or [B, C] (already reduced over time by the model).
targets: class indices [B] (int64) for the cross-entropies, [B, C] for mse. mask: [T, B, 1], 0 on padding, or None.
"""

import copy
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ulr_snn.errors import UsageError

Loss = Callable[[Tensor, Tensor], Tensor]


def total(outputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Outputs summed over time, [B, C]; outputs without a time axis as they are."""
    if outputs.ndim < 3:
        return outputs
    return (outputs if mask is None else outputs * mask).sum(0)


def ce_count(outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy of the outputs summed over time (snntorch.functional.ce_count_loss)."""
    return F.cross_entropy(total(outputs, mask), targets.long(), reduction="none")


def ce_rate(outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy of every time step's outputs, averaged over time (snntorch.functional.ce_rate_loss)."""
    if outputs.ndim < 3:
        return ce_count(outputs, targets)
    steps = F.cross_entropy(outputs.flatten(0, 1), targets.long().repeat(len(outputs)), reduction="none")
    steps = steps.view(outputs.shape[:2])
    if mask is None:
        return steps.mean(0)
    mask = mask.view(steps.shape)
    return (steps * mask).sum(0) / mask.sum(0)


def mse(outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error, summed over features and averaged over time; targets of the shape of the outputs, or of one time
    step of them (the same target at every step). Raises UsageError for any other shape."""
    shape = outputs.shape if outputs.ndim < 3 else outputs.shape[1:]
    if targets.shape not in (outputs.shape, shape):
        raise UsageError(
            f"mse got targets of shape {tuple(targets.shape)} for outputs of shape {tuple(outputs.shape)}; "
            f"give targets {list(shape)}"
        )
    error = (outputs - targets) ** 2
    if outputs.ndim < 3:
        return error.flatten(1).sum(1)
    error = error.flatten(2).sum(2)
    if mask is None:
        return error.mean(0)
    mask = mask.view(error.shape)
    return (error * mask).sum(0) / mask.sum(0)


LOSSES: dict[str, Callable[..., Tensor]] = {"ce_count": ce_count, "ce_rate": ce_rate, "mse": mse}


def resolve(loss: str | Loss) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The loss as (outputs, targets, mask) -> [B]; a callable of one's own sees padded outputs as zeros.

    A loss object with a `reduction` (torch's, snnTorch's) is asked for its single values, and reduced so over all but
    the batch. Raises UsageError for an unknown name, labels out of range, or a result that is not one value a sample.
    """
    if isinstance(loss, str) and loss not in LOSSES:
        raise UsageError(f"loss={loss!r} is not known; use {', '.join(LOSSES)} or a callable (outputs, targets) -> [B]")

    own, reduction = loss, getattr(loss, "reduction", "none")
    if reduction in ("mean", "sum"):
        own = copy.copy(loss)
        own.reduction = "none"

    def per_sample(outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        if isinstance(loss, str):
            if loss.startswith("ce"):
                check_labels(targets, outputs.shape[-1])
            value = LOSSES[loss](outputs, targets, mask)
        else:
            value = own(outputs if mask is None or outputs.ndim < 3 else outputs * mask, targets)
        batch = outputs.shape[1] if outputs.ndim >= 3 else outputs.shape[0]
        if own is not loss and isinstance(value, Tensor) and value.ndim > 1:
            value = each_sample(
                value, 1 if outputs.ndim >= 3 and value.shape[:2] == outputs.shape[:2] else 0, reduction
            )
        if tuple(getattr(value, "shape", ())) != (batch,):
            raise UsageError(
                f"the loss returned shape {tuple(getattr(value, 'shape', ()))}; a likelihood ratio needs one value a "
                f"sample, [{batch}] (use reduction='none' and sum over everything but the batch)"
            )
        return value

    return per_sample


def each_sample(values: Tensor, batch: int, reduction: str) -> Tensor:
    """Mean or sum over all dimensions but the batch, [B]."""
    values = values.movedim(batch, 0).flatten(1)
    return values.mean(1) if reduction == "mean" else values.sum(1)


def check_labels(targets: Tensor, classes: int) -> None:
    """Raises UsageError unless targets are class indices below `classes`."""
    if targets.is_floating_point() or targets.ndim != 1:
        raise UsageError(
            f"targets are {targets.dtype} of shape {tuple(targets.shape)}; a cross-entropy takes class indices [B]"
        )
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= classes:
        raise UsageError(
            f"labels go from {low} to {high}, but the model has {classes} outputs; use labels 0..{classes - 1}"
        )
