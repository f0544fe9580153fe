"""The evaluation of an objective on the outputs of a pass: its value and its gradient in the outputs.

A loss that has no derivative gets one by noise on the outputs, o + σ z (arXiv 2305.08960, noise on logits):

    ∂E[L(o + σ z)]/∂o = E[(L(o + σ z) - L(o - σ z)) z] / 2σ

The mean over pairs of draws is an unbiased estimate of this gradient of the smoothed loss E[L(o + σ z)].

Where the outputs are spikes s, the effect of each is the loss with it less the loss without it,

    L(s with s_i = 1) - L(s with s_i = 0)

The derivative of E[L] in the firing probability of spike i, at fixed other spikes, is the mean of this difference.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from ulr_snn.errors import UsageError
from ulr_snn.kernels import ranks
from ulr_snn.kernels.precision import full_precision, widened
from ulr_snn.losses.named import Objective, total
from ulr_snn.model.graph import leaves, variables
from ulr_snn.model.targets import Targets
from ulr_snn.noise.kinds import OutputNoise
from ulr_snn.noise.random import Noise

SITE = 1 << 40  # index of the output noise, beyond the indices of the firing sites
ELEMENTS = 1 << 22  # most elements of disturbed outputs in memory at once


@dataclass(frozen=True)
class LossTreatment:
    """Which losses of an objective, by index, are smoothed by output noise, which see every output spike flipped, and
    which have no gradient."""

    smoothed: Mapping[int, OutputNoise] = field(default_factory=dict)
    flipped: frozenset[int] = frozenset()
    gradientless: frozenset[int] = frozenset()
    in_time: bool = False  # whether to evaluate the contribution of each time step


@dataclass(frozen=True)
class LossEvaluation:
    """The losses and costs of a pass, and their gradients."""

    values: list[Tensor]  # each loss, weighted [rows]
    errors: list[Tensor | None]  # each loss's gradient in the shape of the outputs; None if it has none
    costs: list[tuple[Tensor, Tensor, Tensor]]  # activity [rows], the cost's gradient [rows], and the cost [rows]
    treatment: LossTreatment
    weights: tuple[float, ...]  # weights of the losses
    steps: Tensor | None  # contribution of each time step to the loss [T, rows], for `in_time`
    reading: tuple[Tensor, ...] = ()  # losses [rows] that depend on tensors besides the outputs, in their graph
    others: tuple[Tensor, ...] = ()  # those of them that depend on parameters, weighted
    divided: Targets | None = None  # the targets, if the losses are divided by the share of samples with a label

    @cached_property
    def loss(self) -> Tensor:
        """Sum of all losses and costs, [rows]."""
        return added(self.values + [value for _, _, value in self.costs])

    @cached_property
    def error(self) -> Tensor | None:
        """∂loss/∂outputs in the shape of the outputs; None if no loss has a gradient."""
        used = [e for i, e in enumerate(self.errors) if e is not None and i not in self.treatment.gradientless]
        return added(used) if used else None

    @cached_property
    def gradientless_loss(self) -> Tensor:
        """Sum of the losses without a gradient, [rows]."""
        return added([torch.zeros_like(self.values[0])] + [self.values[i] for i in sorted(self.treatment.gradientless)])

    @property
    def share(self) -> Tensor | float:
        """The share of samples with a label, by which the losses are divided; 1 if they are not."""
        found = None if self.divided is None else self.divided.labelled()
        return 1.0 if found is None else found.to(self.loss)

    def brought(self, model: nn.Module) -> list[Tensor]:
        """Returns the parameters that the losses bring themselves, such as prototypes of classes."""
        own = {id(q) for q in model.parameters()} if self.others else set()
        found: list[Tensor] = [q for q in parameters_of(self.others) if id(q) not in own]
        if found and ranks.count() > 1:
            raise UsageError(
                "the loss has parameters of its own, which the ranks do not share; make the loss a module of the model"
            )
        return found

    def without_gradient(self, flat: bool) -> frozenset[int]:
        """Returns the indices of losses without a gradient. flat: a gradient that is zero everywhere counts as none."""
        found = ranks.everywhere(*(e is None or (flat and not bool(e.any())) for e in self.errors))
        return frozenset(i for i, none in enumerate(found) if none)


def added(tensors: list[Tensor]) -> Tensor:
    """Returns the sum of at least one tensor."""
    return sum(tensors[1:], tensors[0])


@full_precision()
def evaluate_losses(
    objective: Objective,
    treatment: LossTreatment,
    outputs: Tensor,
    activity: Mapping[str, Tensor],
    targets: Targets,
    mask: Tensor | None,
    noise: Noise | None,
) -> LossEvaluation:
    """Evaluates the objective on outputs [T, rows, ...] or [rows, C], at least in single precision, and on the activity
    of the pass. noise: random numbers for the smoothed losses; None if no loss is smoothed."""
    outputs = widened(outputs.detach())
    errors: list[Tensor | None] = []
    values: list[Tensor] = []
    reading: list[Tensor] = []
    others: list[Tensor] = []
    error: Tensor | None
    for i, (weight, loss) in enumerate(objective.losses):
        if noise is not None and i in treatment.smoothed:
            of_totals = i in objective.of_totals
            value, error = smoothed(loss, outputs, targets, mask, treatment.smoothed[i], noise, SITE + i, of_totals)
        elif i in treatment.flipped:
            value, error = by_flips(loss, outputs, targets, mask)
        else:
            value, error, graph = with_gradient(loss, outputs, targets, mask, i not in treatment.gradientless)
            if graph is not None:
                reading.append(graph)
                others += [weight * graph] if parameters_of([graph]) else []
        values.append(weight * value)
        errors.append(None if error is None else weight * error)
    costs = []
    for weight, cost in objective.costs:
        if cost.counts not in activity:
            raise UsageError(
                f"{cost} has nothing to count: no spiking layer, or no linear or convolutional module, ran"
            )
        counted = activity[cost.counts].detach().requires_grad_()
        with torch.enable_grad():
            value = weight * cost({cost.counts: counted})
        (gradient,) = torch.autograd.grad(value, counted, torch.ones_like(value))
        costs.append((activity[cost.counts], gradient, value.detach()))
    steps = in_time(objective, outputs, targets, mask) if treatment.in_time else None
    weights = tuple(weight for weight, _ in objective.losses)
    divided = targets if objective.of_labelled else None
    return LossEvaluation(values, errors, costs, treatment, weights, steps, tuple(reading), tuple(others), divided)


def in_time(objective: Objective, outputs: Tensor, targets: Targets, mask: Tensor | None) -> Tensor:
    """Returns the contribution of each time step to the objective, [T, rows]."""
    if objective.steps is None or outputs.ndim < 3:
        raise UsageError(
            "reward_to_go needs a loss that is a sum over time steps of outputs [T, B, ...]: 'ce_rate', 'mse', "
            "'negative_return', or a NamedLoss with `steps`"
        )
    return added([weight * steps(outputs, targets, mask) for weight, steps in objective.steps])


def parameters_of(losses: Iterable[Tensor]) -> list[nn.Parameter]:
    """Returns the parameters that losses depend on besides the outputs."""
    return [q for q in variables(losses).values() if isinstance(q, nn.Parameter)]


def with_gradient(
    loss: Callable[[Tensor, Targets, Tensor | None], Tensor],
    outputs: Tensor,
    targets: Targets,
    mask: Tensor | None,
    asked: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the loss [rows], its gradient in the shape of the outputs, or None if it has none or is not `asked` for
    it, and the loss in the graph of tensors besides the outputs, or None if it depends on none."""
    leaf = outputs.detach().requires_grad_(asked)
    try:
        with torch.enable_grad():
            value = loss(leaf, targets, mask)
    except RuntimeError as error:
        if "requires grad" not in str(error):  # torch refuses to convert a tensor that requires grad to NumPy
            raise
        value = loss(outputs, targets, mask)
    if not value.requires_grad:
        return value, None, None
    graph = value if leaves([value]) - {id(leaf)} else None
    if not asked:
        return value.detach(), None, graph
    found = torch.autograd.grad(value, leaf, torch.ones_like(value), retain_graph=graph is not None, allow_unused=True)
    return value.detach(), found[0], graph


