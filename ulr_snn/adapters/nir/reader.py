"""`from_nir`: models of ulr_snn's neurons from NIR graphs."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ulr_snn.adapters.nir.graph import OUTPUTS, RESET, Inexact, library, pair
from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import Positive, checked
from ulr_snn.model.chain import OverTime
from ulr_snn.model.entry import Scaled
from ulr_snn.model.neurons import LIF, Fold, LeakyReadout, RecurrentLIF, TimeAverage

NEAR = 1e-6  # relative error of numbers that count as equal
PASSED = ("Input", "Output", "Identity", "Flatten")  # nodes of a connection that do nothing
NEURONS = ("LIF", "IF", "CubaLIF")
Edges = list[tuple[str, str]]


@checked
@torch.no_grad()
def from_nir(graph: Any, dt: Positive = 1e-4) -> nn.Sequential:
    """Returns a model of ulr_snn's neurons, [T, B, ...] -> [T, B, ...], that computes a NIR graph in time steps of dt
    seconds.

    graph: a NIRGraph that is a chain of layers, or the path of its file. A connection from neurons to themselves takes
    one time step. Raises UsageError for a graph that is no chain, and for a node without exact counterpart, by name.
    """
    read = library().read(graph) if isinstance(graph, str | PathLike) else graph
    if not isinstance(read, library().NIRGraph):
        raise UsageError(f"from_nir got {type(read).__name__}; give a NIRGraph, or the path of its file")
    nodes, edges = inlined(read)
    builder = Builder(dt)
    for name, node, loops in chain(nodes, edges):
        try:
            builder.build(node, [composed([nodes[inner] for inner in loop]) for loop in loops])
        except Inexact as error:
            raise UsageError(f"from_nir cannot read node {name} ({type(node).__name__}): {error}") from None
    return nn.Sequential(*builder.modules)


def inlined(graph: Any, prefix: str = "") -> tuple[dict[str, Any], Edges]:
    """Returns nodes and edges of a graph, with those of the graphs in it, by names with dots."""
    nodes: dict[str, Any] = {}
    edges: Edges = []
    first, last = {}, {}  # of each graph in this one
    for name, node in graph.nodes.items():
        if type(node).__name__ != "NIRGraph":
            nodes[prefix + name] = node
            continue
        inner, between = inlined(node, f"{prefix}{name}.")
        nodes |= inner
        edges += between
        first[name], last[name] = (f"{prefix}{name}.{only(side)}" for side in (node.inputs, node.outputs))
    edges += [(last.get(a, prefix + a), first.get(b, prefix + b)) for a, b in graph.edges]
    return nodes, edges


def only(names: Any) -> str:
    """Returns the only one of these names. Raises UsageError if there are none or several."""
    if len(names) != 1:
        raise UsageError(f"from_nir got a graph with {len(names)} inputs or outputs where one is needed")
    return next(iter(names))


def chain(nodes: dict[str, Any], edges: Edges) -> Iterator[tuple[str, Any, list[list[str]]]]:
    """Yields the nodes of a chain in their order, with the paths from a node back to itself. Raises UsageError if the
    graph is no chain."""
    after = {name: [b for a, b in edges if a == name] for name in nodes}
    entered = {b for _, b in edges}
    at = only([name for name, node in nodes.items() if type(node).__name__ == "Input" and name not in entered])
    before, left = set[str](), set(nodes)  # the node before, if there is one, and nodes without a place so far
    while True:
        loops = [path for name in after[at] if (path := way_back(name, at, after)) is not None]
        inside = {name for loop in loops for name in loop}
        onwards = set(after[at]) - {at, *(loop[0] for loop in loops if loop)}
        if len(onwards) > 1 or not inside <= left or {a for a, b in edges if b == at} - inside - {at} != before:
            raise UsageError(f"from_nir reads chains of layers, and node {at} is on several paths")
        left -= {at, *inside}
        yield at, nodes[at], loops
        if not onwards:
            break
        before, (at,) = {at}, onwards
    if left:
        raise UsageError(f"from_nir reads chains of layers, and node {min(left)} is on none from input to output")


def way_back(start: str, to: str, after: dict[str, list[str]]) -> list[str] | None:
    """Returns the nodes from `start` on, each with a single follower, to a node; None if they do not lead to it."""
    path: list[str] = []
    while start != to:
        if start in path or len(after[start]) != 1:
            return None
        path.append(start)
        start = after[start][0]
    return path


def composed(loop: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns weight and bias of the nodes from neurons to themselves: [N, N] and [N], or [C, C] and [C] for
    convolutions."""
    weight, bias = np.eye(1), np.zeros(1)
    for node in loop:
        kind = type(node).__name__
        if kind in PASSED:
            continue
        own = np.asarray(getattr(node, "weight", np.zeros(0)), np.float64)
        if kind == "Conv2d" and own.shape[2:] == (1, 1) and node.groups == 1:
            own = own[:, :, 0, 0]
        elif kind not in ("Linear", "Affine"):
            raise Inexact(f"its connection to itself holds a {kind}, where only weights [N, N] can be")
        bias = own @ bias if len(bias) == own.shape[1] else np.zeros(len(own))
        weight = own if weight.shape == (1, 1) else own @ weight
        bias = bias + np.asarray(getattr(node, "bias", 0.0), np.float64)
    return weight, bias


