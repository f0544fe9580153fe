"""What an objective says about the outputs of a pass: its value, and its gradient, by a likelihood ratio where it has
none.

With noise on the outputs, o + σ z, a loss that has no derivative gets one (arXiv 2305.08960, noise on logits):

    ∂E[L(o + σ z)]/∂o = E[(L(o + σ z) - L(o - σ z)) z] / 2σ

as the mean over pairs of draws. It is that of the smoothed loss E[L(o + σ z)], exactly in the mean.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ulr_snn.losses import Objective, total
from ulr_snn.noise import Noise, OutputNoise

SITE = 1 << 40  # of the output noise, among the sites that draw
ELEMENTS = 1 << 22  # of disturbed outputs held at a time


@dataclass(frozen=True)
class Judging:
    """How the losses of an objective are taken, by index. smoothed: those with noise on the outputs; blind: those that
    stay without a gradient in the outputs."""

    smoothed: Mapping[int, OutputNoise] = field(default_factory=dict)
    blind: frozenset[int] = frozenset()


@dataclass
class Judgement:
    """loss [rows]; error: ∂loss/∂outputs in the shape of the outputs, None if there is none; blind [rows]: the losses
    that have no part in it; costs: activity [rows] of the pass's spikes, and the gradient of its cost [rows]; flat:
    losses without a gradient, or with one that is zero everywhere, without: those without one."""

    loss: Tensor
    error: Tensor | None
    blind: Tensor
    costs: list[tuple[Tensor, Tensor]]
    flat: frozenset[int]
    without: frozenset[int]


def judge(
    objective: Objective,
    judging: Judging,
    outputs: Tensor,
    activity: Mapping[str, Tensor],
    targets: Tensor,
    mask: Tensor | None,
    noise: Noise,
) -> Judgement:
    """The objective of outputs [T, rows, ...] or [rows, C], and of the activity of their spikes."""
    outputs = outputs.detach()
    errors: list[Tensor | None] = []
    values: list[Tensor] = []
    for i, (weight, loss) in enumerate(objective.losses):
        if i in judging.smoothed:
            value, error = smoothed(loss, outputs, targets, mask, judging.smoothed[i], noise, SITE + i)
        else:
            value, error = with_gradient(loss, outputs, targets, mask)
        values.append(weight * value)
        errors.append(None if error is None else weight * error)
    seen = [e for i, e in enumerate(errors) if e is not None and i not in judging.blind]
    blind = [v for i, v in enumerate(values) if i in judging.blind]
    costs = []
    for weight, cost in objective.costs:
        counted = activity[cost.counts].detach().requires_grad_()
        with torch.enable_grad():
            value = weight * cost({cost.counts: counted})
        costs.append((activity[cost.counts], torch.autograd.grad(value.sum(), counted)[0]))
        values.append(value.detach())
    return Judgement(
        sum(values[1:], values[0]),
        sum(seen[1:], seen[0]) if seen else None,
        sum(blind, torch.zeros_like(values[0])),
        costs,
        frozenset(i for i, e in enumerate(errors) if e is None or not e.any()),
        frozenset(i for i, e in enumerate(errors) if e is None),
    )


def with_gradient(
    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor], outputs: Tensor, targets: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The loss [rows], and its gradient in the shape of the outputs; None if it has none."""
    cut = outputs.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(cut, targets, mask)
    error = torch.autograd.grad(value.sum(), cut, allow_unused=True)[0] if value.requires_grad else None
    return value.detach(), error


@torch.no_grad()
def smoothed(
    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    outputs: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    site: OutputNoise,
    noise: Noise,
    index: int,
) -> tuple[Tensor, Tensor]:
    """The smoothed loss [rows], and its gradient in the shape of the outputs."""
    axis = 1 if outputs.ndim >= 3 else 0  # of the rows
    steps = len(outputs) if axis else 1
    rows = outputs.shape[axis]
    scale = site.scale or (site.relative * total(outputs, mask).std().nan_to_num().item() or 1.0) / steps**0.5
    value, error = outputs.new_zeros(rows), torch.zeros_like(outputs)
    pairs = site.draws // 2
    together = max(1, min(pairs, ELEMENTS // max(1, 2 * outputs.numel())))
    for first in range(0, pairs, together):
        count = min(together, pairs - first)
        drawn = [
            noise.normal(index + (pair << 8), 0, steps, outputs.shape[axis + 1 :], outputs.dtype)
            for pair in range(first, first + count)
        ]
        z = torch.stack([d if axis else d[0] for d in drawn], axis)  # [T, count, rows, ...]
        disturbed = torch.cat([z, -z], axis).mul_(scale) + outputs.unsqueeze(axis)
        repeats = 2 * count
        found = loss(
            disturbed.flatten(axis, axis + 1),
            targets.repeat(repeats, *[1] * (targets.ndim - 1)),
            None if mask is None else mask.repeat(1, repeats, *[1] * (mask.ndim - 2)),
        ).view(2, count, rows)
        value += found.sum((0, 1))
        weight = (found[0] - found[1]).view(*[1] * axis, count, rows, *[1] * (outputs.ndim - axis - 1))
        error += (weight * z).sum(axis)
    return value / site.draws, error / (site.draws * scale) * (1 if mask is None else mask)
