"""Functions that a model calls between two modules, as modules. A recorded graph shows which functions these are."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

# Nodes that keep the order of rows.
VIEWS = "ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "AliasBackward0"


def max_pool(node: Any) -> nn.Module:
    """Returns a max pooling as its node in the graph says."""
    return nn.MaxPool2d(**saved(node, "kernel_size", "padding", "dilation", "ceil_mode"))


def average_pool(node: Any) -> nn.Module:
    """Returns an average pooling as its node in the graph says."""
    return nn.AvgPool2d(**saved(node, "kernel_size", "padding", "ceil_mode", "count_include_pad", "divisor_override"))


def saved(node: Any, *names: str) -> dict[str, Any]:
    """Returns arguments that a node of a pooling has saved. Without a stride it saves an empty one."""
    return {name: getattr(node, f"_saved_{name}") for name in names} | {"stride": node._saved_stride or None}


MODULES: dict[str, Callable[[Any], nn.Module]] = {
    "MaxPool2DWithIndicesBackward0": max_pool,
    "AvgPool2DBackward0": average_pool,
    "ReluBackward0": lambda node: nn.ReLU(),
}


def between(leaf: Tensor, read: Tensor) -> list[nn.Module] | None:
    """Returns the modules that lead from a leaf of the graph to a tensor, up to the shape of the result; None if other
    functions do."""
    found: list[nn.Module] = []
    node: Any = read.grad_fn
    while getattr(node, "variable", None) is not leaf:
        make = MODULES.get(type(node).__name__)
        if make is not None:
            found.append(make(node))
        elif type(node).__name__ not in VIEWS or any(type(module) is not nn.ReLU for module in found):
            return None  # another function, or a pooling of what was reshaped
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if len(parents) != 1:
            return None
        (node,) = parents
    return found[::-1]
