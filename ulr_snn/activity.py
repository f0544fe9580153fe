"""Activity of a forward pass: spikes, and synaptic operations as NeuroBench counts them, per sample and differentiable
in the spikes."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ulr_snn.neurons import SpikingNeuron
from ulr_snn.sites import Layers

CONNECTIONS = (nn.Linear, _ConvNd)


class Activity(dict[str, Tensor]):
    """ "spikes" and "operations", each [rows], of what ran inside `counting`. steps, rows: of the pass."""

    def __init__(self, steps: int, rows: int) -> None:
        super().__init__()
        self.steps, self.rows = steps, rows

    def add(self, name: str, sequence: Tensor) -> None:
        """Adds the sum of a tensor [T, rows, ...], [T * rows, ...] or [rows, ...] to each row's."""
        if sequence.shape[:2] == (self.steps, self.rows):
            sequence = sequence.transpose(0, 1)
        elif len(sequence) == self.steps * self.rows:
            sequence = sequence.unflatten(0, (self.steps, self.rows)).transpose(0, 1)
        count = sequence.reshape(self.rows, -1).sum(1)
        self[name] = self[name] + count if name in self else count


@contextmanager
def counting(model: nn.Module, layers: Layers, counts: Collection[str], steps: int, rows: int) -> Iterator[Activity]:
    """Counts what a pass of `rows` samples over `steps` time steps does. counts: of "spikes" and "operations"; what is
    not asked for may be missing."""
    found = Activity(steps, rows)
    if not counts:
        yield found
        return
    neurons = [neuron if isinstance(neuron, SpikingNeuron) else neuron.module for _, neuron in layers]
    fan_outs: dict[tuple[int, torch.Size], Tensor | None] = {}

    def spikes(module: nn.Module, _: Any, output: Any) -> None:
        fired = output[0] if isinstance(output, tuple | list) else output
        found.add("spikes", fired)
        recurrent = getattr(module, "recurrent", None) if isinstance(module, SpikingNeuron) else None
        if recurrent is not None and "operations" in counts:
            found.add("operations", fired * recurrent.out_features)

    def operations(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        key = (id(module), inputs[0].shape[1:])
        if key not in fan_outs:
            fan_outs[key] = None  # meanwhile: it calls the module, and so this, again
            fan_outs[key] = fan_out(module, inputs[0])
        if fan_outs[key] is not None:
            found.add("operations", inputs[0] * fan_outs[key])

    with ExitStack() as stack:
        for neuron in neurons:
            stack.callback(neuron.register_forward_hook(spikes).remove)
        inside = {id(m) for n in neurons if isinstance(n, SpikingNeuron) for m in n.modules()}
        for module in model.modules() if "operations" in counts else ():
            if isinstance(module, CONNECTIONS) and id(module) not in inside:
                stack.callback(module.register_forward_pre_hook(operations).remove)
        yield found


def fan_out(module: nn.Module, inputs: Tensor) -> Tensor:
    """How many outputs each input of a linear or convolutional module is connected to, in the shape of one row."""
    ones = {name: torch.full_like(q, float(name == "weight")) for name, q in module.named_parameters()}
    row = torch.zeros_like(inputs[:1], requires_grad=True)
    with torch.enable_grad():
        reached = torch.func.functional_call(module, ones, row).sum()
    return torch.autograd.grad(reached, row)[0][0]
