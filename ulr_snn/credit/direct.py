"""Direct credit: ∂L/∂spikes where spikes reach the loss through differentiable operations only.

Ordinary autograd over the last differentiable piece of the model; every spike is a leaf, so no path can pass
through one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def direct_credit(outputs: Tensor, error: Tensor, spikes: Sequence[Tensor]) -> list[Tensor | None]:
    """a = (∂outputs/∂spikes)^T error for each leaf of spikes [T, B, ...]; None where the outputs do not reach it."""
    if not outputs.requires_grad:
        return [None] * len(spikes)
    return list(torch.autograd.grad(outputs, spikes, error, retain_graph=True, allow_unused=True))


def direct_effect(outputs: Tensor, spikes: Sequence[Tensor], innovations: Sequence[Tensor]) -> Tensor:
    """(∂outputs/∂spikes) innovations, in the shape of the outputs: what the innovations did to the outputs directly.

    A Jacobian-vector product as the derivative of a vector-Jacobian product with respect to its vector.
    """
    if not outputs.requires_grad:
        return torch.zeros_like(outputs)
    probe = torch.zeros_like(outputs, requires_grad=True)
    products = torch.autograd.grad(outputs, spikes, probe, create_graph=True, allow_unused=True)
    reached = [(p, e) for p, e in zip(products, innovations, strict=True) if p is not None and p.requires_grad]
    if not reached:
        return torch.zeros_like(outputs)
    effect = torch.autograd.grad([p for p, _ in reached], probe, [e for _, e in reached], retain_graph=True)
    return effect[0]
