"""The adapter of snnTorch's neurons. Their own code runs with another `spike_grad` and another `mem_reset`.

Layers that run a whole sequence at once have no reset. The other layers call `spike_grad` twice a step: for the reset,
from the membrane of the previous step, and for the spike. Both calls must see the same drawn spike, so the reset takes
the spike of the previous step. With `reset_delay=False` the membrane is already reset at the second call, which asks
whether a neuron that fired is still above its threshold. This question, and with `inhibition` which neuron of a layer
wins, depends on weights but is not random. Such a decision gets no credit, and no estimator is unbiased there.
"""

from typing import Any

import snntorch
import torch
from torch import Tensor, nn

from ulr_snn.adapters.base import Adapter, Step, StepNeuron
from ulr_snn.kernels.precision import widened
from ulr_snn.model.entry import Biased, Synapse
from ulr_snn.model.neurons import LIF, Weighted

STATES = {
    snntorch.Leaky: ("mem",),
    snntorch.Lapicque: ("mem",),
    snntorch.Synaptic: ("syn", "mem"),
    snntorch.Alpha: ("syn_exc", "syn_inh", "mem"),
    snntorch.RLeaky: ("spk", "mem"),
    snntorch.RSynaptic: ("spk", "syn", "mem"),
    snntorch.SLSTM: ("syn", "mem"),
    snntorch.SConv2dLSTM: ("syn", "mem"),
    snntorch.DeltaLeaky: ("mem", "mem_prev"),
}
WHOLE = (snntorch.LeakyParallel, snntorch.StateLeaky, snntorch.LinearLeaky, snntorch.AssociativeLeaky)


class Neuron(StepNeuron):
    """A neuron of snnTorch, or of a class derived from one, that runs one time step a call."""

    @property
    def kind(self) -> type:
        """The class of snnTorch that the module's class is or derives from."""
        return next(kind for kind in type(self.module).__mro__ if kind in STATES)

    @property
    def threshold(self) -> Tensor:
        if self.kind is snntorch.DeltaLeaky:
            return torch.as_tensor(self.module.delta_threshold)
        return self.module.threshold

    def clear(self) -> None:
        first = None if self.kind is snntorch.DeltaLeaky else self.module.threshold.new_zeros(0)
        for name in STATES[self.kind]:
            setattr(self.module, name, first)

    def unsupported(self) -> str | None:
        if self.kind is snntorch.RSynaptic and not self.module.reset_delay:
            return "reset_delay=False fails in snnTorch itself; use reset_delay=True"
        return None

    def states(self) -> list[Tensor]:
        return [getattr(self.module, name) for name in STATES[self.kind]]

    def options(self) -> tuple[Any, ...]:
        module = self.module
        names = ("reset_mechanism", "reset_delay", "inhibition", "state_quant", "all_to_all", "graded_spikes_factor")
        found = [getattr(module, name, None) for name in names]
        return tuple((id(v), v._version) if isinstance(v, Tensor) else v for v in found)

    def ours(self, like: Tensor) -> tuple[list[nn.Module], LIF] | str:
        module = self.module
        recurrent = module.recurrent if type(module) is snntorch.RLeaky else None
        if type(module) not in (snntorch.Leaky, snntorch.RLeaky, snntorch.Synaptic):
            return "its equations are not those of a LIF neuron"
        if not module.reset_delay:
            return "it resets at once, by a second look at its membrane"
        if module.inhibition or module.state_quant:
            return "no scan supports inhibition or quantised states"
        factor = module.graded_spikes_factor
        if factor.requires_grad or bool((factor != 1).any()):
            return "its spikes are graded"
        numbers = module.beta, module.threshold, getattr(module, "alpha", module.beta)
        if not all(number.is_floating_point() for number in numbers):
            return "its leak or threshold is a whole number"
        if recurrent is not None and type(recurrent) is not nn.Linear:
            return "its recurrent weights are not all to all"
        if type(module) is not snntorch.Leaky and module.reset_mechanism == "zero":
            return "its reset to zero takes the current with it"
        entry: list[nn.Module] = [Biased(recurrent)] if recurrent is not None and recurrent.bias is not None else []
        if type(module) is snntorch.Synaptic:
            entry.append(Synapse((module, "alpha")))
        return entry, LIF.sharing(module, module.reset_mechanism, None if recurrent is None else Weighted(recurrent))

    def patches(self, site: Step) -> dict[str, Any]:
        module, states = self.module, STATES[self.kind]
        delayed = getattr(module, "reset_delay", True)

        def forward(input_: Tensor, *state: Tensor, **named: Tensor) -> Any:
            site.begin(input_)
            result = type(module).forward(module, input_, *state, **named)
            site.end([getattr(module, name) for name in states])
            return result

        def mem_reset(mem: Tensor) -> Tensor:
            spikes = site.resetting
            if delayed and spikes is not None and spikes.shape == mem.shape:
                return as_snntorch(spikes)
            above = as_snntorch((mem - module.threshold > 0).to(mem.dtype))
            return above if delayed or spikes is None else above * spikes.detach()

        return {"forward": forward, "spike_grad": lambda drive: as_snntorch(site.fire(drive)), "mem_reset": mem_reset}


class Sequence(StepNeuron):
    """A neuron of snnTorch that runs all time steps in one call."""

    whole = True

    @property
    def threshold(self) -> Tensor:
        return self.module.threshold

    def patches(self, site: Step) -> dict[str, Any]:
        def forward(input_: Tensor) -> Any:
            site.begin(input_)
            result = type(self.module).forward(self.module, input_)
            site.end([])
            return result

        return {"forward": forward, "spike_grad": lambda drive: as_snntorch(site.fire(drive))}


def as_snntorch(spikes: Tensor) -> Tensor:
    """Returns spikes as snnTorch does: under autocast in float32, which makes the membranes float32 too."""
    return widened(spikes) if torch.is_autocast_enabled(spikes.device.type) else spikes


def adapt(module: nn.Module) -> StepNeuron | str | None:
    """Returns the module as a neuron, the reason why it cannot be trained, or None if it does not spike."""
    kind: Any = type(module)
    derived = any(base in STATES for base in kind.__mro__) and kind.fire is snntorch.SpikingNeuron.fire
    if kind in STATES or (derived and not kind.__module__.startswith("snntorch")):
        return Neuron(module)
    if type(module) in WHOLE:
        return Sequence(module) if getattr(module, "output", True) else None  # output=False: it does not fire
    if isinstance(module, snntorch.SpikingNeuron):
        return f"this class is not supported; use {', '.join(kind.__name__ for kind in STATES)}"
    return None


ADAPTER = Adapter(adapt)
