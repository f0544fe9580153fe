"""Exact maps: the vector-Jacobian product of the differentiable modules between spikes and what they reach.

A layer's spikes reach the loss, or the input currents of other layers, through differentiable modules. Autograd takes
the product over that one piece of the model, for all time steps at once. The spikes of every layer are leaves of the
graph, so that no path can pass through a spike.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ulr_snn.sites.records import Record


def direct_credit(ends: Sequence[tuple[Tensor, Tensor]], record: Record) -> Tensor | None:
    """Vector-Jacobian product a = sum over ends of (∂end/∂spikes)^T gradient, [T, B, ...] of the record's spikes.

    ends: tensors that depend on the spikes differentiably, and the loss's gradient with respect to each. The spikes of
    all layers are leaves of the graph, so that no other spike lies between. None where no end reaches the spikes.
    """
    ends = [(end, gradient) for end, gradient in ends if end.requires_grad]
    if not ends:
        return None
    tensors, gradients = zip(*ends, strict=True)
    found = torch.autograd.grad(tensors, record.leaves, gradients, retain_graph=True, allow_unused=True)
    return whole(list(found), record)


def whole(parts: list[Tensor | None], record: Record) -> Tensor | None:
    """[T, B, ...] of what belongs to each leaf of a record's spikes, zero where it is None; None where all are."""
    if all(part is None for part in parts):
        return None
    if record.whole:
        return parts[0]
    zero = torch.zeros_like(record.spikes[0])
    return torch.stack([zero if part is None else part for part in parts])


def in_parts(sequence: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """A sequence [T, B, ...] as the tensors of a layer are: all in one, or one [B, ...] a time step."""
    return [sequence] if len(tensors) == 1 and tensors[0].ndim == sequence.ndim else list(sequence)


def direct_effect(ends: Sequence[Tensor], records: Sequence[Record], changes: Sequence[Tensor]) -> list[Tensor]:
    """Jacobian-vector product: what changes [T, B, ...] of the records' spikes do to each end, in its shape.

    It is taken as the derivative of a vector-Jacobian product with respect to its vector.
    """
    probes = [torch.zeros_like(end, requires_grad=True) for end in ends]
    graphs = [(end, probe) for end, probe in zip(ends, probes, strict=True) if end.requires_grad]
    effects = [torch.zeros_like(end) for end in ends]
    leaves = [leaf for record in records for leaf in record.leaves]
    each = [change for r, c in zip(records, changes, strict=True) for change in in_parts(c, r.leaves)]
    if not graphs or not leaves:
        return effects
    tensors, vectors = zip(*graphs, strict=True)
    products = torch.autograd.grad(tensors, leaves, vectors, create_graph=True, allow_unused=True)
    reached = [(p, e) for p, e in zip(products, each, strict=True) if p is not None and p.requires_grad]
    if not reached:
        return effects
    found = torch.autograd.grad(
        [p for p, _ in reached], probes, [e for _, e in reached], retain_graph=True, allow_unused=True
    )
    return [zero if effect is None else effect for zero, effect in zip(effects, found, strict=True)]
