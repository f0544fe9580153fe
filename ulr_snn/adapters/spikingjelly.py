"""The adapter of SpikingJelly's nodes. Their own code runs one step at a time with another `surrogate_function`.

While a site is bound, no reset is detached (`detach_reset`), so that the graph holds the effect of a spike on its own
neuron. In multi-step mode IF, LIF and parametric LIF nodes run as a scan of `ulr_snn`; other nodes run one step at a
time. `Node._step` repeats the steps of these three, since calls inside the library take most of the time of its own.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from ulr_snn.adapters.base import Adapter, Step, StepNeuron
from ulr_snn.adapters.stairs import Staircase
from ulr_snn.kernels.precision import full_precision, widened
from ulr_snn.kernels.walk import modules_in
from ulr_snn.model.entry import Scaled
from ulr_snn.model.neurons import LIF

KINDS = (
    neuron.IFNode,
    neuron.LIFNode,
    neuron.ParametricLIFNode,
    neuron.QIFNode,
    neuron.EIFNode,
    neuron.IzhikevichNode,
    neuron.KLIFNode,
    neuron.HalfThresholdIFNode,
    neuron.OTTTLIFNode,
    neuron.SLTTLIFNode,
    neuron.ILIFNode,
)
ONLINE = (neuron.OTTTLIFNode, neuron.SLTTLIFNode)  # LIF nodes whose gradient leaves the past out
# Nodes whose own code calls a function with a surrogate gradient, once a step or once for all; see `places.py`.
BY_FUNCTION = (
    *(neuron.SimpleIFNode, neuron.SimpleLIFNode, neuron.CUBALIFNode, neuron.RAFNode),
    *(neuron.ComplementaryLIFNode, neuron.GatedLIFNode, neuron.LIAFNode, neuron.MPBNLIFNode),
    *(neuron.TernaryIFNode, neuron.TernaryLIFNode, neuron.PSN, neuron.MaskedPSN, neuron.SlidingPSN),
    *(neuron.ILCIFNode, neuron.ILCLIFNode, neuron.ILCCUBALIFNode),
)
SCANNED = (neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode)


class Node(StepNeuron):
    """A neuron of SpikingJelly in either step mode."""

    strict = False

    @property
    def threshold(self) -> Tensor:
        rest = self.module.v_reset or 0.0
        return torch.tensor(self.module.v_threshold - rest, dtype=torch.float64)

    def states(self) -> list[Tensor]:
        return [state for state in self.module._memories.values() if isinstance(state, Tensor)]

    def options(self) -> tuple[Any, ...]:
        names = ("tau", "decay_input", "v_threshold", "v_reset", "step_mode", "store_v_seq")
        return tuple(getattr(self.module, name, None) for name in names)

    def ours(self, like: Tensor) -> tuple[list[nn.Module], LIF] | str:
        # The neuron's membrane is the module's membrane minus v_reset, to which the latter decays and is reset.
        module, leaks = self.module, type(self.module) is neuron.LIFNode
        if type(module) not in (neuron.IFNode, neuron.LIFNode):
            return "its equations are not those of a LIF neuron with fixed leak"
        if leaks and module.v_reset is None:
            return "what its soft reset takes away has leaked by the next step"
        if module.store_v_seq:
            return "it keeps its membranes"
        beta = torch.tensor(1 - 1 / module.tau if leaks else 1.0).to(like)
        entry: list[nn.Module] = [Scaled(1 / module.tau)] if leaks and module.decay_input else []
        reset = "subtract" if module.v_reset is None else "zero"
        return entry, LIF.sharing(module, reset, None, beta=beta, threshold=self.threshold.to(like))

    @property
    def by_sequence(self) -> bool:
        return self.module.step_mode == "m"

    @property
    def scans(self) -> bool:
        module, leaks = self.module, not isinstance(self.module, neuron.IFNode)
        soft = leaks and module.v_reset is None
        return type(module) in SCANNED and module.step_mode == "m" and not soft and not module.store_v_seq

    def as_scan(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, LIF]:
        module = self.module
        if type(module) is not neuron.ParametricLIFNode:
            return super().as_scan(x, lengths)
        share = module.w.sigmoid()  # 1 / tau, which is learned
        ours = LIF.sharing(module, "zero", None, beta=1 - share, threshold=self.threshold.to(x))
        ours.lengths = lengths
        return share * x if module.decay_input else x, ours

    def _step(self, x: Tensor, site: Step) -> Tensor:
        """Runs the module's own step, for the `SCANNED` kinds, in a third of the module's time."""
        module, reset, v = self.module, self.module.v_reset, self.module.v
        if type(module) is neuron.IFNode:
            v = v + x
        else:
            share = module.w.sigmoid() if type(module) is neuron.ParametricLIFNode else 1 / module.tau
            over = v - reset if reset else v
            v = v + share * (x - over) if module.decay_input else v - share * over + x
        spikes = site.fire(v - module.v_threshold)
        if reset is None:
            module.v = v - spikes * module.v_threshold
        else:
            module.v = (1 - spikes) * v + reset * spikes if reset else (1 - spikes) * v
        return spikes

    def patches(self, site: Any) -> dict[str, Any]:
        module = self.module
        if self.scans and hasattr(site, "fire_sequence"):
            return {"forward": lambda x: fired(site, *self.as_scan(widened(x), site.lengths)).to(x.dtype)}

        quick = type(module) in (*SCANNED, *ONLINE) and not module.store_v_seq

        def step(x: Tensor) -> Tensor:
            site.begin(x)
            spikes = self._step(x, site) if quick else type(module).single_step_forward(module, x)
            site.end(list(module._memories.values()))
            return spikes

        def forward(x: Tensor) -> Tensor:
            return step(x) if module.step_mode == "s" else torch.stack([step(now) for now in x])

        return {"forward": forward, "surrogate_function": self._firing(site), "detach_reset": False}

    def _firing(self, site: Step) -> Callable[[Tensor], Tensor]:
        """Returns what the module's own code fires by."""
        return site.fire


