"""The same networks in four libraries, for speed and memory: dense, recurrent, convolutional, and the single wide layer
of Open Neuromorphic's chart. All leak by beta, reset by subtraction, and read the mean activity out.

Every library gets the path it is fastest by: stateless layers on all time steps at once wherever it allows that.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ulr_snn import LIF, Fold, RecurrentLIF, TimeAverage

BETA = 0.9
CLASSES = 10


@dataclass(frozen=True)
class Case:
    """kind: "dense", "recurrent", "conv" or "wide" (one linear layer and its neurons). sample: shape of one time step
    of a sample. width: neurons of a hidden layer. density: of active inputs, where events are random."""

    name: str
    kind: str
    sample: tuple[int, ...]
    steps: int
    batch: int
    width: int
    density: float

    def at(self, **changes: int) -> "Case":
        return replace(self, **changes)

    @property
    def inputs(self) -> int:
        return math.prod(self.sample)


CASES = {
    case.name: case
    for case in (
        Case("dense", "dense", (2, 34, 34), 20, 64, 256, 0.02),
        Case("recurrent", "recurrent", (128,), 50, 64, 256, 0.05),
        Case("conv", "conv", (2, 34, 34), 20, 64, 128, 0.02),
        Case("published", "wide", (16_000,), 500, 16, 16_000, 0.01),
    )
}


def stateless(case: Case, flatten: Callable[[], nn.Module]) -> list[list[nn.Module]]:
    """What comes before each layer of neurons, and last the readout."""
    n = case.width
    readout = [nn.Linear(n, CLASSES)]
    if case.kind == "dense":
        return [[flatten(), nn.Linear(case.inputs, n)], [nn.Linear(n, n)], readout]
    if case.kind == "recurrent":
        return [[nn.Linear(case.inputs, n)], readout]
    if case.kind == "wide":
        return [[nn.Linear(case.inputs, n)], []]
    convolutions = nn.Conv2d(2, 12, 5, stride=2, padding=2), nn.Conv2d(12, 24, 3, stride=2, padding=1)
    return [[convolutions[0]], [convolutions[1]], [flatten(), nn.Linear(24 * 9 * 9, n)], readout]


def ours(case: Case, averaged: bool = True) -> nn.Module:
    """Our own neurons, for `ulr_snn.attach`. averaged: else its outputs are those of every time step."""
    parts = stateless(case, lambda: nn.Flatten(2))
    modules: list[nn.Module] = []
    for layer in parts[:-1]:
        modules += [Fold(m) if isinstance(m, nn.Conv2d) else m for m in layer]
        modules.append(RecurrentLIF(case.width, BETA) if case.kind == "recurrent" else LIF(BETA))
    return nn.Sequential(*modules, *[TimeAverage()] * averaged, *parts[-1])


class Folded(nn.Module):
    """[T, B, ...] -> logits [B, classes]: stateless layers on all time steps at once, neurons by a function of time."""

    def __init__(self, parts: list[list[nn.Module]], neurons: list[nn.Module], over_time: Callable) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(*part) for part in parts)
        self.neurons, self.over_time = nn.ModuleList(neurons), over_time

    def forward(self, x: Tensor) -> Tensor:
        for part, neuron in zip(self.parts, self.neurons, strict=False):
            x = self.over_time(neuron, part(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
        return self.parts[-1](x.mean(0))


def snntorch_net(case: Case) -> nn.Module:
    """Leaky and RLeaky; their own loop over time is all that they have."""
    import snntorch

    def over_time(neuron: nn.Module, current: Tensor) -> Tensor:
        if isinstance(neuron, snntorch.RLeaky):
            spike, membrane = neuron.init_rleaky()
            found = []
            for now in current:
                spike, membrane = neuron(now, spike, membrane)
                found.append(spike)
            return torch.stack(found)
        membrane, found = neuron.init_leaky(), []
        for now in current:
            spike, membrane = neuron(now, membrane)
            found.append(spike)
        return torch.stack(found)

    parts = stateless(case, nn.Flatten)
    recurrent = case.kind == "recurrent"
    neurons = [
        snntorch.RLeaky(BETA, linear_features=case.width) if recurrent else snntorch.Leaky(BETA) for _ in parts[:-1]
    ]
    return Folded(parts, neurons, over_time)


def snntorch_loop(case: Case) -> nn.Module:
    """As in snnTorch's tutorials: one loop over time, in which every layer takes a step."""
    import snntorch

    folded = snntorch_net(case)

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts, self.neurons = folded.parts, folded.neurons

        def forward(self, x: Tensor) -> Tensor:
            recurrent = isinstance(self.neurons[0], snntorch.RLeaky)
            states = [n.init_rleaky() if recurrent else (n.init_leaky(),) for n in self.neurons]
            found = []
            for spike in x:
                for i, (layer, neuron) in enumerate(zip(self.parts, self.neurons, strict=False)):
                    spike, membrane = neuron(layer(spike), *states[i])
                    states[i] = (spike, membrane) if recurrent else (membrane,)
                found.append(spike)
            return self.parts[-1](torch.stack(found).mean(0))

    return Loop()


def norse_net(case: Case) -> nn.Module:
    """LIFBox lifted over time, which like ours has no filter on its current; recurrent, LIFRecurrent."""
    import norse.torch as norse

    recurrent = case.kind == "recurrent"
    p = norse.LIFBoxParameters(tau_mem_inv=torch.as_tensor((1 - BETA) * 1000), v_th=torch.as_tensor(1.0))

    parts = stateless(case, nn.Flatten)
    if recurrent:  # which has the input weights inside
        parts[0] = []
    neurons = [
        norse.LIFRecurrent(case.inputs, case.width) if recurrent else norse.Lift(norse.LIFBoxCell(p))
        for _ in parts[:-1]
    ]
    return Folded(parts, neurons, lambda neuron, current: neuron(current)[0])


def spikingjelly_net(case: Case) -> nn.Module:
    """Multi-step LIFNode; recurrent, LinearRecurrentContainer."""
    from spikingjelly.activation_based import functional, layer, neuron

    def fire(step_mode: str) -> nn.Module:
        return neuron.LIFNode(
            tau=1 / (1 - BETA), decay_input=False, v_reset=None, detach_reset=True, step_mode=step_mode
        )

    def over_time(module: nn.Module, current: Tensor) -> Tensor:
        functional.reset_net(module)
        return module(current)

    parts = stateless(case, nn.Flatten)
    neurons = [fire("m") for _ in parts[:-1]]
    if case.kind == "recurrent":
        neurons = [layer.LinearRecurrentContainer(fire("s"), case.width, case.width, step_mode="m")]
    return Folded(parts, neurons, over_time)


def quiet(make: Callable[[Case], nn.Module]) -> Callable[[Case], nn.Module]:
    """The same without the warnings of a library's own imports."""

    def made(case: Case) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(case)

    return made


LOOPS = {"snntorch": quiet(snntorch_loop)}  # as its own tutorials write it
NETS = {"snntorch": quiet(snntorch_net), "norse": quiet(norse_net), "spikingjelly": quiet(spikingjelly_net)}