@torch.no_grad()
def smoothed(
    loss: Callable[[Tensor, Targets, Tensor | None], Tensor],
    outputs: Tensor,
    targets: Targets,
    mask: Tensor | None,
    site: OutputNoise,
    noise: Noise,
    index: int,
    of_totals: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the smoothed loss [rows], and its gradient in the shape of the outputs. Each time step has its own noise.
    With of_totals all share one: for a loss of the outputs' sum this has the same mean and a lower variance."""
    axis = 1 if outputs.ndim >= 3 else 0  # axis of the rows
    steps = len(outputs) if axis else 1
    rows = outputs.shape[axis]
    own = steps if mask is None else mask.sum(0, keepdim=True)  # number of steps of each row, without padding
    spread = site.relative * ranks.std(total(outputs, mask), 1).nan_to_num().item() or 1.0
    scale = site.scale or spread / steps**0.5  # scale of each step's noise
    unit = scale * (steps**0.5 / own if axis and of_totals else 1)  # factor of z
    value, error = outputs.new_zeros(rows), torch.zeros_like(outputs)
    pairs = site.draws // 2
    together = max(1, min(pairs, ELEMENTS // max(1, 2 * outputs.numel())))
    for first in range(0, pairs, together):
        count = min(together, pairs - first)
        drawn = [
            noise.normal(index + (pair << 8), 0, 1 if of_totals else steps, outputs.shape[axis + 1 :], outputs.dtype)
            for pair in range(first, first + count)
        ]
        z = torch.stack([d if axis else d[0] for d in drawn], axis)  # [T or 1, count, rows, ...]
        moved = z * (unit.unsqueeze(axis) if isinstance(unit, Tensor) else unit)
        disturbed = torch.cat([moved, -moved], axis) + outputs.unsqueeze(axis)
        repeats = 2 * count
        found = loss(
            disturbed.flatten(axis, axis + 1),
            targets.repeated(repeats),
            None if mask is None else mask.repeat(1, repeats, *[1] * (mask.ndim - 2)),
        ).view(2, count, rows)
        value += found.sum((0, 1))
        weight = (found[0] - found[1]).view(*[1] * axis, count, rows, *[1] * (outputs.ndim - axis - 1))
        error += (weight * z).sum(axis)
    size = scale * (steps**0.5 if axis and of_totals else 1)  # scale of the noise of the sum, or of a step
    return value / site.draws, error / (site.draws * size) * (1 if mask is None else mask)


@torch.no_grad()
def by_flips(
    loss: Callable[[Tensor, Targets, Tensor | None], Tensor], outputs: Tensor, targets: Targets, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the loss [rows] of output spikes [T, rows, C], and the effect of each spike on it in their shape."""
    steps, rows, features = outputs.shape
    value = loss(outputs, targets, mask)
    error = torch.empty_like(outputs)
    places = torch.cartesian_prod(torch.arange(steps), torch.arange(features)).to(outputs.device)
    for some in places.split(max(1, ELEMENTS // outputs.numel())):
        count, (times, neurons) = len(some), some.T
        flipped = outputs.repeat_interleave(count, 1).view(steps, rows, count, features)
        which = torch.arange(count, device=outputs.device)
        before = flipped[times, :, which, neurons]  # [count, rows]
        flipped[times, :, which, neurons] = 1 - before
        repeats = targets.moved(lambda leaf, count=count: leaf.tensor.repeat_interleave(count, leaf.axis))
        repeated = None if mask is None else mask.repeat_interleave(count, 1)
        found = loss(flipped.flatten(1, 2), repeats, repeated).view(rows, count).T
        error[times, :, neurons] = (found - value) * (1 - 2 * before)
    return value, error if mask is None else error * mask
