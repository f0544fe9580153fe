"""Nested tuples, lists, dicts and dataclasses that hold tensors."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def mapped(tree: Any, function: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """Returns the same tree with function(leaf) in place of each leaf of this kind. Anything else stays as it is."""
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, Mapping):
        items = {key: mapped(item, function, kind) for key, item in tree.items()}
        return items if type(tree) is dict else filled(tree, items)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(mapped(item, function, kind) for item in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(mapped(item, function, kind) for item in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        changed = copy.copy(tree)
        for field in fields(tree):
            object.__setattr__(changed, field.name, mapped(getattr(tree, field.name), function, kind))
        return changed
    return tree


def filled(tree: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """Returns a mapping of the same class with other items, or a dict if its class cannot hold them."""
    changed: Any = copy.copy(tree)
    try:
        for key, item in items.items():
            changed[key] = item
    except TypeError:
        return items
    return changed


def tensors(tree: Any) -> list[Tensor]:
    """Returns all tensors of a tree, in the order of its items."""
    found: list[Tensor] = []
    mapped(tree, found.append)
    return found


def items(tree: Any) -> list[tuple[Any, Any]]:
    """Returns the (index, name or key, item) pairs of the top of a tree; a tensor is its only item."""
    if isinstance(tree, Mapping):
        return list(tree.items())
    if isinstance(tree, tuple | list):
        return list(enumerate(tree))
    if is_dataclass(tree) and not isinstance(tree, type):
        return [(field.name, getattr(tree, field.name)) for field in fields(tree)]
    return [(0, tree)]
