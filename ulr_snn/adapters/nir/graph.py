"""A NIR graph that is written layer by layer."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from warnings import warn

import numpy as np
from torch import Tensor

from ulr_snn.errors import UsageError

if TYPE_CHECKING:
    from nir import NIRGraph

NO_LEAK = 2.0**-30  # 1 - beta of a neuron without a leak: beta is 1 in single precision
OUTPUTS = "over_time"  # metadata of the output: "mean" or "sum", which a reader takes over time
RESET = "reset"  # metadata of a neuron: its reset


class Inexact(Exception):
    """Raised with the reason if a layer has no exact counterpart."""


def library() -> Any:
    """Imports and returns the package `nir`. Raises UsageError if it is not installed."""
    try:
        import nir
    except ModuleNotFoundError:
        raise UsageError('the exchange by NIR needs the package nir: pip install "ulr-snn[nir]"') from None
    return nir


def array(tensor: Tensor) -> np.ndarray:
    """Returns a copy of a tensor."""
    return tensor.detach().cpu().numpy().copy()


def pair(value: Any) -> tuple[int, int]:
    """Returns an option of a convolution as (high, across)."""
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


@dataclass
class Writer:
    """Writes layers one after another into a graph. shape: features of the last node's output. gain: the last node's
    output over what the model has there. over_time: a reduction over time that the reader makes."""

    nir: Any
    dt: float
    shape: tuple[int, ...]
    gain: float = 1.0
    over_time: str | None = None
    last: str = "input"
    nodes: dict[str, Any] = field(default_factory=dict)
    edges: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.nodes["input"] = self.nir.Input(input_type=np.array(self.shape))

    def add(self, kind: str, node: Any, shape: tuple[int, ...] | None = None) -> str:
        """Appends a node behind the last one. Returns its name."""
        name = f"{kind}_{len(self.nodes)}"
        self.nodes[name] = node
        self.edges.append((self.last, name))
        self.last, self.shape = name, self.shape if shape is None else shape
        return name

    def scaled(self, weight: Tensor) -> np.ndarray:
        """Returns a weight that undoes the gain of the nodes before it."""
        found = array(weight / self.gain)
        self.gain = 1.0
        return found

    def before_reduction(self) -> None:
        """Raises Inexact behind a reduction over time, unless a mean and linear layers, which may change places."""
        if self.over_time is not None:
            raise Inexact(f"it stands behind a {self.over_time} over time, which NIR has not")

    def full(self, value: Any) -> np.ndarray:
        """Returns a value of each neuron, [...] in double precision."""
        found = np.asarray(array(value) if isinstance(value, Tensor) else value, np.float64)
        while found.ndim > len(self.shape) and found.shape[0] == 1:
            found = found[0]
        return np.broadcast_to(found, self.shape).copy()

    def spiking(self, beta: Any, threshold: Any, reset: str, recurrent: np.ndarray | None = None) -> None:
        """Writes neurons u = beta u + I + V s, as `LIF` states them."""
        leak, threshold = np.maximum(1 - self.full(beta), NO_LEAK), self.full(threshold) * self.gain
        self.before_reduction()
        if not np.isfinite(threshold).all() or (threshold <= 0).any():
            raise Inexact("its threshold is not positive and finite")
        ones, zeros = np.ones(self.shape), np.zeros(self.shape)
        if reset == "zero" and recurrent is None and len(np.unique(leak)) == 1:
            lif = self.nir.LIF(tau=self.dt / leak, r=ones, v_leak=zeros, v_threshold=leak * threshold)
            self.add("lif", lif)
        else:
            steps = 1 / leak, ones  # time constants in time steps
            of_current, of_membrane = reversed(steps) if reset == "zero" else steps
            self.filtered(of_current, of_membrane, threshold, reset)
            back = np.zeros(()) if recurrent is None else recurrent.astype(np.float64) * self.gain
            if reset == "subtract":
                self.connected(back - np.diag(threshold) if threshold.ndim == 1 else None, threshold)
            elif recurrent is not None:
                self.connected(back, threshold)
        self.gain = 1.0

    def filtered(self, of_current: np.ndarray, of_membrane: np.ndarray, threshold: np.ndarray, reset: str) -> None:
        """Writes neurons whose current leaks too: i = (1 - 1/m) i + I, u = (1 - 1/n) u + i, for time constants m and n
        in time steps."""
        zeros, metadata = np.zeros(self.shape), {RESET: reset}
        tau = {"tau_syn": self.dt * of_current, "tau_mem": self.dt * of_membrane}
        gains = {"w_in": of_current, "r": of_membrane}
        self.add("lif", self.nir.CubaLIF(**tau, **gains, v_leak=zeros, v_threshold=threshold, metadata=metadata))

    def connected(self, weight: np.ndarray | None, threshold: np.ndarray) -> None:
        """Connects the last neurons to their own current: by a weight [N, N], or (None) by minus their threshold
        [C, H, W]."""
        name = self.last
        if weight is not None:
            self.nodes[f"{name}_recurrent"] = self.nir.Linear(weight)
            self.nodes[f"{name}_back"] = self.nir.Flatten(np.array(self.shape), start_dim=-1, end_dim=-1)
            path = [name, f"{name}_recurrent", f"{name}_back", name]
        else:
            of_channel = threshold.reshape(len(threshold), -1)
            if threshold.ndim != 3 or (of_channel != of_channel[:, :1]).any():
                raise Inexact(
                    "it resets by subtraction, for which its features must be [N], or [C, H, W] with one threshold a "
                    "channel; flatten before it, or use reset='zero'"
                )
            weight = -np.diag(of_channel[:, 0])[:, :, None, None]
            self.nodes[f"{name}_back"] = self.convolution(weight, np.zeros(len(weight)))
            path = [name, f"{name}_back", name]
        self.edges += pairwise(path)

    def integrator(self, leak: np.ndarray, gain: np.ndarray) -> None:
        """Writes leaky integrators v += leak (gain I - v), which do not spike."""
        warn(
            "to_nir writes a node LI, which snnTorch refuses and Norse skips in silence; for these, write the model "
            "without its readout",
            stacklevel=2,
        )
        self.add("readout", self.nir.LI(tau=self.dt / leak, r=gain / self.gain, v_leak=np.zeros(self.shape)))
        self.gain = 1.0

    def convolution(
        self, weight: np.ndarray, bias: np.ndarray, stride: Any = 1, padding: Any = 0, dilation: Any = 1
    ) -> Any:
        """Returns a Conv2d node over the shape so far."""
        padding = padding if isinstance(padding, str) else pair(padding)
        options = {"stride": pair(stride), "padding": padding, "dilation": pair(dilation), "groups": 1}
        return self.nir.Conv2d(input_shape=self.shape[1:], weight=weight, bias=bias, **options)

    def finished(self) -> "NIRGraph":
        """Returns the graph. Raises UsageError for a model whose last pooling no weights follow."""
        if self.gain != 1:
            raise UsageError("to_nir cannot write a model that ends in an average pooling; put a layer behind it")
        metadata = {} if self.over_time is None else {OUTPUTS: self.over_time}
        self.nodes["output"] = self.nir.Output(output_type=np.array(self.shape), metadata=metadata)
        self.edges.append((self.last, "output"))
        return self.nir.NIRGraph(self.nodes, self.edges)
