"""Training objectives: per-sample losses, costs of activity, and mixes of them.

A loss is a function (outputs, targets, mask) -> [B]. Its name is that of snntorch.functional if the loss exists there.

outputs: [T, B, C] over time (spikes, currents or membranes), or [B, C] if the model reduces them over time. targets:
class indices [B], or [T, B] for ce_rate, for the cross-entropies (-100 leaves a sample or a step out), or class
probabilities [B, C]; values [B, C] or [T, B, C] for mse. mask: [T, B, 1], 0 on padding, or None.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import Flag, Positive, check_fields, number
from ulr_snn.losses.brought import Brought, checked, name_of
from ulr_snn.model.targets import Targets, left_out
from ulr_snn.model.view import View

WEIGHT = number("a finite number", lambda value: True)
Loss = Callable[[Any, Any], Tensor]


def total(outputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the outputs summed over time, [B, C], and outputs without a time axis unchanged."""
    if outputs.ndim < 3:
        return outputs
    return (outputs if mask is None else outputs * mask).sum(0)


def ce_count(outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the cross-entropy of the outputs summed over time (snntorch.functional.ce_count_loss)."""
    if each_step(outputs, targets):
        raise UsageError("ce_count got a target for each time step; use 'ce_rate', which has a loss at each step")
    return F.cross_entropy(total(outputs, mask), classes(targets), reduction="none")


def each_step(outputs: Tensor, targets: Tensor) -> bool:
    """Returns whether each time step has class indices, or class probabilities, of its own."""
    over_time = outputs.ndim >= 3 and targets.shape[:2] == outputs.shape[:2]
    return over_time and targets.ndim == 2 + targets.is_floating_point()


def classes(targets: Tensor) -> Tensor:
    """Returns class indices as int64, and class probabilities as they are."""
    return targets if targets.is_floating_point() else targets.long()


def ce_rate(outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the cross-entropy of each time step's outputs, averaged over time (snntorch.functional.ce_rate_loss)."""
    if outputs.ndim < 3:
        return ce_count(outputs, targets)
    return ce_rate_steps(outputs, targets, mask).sum(0)


def ce_rate_steps(outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the contribution of each time step to `ce_rate`, [T, B]. Steps without a label do not count."""
    rows = outputs.shape[:2]
    if not each_step(outputs, targets):
        targets = targets.expand(len(outputs), *targets.shape)
    elif not targets.is_floating_point():
        labelled = (~left_out(targets)).to(outputs.dtype)[..., None]
        mask = labelled if mask is None else labelled * mask.reshape(*rows, 1)
    steps = F.cross_entropy(outputs.flatten(0, 1), classes(targets.flatten(0, 1)), reduction="none")
    return of_mean(steps.view(rows), mask)


def mse(outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the squared error, summed over features and averaged over time. Targets have the shape of the outputs, or
    of one time step (the same target at every step). Raises UsageError for any other shape."""
    targets = values_like(outputs, targets)
    if outputs.ndim < 3:
        return ((outputs - targets) ** 2).flatten(1).sum(1)
    return mse_steps(outputs, targets, mask).sum(0)


def values_like(outputs: Tensor, targets: Tensor) -> Tensor:
    """Returns targets that broadcast against the outputs. A single feature needs no axis of its own. Raises UsageError
    for targets of another shape."""
    shape = outputs.shape if outputs.ndim < 3 else outputs.shape[1:]
    targets = targets.to(outputs.dtype) if targets.dtype == torch.bool else targets
    if targets.shape in (outputs.shape, shape):
        return targets
    if outputs.shape[-1] == 1 and targets.shape in (outputs.shape[:-1], shape[:-1]):
        return targets[..., None]
    if outputs.ndim == 2 and targets.ndim > 2 and targets.flatten(1).shape == outputs.shape:
        return targets.flatten(1)  # outputs of an image's shape are flat here
    raise UsageError(
        f"mse got targets of shape {tuple(targets.shape)} for outputs of shape {tuple(outputs.shape)}; "
        f"give targets {list(shape)}"
    )


def mse_steps(outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the contribution of each time step to `mse`, [T, B]."""
    return of_mean(((outputs - values_like(outputs, targets)) ** 2).flatten(2).sum(2), mask)


def of_mean(steps: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the contribution of each value [T, B] to the mean over a sample's own time steps."""
    if mask is None:
        return steps / len(steps)
    mask = mask.reshape(steps.shape)
    return steps * mask / mask.sum(0).clamp(min=1)


def zero_one(outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns 0 if the outputs summed over time are largest for the target, otherwise 1."""
    totals = total(outputs, mask)
    return ((totals.argmax(1) != targets) & ~left_out(targets)).to(totals.dtype)


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
    right = any_spike.any(0) & decision[rows, targets.long().clamp(min=0)] & (decision.sum(1) == 1)
    losses = torch.where(right, first.to(outputs.dtype) / steps, 1.0)
    return torch.where(left_out(targets), 0.0, losses).to(outputs.dtype)


def negative_return(outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns minus the sum of the outputs over time and features, [B]: outputs are rewards, and targets are ignored.
    The loss has no gradient in the outputs, even if the simulator that gives the rewards is differentiable."""
    return negative_return_steps(outputs, targets, mask).sum(0)


def negative_return_steps(outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the contribution of each time step to `negative_return`, [T, B]. Raises UsageError for outputs without a
    time axis."""
    if outputs.ndim < 3:
        raise UsageError("negative_return got outputs without a time axis; give it rewards [T, B, 1]")
    rewards = outputs.detach() if mask is None else outputs.detach() * mask
    return -rewards.flatten(2).sum(2)


def over_labelled(losses: Tensor, targets: Targets) -> Tensor:
    """Returns losses [..., B], zero without a label, whose mean over the batch is that over its labelled samples."""
    share = targets.labelled()
    if share is None:
        return losses
    return losses / share.clamp(min=1e-9).to(losses)


@dataclass(frozen=True)
class NamedLoss:
    """A loss (outputs, targets, mask) -> [B] with its properties, for use by name or as `loss=NamedLoss(...)`. Its mean
    is that over the samples that have a label: `value` and `steps` are zero for the others.

    steps: function for the contribution of each time step, [T, B], if the loss is a sum over time. labels: whether
    targets are class indices. soft: whether they may be class probabilities instead. of_totals: whether the loss
    depends only on the outputs' sum over time.
    """

    value: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    steps: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None
    labels: bool = True
    soft: bool = False
    of_totals: bool = False

    def __call__(self, outputs: Tensor, targets: Tensor | Targets, mask: Tensor | None = None) -> Tensor:
        targets = Targets.alone(targets, outputs)
        if not self.labels:
            return checked(self.value(outputs, targets.tensor, mask), outputs)
        check_labels(targets.tensor, outputs, self.soft)
        return over_labelled(checked(self.value(outputs, targets.tensor, mask), outputs), targets)

    def in_time(self, outputs: Tensor, targets: Tensor | Targets, mask: Tensor | None = None) -> Tensor:
        """Returns the contribution of each time step, [T, B], if the loss is a sum over time."""
        assert self.steps is not None
        targets = Targets.alone(targets, outputs)
        steps = self.steps(outputs, targets.tensor, mask)
        return over_labelled(steps, targets) if self.labels else steps

    def seen_by(self, view: View) -> "NamedLoss":
        """Returns the loss for a model whose outputs have this form."""
        if len(view.slots) > 1:
            raise UsageError("a loss with a name reads one output, but output= chose several; give a loss of your own")
        return self


LOSSES = {
    "ce_count": NamedLoss(ce_count, soft=True),
    "ce_rate": NamedLoss(ce_rate, ce_rate_steps, soft=True),
    "mse": NamedLoss(mse, mse_steps, labels=False),
    "zero_one": NamedLoss(zero_one, of_totals=True),
    "latency": NamedLoss(latency),
    "negative_return": NamedLoss(negative_return, negative_return_steps, labels=False),
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

    limit: Positive
    operations: Flag = False

    def __post_init__(self) -> None:
        check_fields(self)

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

    losses: list[tuple[float, "NamedLoss | Brought"]]
    costs: list[tuple[float, SpikeBudget]]
    of_totals: frozenset[int]
    steps: Sequence[tuple[float, Callable[[Tensor, Tensor | Targets, Tensor | None], Tensor]]] | None
    own: Mapping[int, str]

    def seen_by(self, view: View) -> "Objective":
        """Returns the objective for a model whose outputs have this form."""
        return replace(self, losses=[(weight, loss.seen_by(view)) for weight, loss in self.losses])

    @property
    def brought(self) -> list[Brought]:
        """The losses that are not named."""
        return [loss for _, loss in self.losses if isinstance(loss, Brought)]

    @property
    def needs_labels(self) -> bool:
        """True if a loss takes class indices."""
        return any(isinstance(loss, NamedLoss) and loss.labels for _, loss in self.losses)

    @property
    def of_labelled(self) -> bool:
        """True if the objective's mean is that over samples that have a label."""
        return not self.costs and all(isinstance(loss, NamedLoss) and loss.labels for _, loss in self.losses)

    @property
    def counts(self) -> set[str]:
        """The keys of the activity that the costs need: "spikes", "operations"."""
        return {cost.counts for _, cost in self.costs}

    def __call__(
        self,
        outputs: Tensor,
        targets: Tensor | Targets,
        mask: Tensor | None = None,
        activity: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Returns the weighted sum, [B]."""
        parts = [weight * loss(outputs, targets, mask) for weight, loss in self.losses]
        parts += [weight * cost(activity or {}) for weight, cost in self.costs]
        return sum(parts[1:], parts[0])


LossSpec = str | Loss | NamedLoss | Mapping[str | Loss | NamedLoss | SpikeBudget, float]


def resolve(loss: LossSpec) -> Objective:
    """Returns the objective for one loss, or for a mix {loss: weight}. Raises UsageError for an unknown name."""
    parts = list(loss.items()) if isinstance(loss, Mapping) else [(loss, 1.0)]
    for _, weight in parts:
        try:
            WEIGHT.read(weight)
        except ValueError:
            raise UsageError(f"a mix of losses got the weight {weight!r}; it must be {WEIGHT.words}") from None
    losses = [(weight, loss_of(part)) for part, weight in parts if not isinstance(part, SpikeBudget)]
    costs = [(weight, part) for part, weight in parts if isinstance(part, SpikeBudget)]
    if not losses:
        raise UsageError("the loss has nothing that depends on the outputs; mix the budget with a loss, as 'ce_count'")
    names = [part for part, _ in parts if not isinstance(part, SpikeBudget)]
    named = [LOSSES[name] if isinstance(name, str) else name for name in names]
    of_totals = frozenset(i for i, loss in enumerate(named) if isinstance(loss, NamedLoss) and loss.of_totals)
    pairs = zip(losses, named, strict=True)
    sums = [(weight, loss.in_time) for (weight, _), loss in pairs if isinstance(loss, NamedLoss) and loss.steps]
    steps = sums if len(sums) == len(named) and not costs else None
    own = {
        i: name_of(f.value if isinstance(f, NamedLoss) else f) for i, f in enumerate(names) if not isinstance(f, str)
    }
    return Objective(losses, costs, of_totals, steps, own)


def loss_of(loss: str | Loss | NamedLoss) -> NamedLoss | Brought:
    """Returns the loss as a function (outputs, targets, mask) -> [B]. Raises UsageError for an unknown name."""
    if isinstance(loss, NamedLoss):
        return loss
    if not isinstance(loss, str):
        return Brought.of(loss)
    if loss not in LOSSES:
        raise UsageError(f"loss={loss!r} is not known; use {', '.join(LOSSES)} or a callable (outputs, targets) -> [B]")
    return LOSSES[loss]


def check_labels(targets: Tensor, outputs: Tensor, soft: bool) -> None:
    """Raises UsageError unless targets are class indices from 0 to the number of outputs less 1, or -100, or class
    probabilities where the loss takes these (soft)."""
    number = outputs.shape[-1]
    axes = 2 if each_step(outputs, targets) else 1
    if targets.is_floating_point() or targets.is_complex():
        if soft and targets.ndim == axes + 1 and targets.shape[-1] == number:
            return
        axes = -1
    if targets.ndim != axes:
        advice = ""
        if targets.ndim == 2 and not targets.is_floating_point():
            advice = ", as targets.argmax(1)" if targets.shape[1] == number else ", as targets.squeeze(1)"
        raise UsageError(
            f"targets are {targets.dtype} of shape {tuple(targets.shape)}; a cross-entropy takes class indices "
            f"[B]{advice}"
        )
    known = targets[~left_out(targets)]
    low, high = (int(known.min()), int(known.max())) if known.numel() else (0, 0)
    if low < 0 or high >= number:
        raise UsageError(
            f"labels go from {low} to {high}, but the model has {number} outputs; use labels 0..{number - 1}"
        )
