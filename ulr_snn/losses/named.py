"""Training objectives: per-sample losses, costs of activity, and mixes of them.

A loss is a function (outputs, targets, mask) -> [B]. Its name is that of snntorch.functional if the loss exists there.

outputs: [T, B, C] over time (spikes, currents or membranes), or [B, C] if the model reduces them over time.
targets: class indices [B] (int64) for the cross-entropies, [B, C] for mse. mask: [T, B, 1], 0 on padding, or None.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulr_snn.errors import UsageError

Loss = Callable[[Tensor, Tensor], Tensor]


def total(outputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the outputs summed over time, [B, C], and outputs without a time axis unchanged."""
    if outputs.ndim < 3:
        return outputs
    return (outputs if mask is None else outputs * mask).sum(0)


def ce_count(outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the cross-entropy of the outputs summed over time (snntorch.functional.ce_count_loss)."""
    return F.cross_entropy(total(outputs, mask), targets.long(), reduction="none")


def ce_rate(outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the cross-entropy of each time step's outputs, averaged over time (snntorch.functional.ce_rate_loss)."""
    if outputs.ndim < 3:
        return ce_count(outputs, targets)
    return ce_rate_steps(outputs, targets, mask).sum(0)


def ce_rate_steps(outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the contribution of each time step to `ce_rate`, [T, B]."""
    steps = F.cross_entropy(outputs.flatten(0, 1), targets.long().repeat(len(outputs)), reduction="none")
    return of_mean(steps.view(outputs.shape[:2]), mask)


def mse(outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the squared error, summed over features and averaged over time. Targets have the shape of the outputs, or
    of one time step (the same target at every step). Raises UsageError for any other shape."""
    shape = outputs.shape if outputs.ndim < 3 else outputs.shape[1:]
    if targets.shape not in (outputs.shape, shape):
        raise UsageError(
            f"mse got targets of shape {tuple(targets.shape)} for outputs of shape {tuple(outputs.shape)}; "
            f"give targets {list(shape)}"
        )
    if outputs.ndim < 3:
        return ((outputs - targets) ** 2).flatten(1).sum(1)
    return mse_steps(outputs, targets, mask).sum(0)


def mse_steps(outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the contribution of each time step to `mse`, [T, B]."""
    return of_mean(((outputs - targets) ** 2).flatten(2).sum(2), mask)


def of_mean(steps: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the contribution of each value [T, B] to the mean over a sample's own time steps."""
    if mask is None:
        return steps / len(steps)
    mask = mask.view(steps.shape)
    return steps * mask / mask.sum(0)


def zero_one(outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns 0 if the outputs summed over time are largest for the target, otherwise 1."""
    totals = total(outputs, mask)
    return (totals.argmax(1) != targets).to(totals.dtype)


def latency(outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns t / T if the first spike of the outputs, at step t = 0 .. T-1, is the target's alone, otherwise 1 (also
    if there is no spike). Outputs above 0 are spikes; T is the number of the sample's steps."""
    if outputs.ndim < 3:
        raise UsageError("latency got outputs without a time axis; give it the output spikes [T, B, C]")
    spikes = (outputs > 0) if mask is None else (outputs * mask > 0)
    steps = len(outputs) if mask is None else mask.flatten(1).sum(0)
    any_spike = spikes.any(2)  # [T, B]
    first = any_spike.to(torch.uint8).argmax(0)  # argmax returns the first of equal values
    rows = torch.arange(len(first), device=outputs.device)
    decision = spikes[first, rows]  # [B, C]
    right = any_spike.any(0) & decision[rows, targets.long()] & (decision.sum(1) == 1)
    return torch.where(right, first.to(outputs.dtype) / steps, 1.0).to(outputs.dtype)


@dataclass(frozen=True)
class NamedLoss:
    """A loss (outputs, targets, mask) -> [B] for use by name.

    steps: function for the contribution of each time step, [T, B], if the loss is a sum over time. labels: whether
    targets are class indices. of_totals: whether the loss depends only on the outputs' sum over time.
    """

    value: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    steps: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None
    labels: bool = True
    of_totals: bool = False

    def __call__(self, outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.labels:
            check_labels(targets, outputs.shape[-1])
        return self.value(outputs, targets, mask)


LOSSES = {
    "ce_count": NamedLoss(ce_count),
    "ce_rate": NamedLoss(ce_rate, ce_rate_steps),
    "mse": NamedLoss(mse, mse_steps, labels=False),
    "zero_one": NamedLoss(zero_one, of_totals=True),
    "latency": NamedLoss(latency),
}


def register(name: str, loss: NamedLoss) -> None:
    """Adds a loss to the names that `loss=` takes. It replaces a loss that has this name."""
    if not isinstance(loss, NamedLoss):
        raise UsageError(f"losses.register got {loss!r} for {name!r}; give a NamedLoss")
    LOSSES[name] = loss


@dataclass(frozen=True)
class SpikeBudget:
    """A cost max(0, n / limit - 1) of a sample's activity n, for a mix like `{"ce_count": 1, SpikeBudget(500): 0.1}`.

    n is the number of spikes of all layers over all time steps. With operations=True it is the number of synaptic
    operations: non-zero inputs times their connections, for all linear and convolutional modules. For inputs other than
    0 and 1, the sum of the inputs replaces their number.
    """

    limit: float
    operations: bool = False

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise UsageError(f"SpikeBudget got limit={self.limit}; it must be positive")

    @property
    def counts(self) -> str:
        """The key of the activity that the cost needs."""
        return "operations" if self.operations else "spikes"

    def __call__(self, activity: Mapping[str, Tensor]) -> Tensor:
        """Returns the cost [B] of spikes [B] or operations [B]."""
        return F.relu(activity[self.counts] / self.limit - 1)


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses (outputs, targets, mask) -> [B] and of costs of activity.

    of_totals: indices of the losses known to depend only on the outputs' sum over time. steps: like `losses`, functions
    for the contribution of each time step; None unless all losses are known to be sums over time. own: names of the
    user's callables among the losses, by index.
    """

    losses: list[tuple[float, Callable[[Tensor, Tensor, Tensor | None], Tensor]]]
    costs: list[tuple[float, SpikeBudget]]
    of_totals: frozenset[int]
    steps: list[tuple[float, Callable[[Tensor, Tensor, Tensor | None], Tensor]]] | None
    own: Mapping[int, str]

    @property
    def counts(self) -> set[str]:
        """The keys of the activity that the costs need: "spikes", "operations"."""
        return {cost.counts for _, cost in self.costs}

    def __call__(
        self,
        outputs: Tensor,
        targets: Tensor,
        mask: Tensor | None = None,
        activity: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Returns the weighted sum, [B]."""
        parts = [weight * loss(outputs, targets, mask) for weight, loss in self.losses]
        parts += [weight * cost(activity or {}) for weight, cost in self.costs]
        return sum(parts[1:], parts[0])


LossSpec = str | Loss | Mapping[str | Loss | SpikeBudget, float]


def resolve(loss: LossSpec) -> Objective:
    """Returns the objective for one loss, or for a mix {loss: weight}. Raises UsageError for an unknown name."""
    parts = list(loss.items()) if isinstance(loss, Mapping) else [(loss, 1.0)]
    for _, weight in parts:
        if not isinstance(weight, Real):
            raise UsageError(f"a mix of losses got the weight {weight!r}; give {{loss: weight}} with numbers")
    losses = [(weight, per_sample(part)) for part, weight in parts if not isinstance(part, SpikeBudget)]
    costs = [(weight, part) for part, weight in parts if isinstance(part, SpikeBudget)]
    if not losses:
        raise UsageError("the loss has nothing that depends on the outputs; mix the budget with a loss, as 'ce_count'")
    names = [part for part, _ in parts if not isinstance(part, SpikeBudget)]
    named = [LOSSES[name] if isinstance(name, str) else None for name in names]
    of_totals = frozenset(i for i, loss in enumerate(named) if loss is not None and loss.of_totals)
    sums = [(weight, loss.steps) for (weight, _), loss in zip(losses, named, strict=True) if loss and loss.steps]
    steps = sums if len(sums) == len(named) and not costs else None
    own = {i: getattr(f, "__name__", type(f).__name__) for i, f in enumerate(names) if not isinstance(f, str)}
    return Objective(losses, costs, of_totals, steps, own)


def per_sample(loss: str | Loss) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Returns the loss as a function (outputs, targets, mask) -> [B]. A user's callable sees zeros on padding.

    If a loss object has a `reduction` (torch's, snnTorch's), the reduction runs over all dimensions but the batch.
    Raises UsageError for an unknown name, labels out of range, or a result that is not one value a sample.
    """
    if isinstance(loss, str) and loss not in LOSSES:
        raise UsageError(f"loss={loss!r} is not known; use {', '.join(LOSSES)} or a callable (outputs, targets) -> [B]")

    own: Any = loss
    reduction = getattr(loss, "reduction", "none")
    if reduction in ("mean", "sum"):
        own = copy.copy(loss)
        own.reduction = "none"

    def one_a_sample(outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        if isinstance(loss, str):
            value = LOSSES[loss](outputs, targets, mask)
        else:
            value = answer(own, outputs if mask is None or outputs.ndim < 3 else outputs * mask, targets)
        batch = outputs.shape[1] if outputs.ndim >= 3 else outputs.shape[0]
        if own is not loss and isinstance(value, Tensor) and value.ndim > 1:
            over_time = outputs.ndim >= 3 and value.shape[:2] == outputs.shape[:2]
            value = each_sample(value, 1 if over_time else 0, reduction)
        if isinstance(value, list | tuple | numpy.ndarray):  # the function does not use torch
            value = torch.as_tensor(value)
        if tuple(getattr(value, "shape", ())) != (batch,):
            raise UsageError(
                f"the loss returned shape {tuple(getattr(value, 'shape', ()))}; a likelihood ratio needs one value a "
                f"sample, [{batch}] (use reduction='none' and sum over everything but the batch)"
            )
        return value.to(outputs.device, outputs.dtype)

    return one_a_sample


def answer(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Calls the loss. Raises UsageError if a cross-entropy of torch refuses outputs over time."""
    try:
        return loss(outputs, targets)
    except (RuntimeError, ValueError) as error:
        if type(loss) not in (nn.CrossEntropyLoss, nn.NLLLoss) or outputs.ndim < 3 or targets.ndim != 1:
            raise
        raise UsageError(
            f"{type(loss).__name__} got outputs over time, {tuple(outputs.shape)}, and targets {tuple(targets.shape)}; "
            "use loss='ce_rate' or 'ce_count', or TimeAverage() before the last layer"
        ) from error


def each_sample(values: Tensor, batch: int, reduction: str) -> Tensor:
    """Returns the mean or sum over all dimensions but the batch, [B]."""
    values = values.movedim(batch, 0).flatten(1)
    return values.mean(1) if reduction == "mean" else values.sum(1)


def check_labels(targets: Tensor, classes: int) -> None:
    """Raises UsageError unless targets are class indices from 0 to classes - 1."""
    if targets.is_floating_point() or targets.ndim != 1:
        raise UsageError(
            f"targets are {targets.dtype} of shape {tuple(targets.shape)}; a cross-entropy takes class indices [B]"
        )
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= classes:
        raise UsageError(
            f"labels go from {low} to {high}, but the model has {classes} outputs; use labels 0..{classes - 1}"
        )
