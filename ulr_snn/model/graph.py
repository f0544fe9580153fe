"""Searches of autograd graphs. They show where each gradient comes from.

The outputs of functions that fire (`adapters.places`) count as leaves.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def leaves(tensors: Iterable[Tensor]) -> set[int]:
    """Returns the ids of the leaf tensors (parameters, spikes) on which the tensors depend differentiably."""
    return set(variables(tensors))


def variables(tensors: Iterable[Tensor]) -> dict[int, Tensor | None]:
    """Returns by id the leaf tensors on which the tensors depend differentiably. None: outputs of functions that
    fire."""
    tensors = list(tensors)  # an iterator can be read only once
    found: dict[int, Tensor | None] = {id(t): t for t in tensors if t.requires_grad and t.grad_fn is None}
    stack = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen = set(stack)
    while stack:
        node: Any = stack.pop()  # torch does not declare what nodes hold
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        if hasattr(node, "fired"):
            found[node.fired] = None
            continue
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return found


def share_nodes(first: Iterable[Tensor], second: Iterable[Tensor]) -> bool:
    """Returns whether tensors depend on an operation of which others depend, too."""
    return bool(_operations(first) & _operations(second))


def _operations(tensors: Iterable[Tensor]) -> set[Any]:
    """Returns the nodes of the graph behind the tensors, without those of leaf tensors."""
    stack = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    found: set[Any] = set(stack)
    while stack:
        node: Any = stack.pop()
        new = {parent for parent, _ in node.next_functions if parent is not None} - found
        found |= new
        stack += new
    return {node for node in found if not hasattr(node, "variable")}


def passes_through(tensors: Iterable[Tensor], ids: set[int], names: tuple[str, ...]) -> bool:
    """Returns whether a path from the tensors to leaves of these ids passes a node with one of these names. names:
    beginnings of the names."""
    stack = [(t.grad_fn, False) for t in tensors if t.grad_fn is not None]
    seen = set(stack)
    while stack:
        node, passed = stack.pop()
        fired = getattr(node, "fired", None)
        if passed and (id(getattr(node, "variable", None)) in ids or fired in ids):
            return True
        if fired is not None:
            continue
        passed = passed or type(node).__name__.startswith(names)
        for parent, _ in node.next_functions:
            if parent is not None and (parent, passed) not in seen:
                seen.add((parent, passed))
                stack.append((parent, passed))
    return False
