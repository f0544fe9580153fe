"""Firing sites: find them in a model, bind them, let them go again."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.errors import UsageError
from ulr_snn.neurons import SpikingNeuron, Timed, heaviside, step_mask
from ulr_snn.noise import Firing, Noise, NoiseLevel


@dataclass
class Record:
    """What one forward pass leaves at one site. All [T, B, ...]; B counts the rows of the pass (copies included)."""

    site: str
    neuron: SpikingNeuron
    current: Tensor
    scale: Tensor
    x: Tensor  # standardised drive, differentiable in current and parameters with the spikes held fixed
    spikes: Tensor  # a leaf: the path from spikes to the loss starts here
    firing: Firing
    mask: Tensor | None
    fed_back: Tensor | None  # recurrent current, of a layer that has one

    def _on_own_steps(self, value: Tensor) -> Tensor:
        return value if self.mask is None else value * self.mask

    def own_steps(self) -> Tensor:
        """[T, B] bool: which steps are no padding."""
        if self.mask is None:
            return torch.ones(self.spikes.shape[:2], dtype=torch.bool, device=self.spikes.device)
        return self.mask.flatten(1).bool()

    def innovation(self) -> Tensor:
        """ε = s - p."""
        return self._on_own_steps(self.spikes.detach() - self.firing.probability(self.x.detach()))

    def membrane(self) -> Tensor:
        """u."""
        return self.x.detach() * self.scale + self.neuron.threshold.detach()

    @cached_property
    def slope(self) -> Tensor:
        """p' = ∂p/∂x; used by the credit of the reset and by the formula."""
        return self._on_own_steps(self.firing.slope(self.x.detach()))

    def score(self) -> Tensor:
        """δ = ∂ log P(s) / ∂x."""
        return self._on_own_steps(self.firing.score(self.spikes.detach(), self.x.detach()))


@dataclass
class Site:
    """The firing site of one neuron layer. Stochastic where `noise` is given, deterministic otherwise."""

    name: str
    index: int
    level: NoiseLevel
    noise: Noise | None
    records: list[Record]  # of all sites, in the order in which they ran
    calls: int = 0

    def fire_sequence(self, neuron: SpikingNeuron, current: Tensor) -> Tensor:
        """Runs the neuron over time, drawing its spikes once; current [T, B, ...] -> spikes [T, B, ...]."""
        mask = None if neuron.lengths is None else step_mask(neuron.lengths, current)
        # A module called twice in one forward pass is two sites, with noise and feedback of their own.
        call, self.calls = self.calls, self.calls + 1
        name = self.name if call == 0 else f"{self.name}#{call + 1}"
        draw = heaviside
        if self.noise is not None:
            scale = self.level.scale(name, neuron.threshold, lambda: _spread(neuron, current, mask))
            draw = self._drawer(current, scale.detach(), call)
        fire = draw if mask is None else lambda t, drive: draw(t, drive) * mask[t]
        with torch.no_grad():
            spikes, drive, fed_back = neuron.run(current, fire)
        if self.noise is None:
            return spikes
        x = neuron.drive_at(current, spikes, drive, fed_back) / scale
        record = Record(
            name,
            neuron,
            current.detach(),
            scale.detach(),
            x,
            spikes.requires_grad_(),
            self.level.firing,
            mask,
            fed_back,
        )
        self.records.append(record)
        return record.spikes

    def _drawer(self, current: Tensor, scale: Tensor, call: int):
        block = max(1, (1 << 20) // max(1, current[0].numel()))  # steps of noise held at a time
        uniforms: dict[int, Tensor] = {}

        def draw(t: int, drive: Tensor) -> Tensor:
            start = t - t % block
            if start not in uniforms:
                uniforms.clear()
                steps = min(block, len(current) - start)
                uniforms[start] = self.noise.uniform(
                    self.index + (call << 20), start, steps, current.shape[2:], current.dtype
                )
            return (uniforms[start][t - start] < self.level.firing.probability(drive / scale)).to(drive.dtype)

        return draw


@dataclass
class Replay:
    """Fires what was recorded, whatever comes in, and keeps what came in."""

    records: list[Record]
    currents: dict[str, Tensor]

    def fire_sequence(self, neuron: SpikingNeuron, current: Tensor) -> Tensor:
        record = self.records[len(self.currents)]
        self.currents[record.site] = current.detach()
        return record.spikes.detach()


def _spread(neuron: SpikingNeuron, current: Tensor, mask: Tensor | None) -> float:
    """Standard deviation of the membranes that the current would charge if no neuron fired, padding left out."""
    with torch.no_grad():
        membrane = neuron.run(current, lambda t, drive: torch.zeros_like(drive))[1] + neuron.threshold
        if mask is not None:
            membrane = membrane[mask.bool().expand_as(membrane)]
        return membrane.std(correction=0).item()


def spiking_layers(model: nn.Module) -> list[tuple[str, SpikingNeuron]]:
    """The model's spiking layers by name, in module order. Raises UsageError where there is none."""
    found = [(name or "model", module) for name, module in model.named_modules() if isinstance(module, SpikingNeuron)]
    if not found:
        raise UsageError(
            f"{type(model).__name__} has no spiking layer that ulr_snn knows; use ulr_snn.LIF or ulr_snn.RecurrentLIF"
        )
    return found


@contextmanager
def bind(
    model: nn.Module, level: NoiseLevel, noise: Noise | None = None, lengths: Tensor | None = None
) -> Iterator[list[Record]]:
    """Binds a firing site to every spiking layer, and the lengths [B] to every module that runs over time. Gives
    the list that their records go to."""
    records: list[Record] = []
    sites = [Site(name, index, level, noise, records) for index, (name, _) in enumerate(spiking_layers(model))]
    with bind_sites(model, sites, lengths):
        yield records


@contextmanager
def bind_sites(model: nn.Module, sites: Sequence[Any], lengths: Tensor | None) -> Iterator[None]:
    """For a while, gives each spiking layer its site, one with `fire_sequence(neuron, current)`, and lets go again."""
    layers = [neuron for _, neuron in spiking_layers(model)]
    timed = [module for module in model.modules() if isinstance(module, Timed)]
    if any(neuron.site is not None for neuron in layers):
        raise UsageError(f"{type(model).__name__} is already bound; leave the other attach or evaluate first")
    try:
        for site, neuron in zip(sites, layers, strict=True):
            neuron.site = site
        for module in timed:
            module.lengths = lengths
        yield
    finally:
        for module in timed:
            module.__dict__.pop("site", None)
            module.__dict__.pop("lengths", None)
