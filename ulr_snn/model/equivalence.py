"""Comparisons of neurons and chains of `ulr_snn` with the recorded modules whose place they take."""

import torch
from torch import Tensor, nn

from ulr_snn.adapters import StepNeuron
from ulr_snn.model.call import model_outputs, no_side_effects
from ulr_snn.model.chain import Chain, NoChain
from ulr_snn.model.neurons import LIF
from ulr_snn.model.recording import Link
from ulr_snn.noise.firing import Logistic
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.sites.binding import bind

Equal = tuple[list[nn.Module], LIF]  # what the current passes first, and a neuron of `ulr_snn`

TRIAL = 24  # time steps of random currents on which two neurons are compared


def equations(neuron: StepNeuron, link: Link, features: torch.Size, like: Tensor) -> Equal:
    """Returns a neuron of `ulr_snn` with the equations of this one, and the modules that its current passes before.
    Raises NoChain unless both neurons fire alike on the recorded currents and on random ones."""
    found = neuron.ours(like)
    if isinstance(found, str):
        raise NoChain(f"{link.name} ({type(link.module).__name__}): {found}")
    entry, ours = found
    size = float(neuron.threshold.detach().abs().mean())
    generator = torch.Generator().manual_seed(0)
    random = 2 * size * torch.randn(TRIAL, 2, *features, generator=generator).to(like)
    alone = bind(link.module, NoiseLevel(Logistic()), steps=TRIAL, layers=[(link.name, neuron)])
    with no_side_effects(link.module), torch.no_grad(), alone:
        theirs = model_outputs(link.module, random, link.mode == "step")
    steps = (len(like), like.shape[1])
    recorded = [link.sequence(gave).reshape(*steps, *features) for gave in (False, True)]
    for current, spikes in ((random, theirs), recorded):
        if not fires_alike(entry, ours, current, spikes, size):
            raise NoChain(f"{link.name} ({type(link.module).__name__}) fires otherwise than {ours}")
    return entry, ours


@torch.no_grad()
def fires_alike(entry: list[nn.Module], ours: LIF, current: Tensor, spikes: Tensor, size: float) -> bool:
    """Returns whether our neuron, given the earlier spikes, fires each next one, up to rounding."""
    if spikes.shape != current.shape:
        return False
    drive = ours.fired(through(entry, current), known=spikes)[1]
    near = 1e3 * torch.finfo(drive.dtype).eps * (drive.abs().amax() + size)
    return bool((((drive > 0).to(spikes) == spikes) | (drive.abs() <= near)).all())


@torch.no_grad()
def through(modules: list[nn.Module], x: Tensor) -> Tensor:
    """Applies modules one after another."""
    for module in modules:
        x = module(x)
    return x


@torch.no_grad()
def check_numbers(chain: Chain, x: Tensor, expected: list[Tensor], fired: list[Tensor]) -> None:
    """Raises NoChain unless the chain has the expected currents and outputs, given the spikes that were fired."""
    relative, absolute = (1e-3, 1e-4) if x.dtype != torch.float64 else (1e-9, 1e-9)
    numbers, spikes = iter(expected), iter(fired)

    def check(found: Tensor) -> None:
        number = next(numbers)
        if found.shape != number.shape or not torch.allclose(found, number, relative, absolute):
            raise NoChain("the chain gives other numbers than the model")

    for stage in chain.stages:
        if isinstance(stage, LIF):
            check(x)
            x = next(spikes).reshape(x.shape)
        else:
            x = stage(x)
    check(x)
