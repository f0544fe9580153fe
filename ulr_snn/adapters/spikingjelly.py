"""SpikingJelly's nodes, as they are: their own code runs one step at a time, only `surrogate_function` is replaced.

A reset that is detached (`detach_reset`) is the same reset; while a site is bound it is not detached, so that what a
spike does to its own neuron is known. In multi-step mode IF, LIF and parametric LIF nodes run as a scan of
`ulr_snn`, batch norm, dropout and whatever else the model has as they are; other nodes run one step at a time. Steps of
these three are written out here, since calls on the way to the library's own take most of the time.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from ulr_snn.adapters.base import Adapter, Step, StepNeuron
from ulr_snn.kernels.precision import full_precision, widened
from ulr_snn.model.neurons import LIF, Scaled

KINDS = (
    neuron.IFNode,
    neuron.LIFNode,
    neuron.ParametricLIFNode,
    neuron.QIFNode,
    neuron.EIFNode,
    neuron.IzhikevichNode,
    neuron.KLIFNode,
    neuron.HalfThresholdIFNode,
)
SCANNED = (neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode)


class Node(StepNeuron):
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
        """The membrane counts from v_reset, where there is one: it decays to it, and is set to it."""
        module, leaks = self.module, type(self.module) is neuron.LIFNode
        if type(module) not in (neuron.IFNode, neuron.LIFNode):
            return "its equations are not those of a LIF neuron with fixed leak"
        if leaks and module.v_reset is None:
            return "what its soft reset takes away has leaked by the next step"
        if module.store_v_seq:
            return "it keeps its membranes"
        beta = torch.tensor(1 - 1 / module.tau if leaks else 1.0).to(like)
        entry = [Scaled(1 / module.tau)] if leaks and module.decay_input else []
        reset = "subtract" if module.v_reset is None else "zero"
        return entry, LIF.sharing(module, reset, None, beta=beta, threshold=self.threshold.to(like))

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
        values = {"beta": 1 - share, "threshold": self.threshold.to(x)}
        ours = LIF.sharing(module, "zero", None, **values)
        ours.lengths = lengths
        return share * x if module.decay_input else x, ours

    def _step(self, x: Tensor, site: Step) -> Tensor:
        """What the module's own step does, of the kinds that scans know, in a third of its time."""
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

    def patches(self, site: Step) -> dict[str, Any]:
        module = self.module
        if self.scans and hasattr(site, "fire_sequence"):
            return {"forward": lambda x: fired(site, *self.as_scan(widened(x), site.lengths)).to(x.dtype)}

        quick = type(module) in SCANNED and not module.store_v_seq

        def step(x: Tensor) -> Tensor:
            site.begin(x)
            spikes = self._step(x, site) if quick else type(module).single_step_forward(module, x)
            site.end(list(module._memories.values()))
            return spikes

        def forward(x: Tensor) -> Tensor:
            return step(x) if module.step_mode == "s" else torch.stack([step(now) for now in x])

        return {"forward": forward, "surrogate_function": site.fire, "detach_reset": False}


@full_precision()
def fired(site: Any, current: Tensor, scan: LIF) -> Tensor:
    """Spikes [T, B, ...] of the site's layer, run as this scan."""
    return site.fire_sequence(scan, current)


def adapt(module: nn.Module) -> StepNeuron | str | None:
    """The module as a neuron, the reason why it cannot be one, or None where it does not spike."""
    if type(module) in KINDS:
        return Node(module)
    families = [kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith(neuron.__name__)]
    if families and not any("NonSpiking" in name for name in families):
        return f"this class is not supported; use {', '.join(kind.__name__ for kind in KINDS)}"
    return None


@contextmanager
def fresh_memories(model: nn.Module) -> Iterator[None]:
    """Modules with memories, those that do not fire (dropout, synapses) too: for a while they start anew, and then they
    are as they were."""
    modules = [module for module in model.modules() if "_memories_rv" in module.__dict__]
    kept = [dict(module._memories) for module in modules]
    try:
        for module in modules:
            module._memories.update(copy.deepcopy(module._memories_rv))
        yield
    finally:
        for module, memories in zip(modules, kept, strict=True):
            module._memories.update(memories)


def drops(module: nn.Module) -> bool:
    """Whether it is dropout, which is no subclass of torch's."""
    return "Dropout" in type(module).__name__


def lifted(module: nn.Module) -> bool:
    """Whether it is a stateless module of torch's, in multi-step mode where it is so set."""
    return type(module).__module__ == "spikingjelly.activation_based.layer.stateless_wrapper"


ADAPTER = Adapter(adapt, fresh_state=fresh_memories, couples=drops, per_row=lifted)
