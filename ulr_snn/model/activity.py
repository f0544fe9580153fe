"""Counts of spikes and synaptic operations (as in NeuroBench), per sample and differentiable in the spikes."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ulr_snn.model.neurons import SpikingNeuron
from ulr_snn.sites.binding import Layers, module_of, seeing_spikes

CONNECTIONS = (nn.Linear, _ConvNd)


@dataclass
class Sums:
    """Sums over features of a module's inputs or outputs, one for each call. steps: sums [rows], if the call may be one
    time step. whole: sums [T, rows], if it may be the whole sequence. The shape of a tensor may fit both."""

    steps: list[Tensor] = field(default_factory=list)
    whole: list[Tensor] = field(default_factory=list)


class Activity(dict[str, Tensor]):
    """The counts of a pass, "spikes" and "operations", each [rows]. They are complete when `counting` ends. of_modules:
    the same by (name, id of the module)."""

    def __init__(self, steps: int, rows: int, lengths: Tensor | None) -> None:
        super().__init__()
        self.size, self.rows, self.lengths = steps, rows, lengths
        self.sums: dict[tuple[str, int], Sums] = {}
        self.of_modules: dict[tuple[str, int], Tensor] = {}

    def see(self, name: str, module: nn.Module, sequence: Tensor) -> None:
        """Adds a tensor [T, rows, ...], [T * rows, ...] or [rows, ...] of a module."""
        sums = self.sums.setdefault((name, id(module)), Sums())
        if len(sequence) == self.rows:
            sums.steps.append(sequence.flatten(1).sum(1) if sequence.ndim > 1 else sequence)
        if sequence.ndim > 2 and sequence.shape[:2] == (self.size, self.rows):
            sums.whole.append(sequence.flatten(2).sum(2))
        elif len(sequence) == self.size * self.rows:
            sums.whole.append(sequence.unflatten(0, (self.size, self.rows)).flatten(2).sum(2))
        elif len(sequence) != self.rows and sequence.ndim > 2 and sequence.shape[1] == self.rows:
            sums.whole.append(sequence.flatten(2).sum(2))  # over other time steps than the events'

    def finish(self) -> None:
        """Sums the calls without padding. A module with as many calls as time steps ran one time step a call."""
        own = None
        if self.lengths is not None:
            own = torch.arange(self.size, device=self.lengths.device)[:, None] < self.lengths
        for (name, module), sums in self.sums.items():
            by_step = len(sums.steps) >= self.size > 1 or not sums.whole
            if by_step and len(sums.steps) == self.size:
                calls = [torch.stack(sums.steps)]  # [T, rows]
            else:
                calls = [call[None] for call in sums.steps] if by_step else sums.whole
            kept = [call * own if own is not None and len(call) == self.size else call for call in calls]
            if kept:
                counted = torch.cat(kept).sum(0)
                self.of_modules[name, module] = counted
                self[name] = self[name] + counted if name in self else counted


@contextmanager
def counting(
    model: nn.Module, layers: Layers, counts: Collection[str], steps: int, rows: int, lengths: Tensor | None = None
) -> Iterator[Activity]:
    """Counts the activity of a pass of `rows` samples over `steps` time steps. counts: any of "spikes" and
    "operations". lengths: [rows]; later steps are padding."""
    found = Activity(steps, rows, lengths)
    if not counts:
        yield found
        return
    fan_outs: dict[tuple[int, torch.Size], Tensor | None] = {}

    def spikes(_: str, module: nn.Module, fired: Tensor) -> None:
        if "spikes" in counts:
            found.see("spikes", module, fired)
        recurrent = getattr(module, "recurrent", None) if isinstance(module, SpikingNeuron) else None
        if recurrent is not None and "operations" in counts:
            found.see("operations", module, fired * recurrent.out_features)

    def operations(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        key = (id(module), inputs[0].shape[1:])
        if key not in fan_outs:
            fan_outs[key] = None  # `fan_out` calls the module, and thereby this hook, again
            fan_outs[key] = fan_out(module, inputs[0])
        fans = fan_outs[key]
        if fans is not None:
            found.see("operations", module, inputs[0] * fans)

    with seeing_spikes(layers, spikes), ExitStack() as stack:
        own = [module_of(neuron) for _, neuron in layers]
        inside = {id(m) for n in own if isinstance(n, SpikingNeuron) for m in n.modules()}
        for module in model.modules() if "operations" in counts else ():
            if isinstance(module, CONNECTIONS) and id(module) not in inside:
                stack.callback(module.register_forward_pre_hook(operations).remove)
        yield found
    found.finish()


def fan_out(module: nn.Module, inputs: Tensor) -> Tensor:
    """Counts the outputs connected to each input of a linear or convolutional module, in the shape of one row."""
    ones = {name: torch.full_like(q, float(name == "weight")) for name, q in module.named_parameters()}
    row = torch.zeros_like(inputs[:1], requires_grad=True)
    with torch.enable_grad():
        reached = torch.func.functional_call(module, ones, row).sum()
    return torch.autograd.grad(reached, row)[0][0]
