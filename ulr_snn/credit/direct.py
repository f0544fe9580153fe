"""Exact maps: the vector-Jacobian products of the differentiable modules between spikes and the tensors they reach.

A layer's spikes reach the loss, or the input currents of other layers, through differentiable modules. Autograd takes
the product over that one piece of the model, for all time steps at once. The spikes of every layer are leaves of the
graph, so that no path can pass through a spike.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ulr_snn.sites.records import Record


def direct_credit(ends: Sequence[tuple[Tensor, Tensor]], record: Record) -> Tensor | None:
    """Returns the vector-Jacobian product a = sum over ends of (∂end/∂spikes)^T gradient, [T, B, ...], or None. ends:
    tensors that may depend on the spikes differentiably, with the loss's gradient at each. The result is None if no end
    does."""
    ends = [(end, gradient) for end, gradient in ends if end.requires_grad]
    if not ends:
        return None
    tensors, gradients = zip(*ends, strict=True)
    found = torch.autograd.grad(tensors, record.leaves, gradients, retain_graph=True, allow_unused=True)
    return whole(list(found), record)


def whole(parts: list[Tensor | None], record: Record) -> Tensor | None:
    """Joins the parts of a record's leaves to [T, B, ...], with zeros for None. Returns None if all parts are None."""
    if all(part is None for part in parts):
        return None
    if record.whole:
        return parts[0]
    zero = torch.zeros_like(record.spikes[0])
    return torch.stack([zero if part is None else part for part in parts])


def in_parts(sequence: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Splits a sequence [T, B, ...] like the tensors of a layer: all in one, or one [B, ...] per time step."""
    return [sequence] if len(tensors) == 1 and tensors[0].ndim == sequence.ndim else list(sequence)


def direct_effect(ends: Sequence[Tensor], records: Sequence[Record], changes: Sequence[Tensor]) -> list[Tensor]:
    """Returns the Jacobian-vector product: the change of each end by changes [T, B, ...] of the records' spikes. The
    product is the derivative of a vector-Jacobian product with respect to its vector."""
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
