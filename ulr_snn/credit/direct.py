"""Direct credit: ∂L/∂spikes where spikes reach the loss through differentiable operations only.

Ordinary autograd over the last differentiable piece of the model; every spike is a leaf, so no path can pass
through one.
"""

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from ulr_snn.records import Record


def direct_credit(ends: Sequence[tuple[Tensor, Tensor]], records: Sequence[Record]) -> list[Tensor | None]:
    """a = sum over ends of (∂end/∂spikes)^T gradient of each record's spikes, [T, B, ...]; None where no end reaches
    them. ends: tensors, and the loss's gradient with respect to them."""
    ends = [(end, gradient) for end, gradient in ends if end.requires_grad]
    if not records or not ends:
        return [None] * len(records)
    leaves = [leaf for record in records for leaf in record.leaves]
    tensors, gradients = zip(*ends, strict=True)
    found = iter(torch.autograd.grad(tensors, leaves, gradients, retain_graph=True, allow_unused=True))
    return [whole(list(islice(found, len(record.leaves))), record) for record in records]


def whole(parts: list[Tensor | None], record: Record) -> Tensor | None:
    """[T, B, ...] of what belongs to each leaf of a record's spikes, zero where it is None; None where all are."""
    if all(part is None for part in parts):
        return None
    if record.whole:
        return parts[0]
    zero = torch.zeros_like(record.spikes[0])
    return torch.stack([zero if part is None else part for part in parts])


def direct_effect(outputs: Tensor, records: Sequence[Record], innovations: Sequence[Tensor]) -> Tensor:
    """(∂outputs/∂spikes) innovations, in the shape of the outputs: what the innovations did to the outputs directly.

    A Jacobian-vector product as the derivative of a vector-Jacobian product with respect to its vector.
    """
    if not outputs.requires_grad:
        return torch.zeros_like(outputs)
    probe = torch.zeros_like(outputs, requires_grad=True)
    leaves = [leaf for record in records for leaf in record.leaves]
    each = [e for r, es in zip(records, innovations, strict=True) for e in ([es] if r.whole else es)]
    products = torch.autograd.grad(outputs, leaves, probe, create_graph=True, allow_unused=True)
    reached = [(p, e) for p, e in zip(products, each, strict=True) if p is not None and p.requires_grad]
    if not reached:
        return torch.zeros_like(outputs)
    effect = torch.autograd.grad([p for p, _ in reached], probe, [e for _, e in reached], retain_graph=True)
    return effect[0]