def parameter(value: np.ndarray) -> Tensor:
    """Returns a value of each neuron as a tensor, a single number if they are all the same."""
    value = np.asarray(value)
    found = torch.from_numpy(value.astype(np.float64)).to(torch.get_default_dtype())
    return found.flatten()[0] if len(found.unique()) == 1 else found


def tensor(value: Any) -> Tensor:
    """Returns an array as a tensor of the default precision."""
    return torch.from_numpy(np.array(value)).to(torch.get_default_dtype())


def equal(a: Any, b: Any) -> bool:
    """Returns whether arrays have the same shape and the same values, up to rounding."""
    return np.shape(a) == np.shape(b) and bool(np.allclose(a, b, NEAR, NEAR))


@dataclass
class Builder:
    """Builds the modules of a chain, one node after another."""

    dt: float
    modules: list[nn.Module] = field(default_factory=list)

    def build(self, node: Any, loops: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Builds a node. loops: weights and biases of its connections to itself."""
        kind = type(node).__name__
        if kind in ("Input", "Identity"):
            return
        builder = getattr(self, f"_{kind.lower()}", None)
        if builder is None:
            raise Inexact("ulr_snn has no counterpart of it")
        if kind in NEURONS:
            builder(node, self.recurrence(loops))
        elif loops:
            raise Inexact("it is connected to itself, which only neurons can be")
        else:
            builder(node)

    def recurrence(self, loops: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray | None:
        """Returns the sum of the weights of connections, None without any. Their bias goes to the layer before."""
        if not loops:
            return None
        bias = np.sum([bias for _, bias in loops], axis=0)
        if np.any(bias):
            before = self.modules[-1] if self.modules else None
            if not isinstance(before, nn.Linear):
                raise Inexact("its connection to itself has a bias, and no linear layer stands before it to take that")
            own = torch.zeros(before.out_features) if before.bias is None else before.bias
            before.bias = nn.Parameter(own + tensor(bias))
        return np.sum([weight for weight, _ in loops], axis=0)

    def folded(self, module: nn.Module) -> None:
        """Appends a module that takes one time step a call."""
        if self.modules and isinstance(self.modules[-1], Fold):
            self.modules[-1].append(module)
        else:
            self.modules.append(Fold(module))

    def _output(self, node: Any) -> None:
        kind = node.metadata.get(OUTPUTS)
        self.modules += [TimeAverage()] if kind == "mean" else [OverTime("SumBackward1")] if kind == "sum" else []

    def _linear(self, node: Any) -> None:
        weight, bias = tensor(node.weight), getattr(node, "bias", None)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(tensor(bias))
        self.modules.append(layer)

    _affine = _linear

    def _conv2d(self, node: Any) -> None:
        groups, weight = int(node.groups), tensor(node.weight)
        channels, size = (weight.shape[1] * groups, len(weight)), (weight.shape[2], weight.shape[3])
        padding = node.padding if isinstance(node.padding, str) else pair(node.padding)
        layer = nn.Conv2d(*channels, size, pair(node.stride), padding, pair(node.dilation), groups)
        layer.load_state_dict({"weight": weight, "bias": tensor(node.bias)})
        self.folded(layer)

    def _sumpool2d(self, node: Any) -> None:
        size, stride, padding = map(pair, (node.kernel_size, node.stride, node.padding))
        self.folded(nn.AvgPool2d(size, stride, padding, divisor_override=1))

    def _avgpool2d(self, node: Any) -> None:
        size, stride, padding = map(pair, (node.kernel_size, node.stride, node.padding))
        self.folded(nn.AvgPool2d(size, stride, padding))

    def _flatten(self, node: Any) -> None:
        axes = len(node.input_type["input"])
        first, last = (int(axis) % axes for axis in (node.start_dim, node.end_dim))
        if (first, last) == (0, axes - 1):
            self.modules.append(nn.Flatten(2))
        else:
            self.folded(nn.Flatten(first + 1, last + 1))

    def leak(self, tau: Any) -> np.ndarray:
        """Returns dt / tau. Raises Inexact if it is no share."""
        share = self.dt / np.asarray(tau, np.float64)
        if not ((share > 0) & (share <= 1 + NEAR)).all():
            raise Inexact(f"its time constants are not at least dt={self.dt:g}; give from_nir the dt of the graph")
        return share.clip(max=1)

    def _li(self, node: Any) -> None:
        check_rest(node)
        share = self.leak(node.tau)
        gain = np.unique(np.round(share * node.r, 9))
        if len(gain) != 1:
            raise Inexact("its neurons have different gains r dt / tau")
        self.modules.append(LeakyReadout(parameter(1 - share)))
        if not equal(gain[0], 1.0):
            self.modules.append(Scaled(float(gain[0])))

    def _lif(self, node: Any, recurrent: np.ndarray | None) -> None:
        share = self.leak(node.tau)
        self.neurons(node, 1 - share, node.v_threshold / (share * node.r), "zero", recurrent)

    def _if(self, node: Any, recurrent: np.ndarray | None) -> None:
        self.neurons(node, np.ones(1), node.v_threshold / node.r, "zero", recurrent)

    def _cubalif(self, node: Any, recurrent: np.ndarray | None) -> None:
        of_current, of_membrane = self.leak(node.tau_syn), self.leak(node.tau_mem)
        threshold = node.v_threshold / (of_current * node.w_in * of_membrane * node.r)
        reset = node.metadata.get(RESET, "none")
        if equal(of_membrane, np.ones_like(of_membrane)) and reset != "zero":
            self.leaky_current(node, 1 - of_current, threshold, reset, recurrent)
        elif equal(of_current, np.ones_like(of_current)):
            self.neurons(node, 1 - of_membrane, threshold, "zero", recurrent)
        elif recurrent is None:
            self.modules.append(LeakyReadout(parameter(1 - of_current)))  # the synapse
            self.neurons(node, 1 - of_membrane, threshold, "zero")
        else:
            raise Inexact(
                f"it has two time constants and a connection to itself in time steps of {self.dt:g}; give from_nir the "
                "dt with which it was written"
            )

    def leaky_current(
        self, node: Any, beta: np.ndarray, threshold: np.ndarray, reset: str, recurrent: np.ndarray | None
    ) -> None:
        """Builds neurons whose membrane nothing resets, with the resets among their recurrent weights."""
        if recurrent is None:
            self.neurons(node, beta, threshold, "none")
            return
        of_channel = threshold.reshape(len(threshold), -1)[:, 0]
        back = np.diag(of_channel)
        if equal(recurrent, -back) and equal(
            threshold, of_channel.reshape(-1, *[1] * (threshold.ndim - 1)) + 0 * threshold
        ):
            self.neurons(node, beta, threshold, "subtract")
        elif reset == "subtract":
            self.neurons(node, beta, threshold, "subtract", recurrent + back)
        else:
            self.neurons(node, beta, threshold, "none", recurrent)

    def neurons(
        self, node: Any, beta: np.ndarray, threshold: np.ndarray, reset: str, recurrent: np.ndarray | None = None
    ) -> None:
        """Builds neurons u = beta u + I + V s. recurrent: V [N, N]."""
        check_rest(node)
        if not (threshold > 0).all():
            raise Inexact("a threshold is not positive")
        leak, limit = parameter(beta), parameter(threshold)
        if recurrent is None:
            self.modules.append(LIF(leak, limit, reset))
            return
        if threshold.ndim != 1 or recurrent.shape != (len(threshold),) * 2:
            raise Inexact(f"its recurrent weights {recurrent.shape} do not fit features {threshold.shape}")
        layer = RecurrentLIF(len(threshold), leak, limit, reset)
        layer.get_parameter("recurrent.weight").copy_(tensor(recurrent))
        self.modules.append(layer)


def check_rest(node: Any) -> None:
    """Raises Inexact unless a neuron leaks and resets to zero."""
    if any(np.any(getattr(node, name, 0.0)) for name in ("v_leak", "v_reset")):
        raise Inexact("it leaks or resets to a value other than 0")