class Counting(Node):
    """A node that counts: its output is the number of thresholds that its membrane, over the threshold, has passed."""

    @property
    def threshold(self) -> Tensor:
        return torch.ones((), dtype=torch.float64)

    def _firing(self, site: Step) -> Callable[[Tensor], Tensor]:
        most = int(self.module.surrogate_function.max_spike_count)
        levels = Staircase(0, None, tuple(k + 0.5 for k in range(most)), (1.0,) * most, 0.0, False)
        return lambda x: levels.output(site.fire(levels.drive(x)))


@full_precision()
def fired(site: Any, current: Tensor, scan: LIF) -> Tensor:
    """Runs the site's layer as this scan and returns the spikes [T, B, ...]."""
    return site.fire_sequence(scan, current)


def adapt(module: nn.Module) -> StepNeuron | str | None:
    """Returns the module as a neuron, the reason why it cannot be trained, or None if it does not spike."""
    kind = type(module)
    if kind is neuron.ILIFNode:
        return Counting(module)
    if kind in KINDS or (not kind.__module__.startswith("spikingjelly") and fires_as_inherited(kind)):
        return Node(module)
    elsewhere = kind.__module__.startswith("spikingjelly") and not kind.__module__.startswith(neuron.__name__)
    if isinstance(module, BY_FUNCTION) or elsewhere:  # SpikingJelly's models have some nodes of their own
        return None
    families = [kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith(neuron.__name__)]
    if families and not any("NonSpiking" in name for name in families):
        return f"this class is not supported; use {', '.join(kind.__name__ for kind in KINDS)}"
    return None


def fires_as_inherited(kind: type) -> bool:
    """Returns whether a user's class derives from a node and decides on spikes, and on the steps of a sequence, as its
    base class does."""
    bases = [base for base in (neuron.SimpleBaseNode, *KINDS) if issubclass(kind, base)]
    names = "neuronal_fire", "forward", "multi_step_forward"
    return any(all(getattr(kind, name, None) is getattr(base, name, None) for name in names) for base in bases)


@contextmanager
def fresh_memories(model: nn.Module) -> Iterator[None]:
    """Within this context, all modules with memories, also dropout and synapses, start from their initial state.
    Afterwards their memories are as before."""
    modules: list[Any] = [module for module in modules_in(model) if "_memories_rv" in module.__dict__]
    kept = [dict(module._memories) for module in modules]
    try:
        for module in modules:
            module._memories.update(copy.deepcopy(module._memories_rv))
        yield
    finally:
        for module, memories in zip(modules, kept, strict=True):
            module._memories.update(memories)


def drops(module: nn.Module) -> bool:
    """Returns whether a module is dropout. SpikingJelly's classes are no subclasses of torch's."""
    return "Dropout" in type(module).__name__


def lifted(module: nn.Module) -> bool:
    """Returns whether a module wraps a stateless module of torch, in single-step or multi-step mode."""
    return type(module).__module__ == "spikingjelly.activation_based.layer.stateless_wrapper"


ADAPTER = Adapter(adapt, fresh_state=fresh_memories, couples=drops, per_row=lifted)
