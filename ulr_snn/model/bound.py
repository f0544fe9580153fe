"""Bound models: which code runs, which layers get noise, and how the model is called. All parts run models by them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.adapters import BlackBox, StepNeuron
from ulr_snn.model.batch import Batch
from ulr_snn.model.call import model_outputs, no_side_effects, runs_by_step
from ulr_snn.model.chain import Chain, NoChain, hooked
from ulr_snn.model.discovery import find_layers
from ulr_snn.model.neurons import SpikingNeuron
from ulr_snn.model.recognition import recognise
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.noise.random import Noise
from ulr_snn.sites.binding import Layers, bind, spiking_layers
from ulr_snn.sites.records import InPlaceGuard, Links, Record


@dataclass(frozen=True)
class BoundModel:
    """A model with its noisy layers and its way of being called. model: the module that runs, the user's model or a
    chain in its place. by_step: the model takes one time step a call. layers: the layers that get noise, by name.
    notes: a line for every other module that cuts the graph. why: the reason why no chain runs. findings: what
    users have found out about it."""

    model: nn.Module
    by_step: bool
    layers: Layers
    notes: tuple[str, ...] = ()
    why: str = ""
    findings: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, model: nn.Module, batch: Batch, noise: Mapping[str, Any], own_code: bool = False) -> "BoundModel":
        """Binds a model to batches like this one. noise: see `ULR`; own_code: no chain is looked for."""
        running, why = model, ""
        notes: list[str] = []
        try:
            chain = None if own_code else recognise(model, batch.frames, batch.dtype, noise)
            # Operations of recurrent weights can be counted only in the model's own modules.
            if chain is not None and not ("operations" in batch.objective.counts and chain.recurs):
                running = chain
        except NoChain as error:
            why = str(error)
        by_step = runs_by_step(running, batch.first_samples(2))
        layers = find_layers(running, lambda: batch.x, by_step, noise, notes)
        return cls(running, by_step, layers, tuple(notes), why)

    def outputs(
        self,
        x: Tensor,
        level: NoiseLevel,
        noise: Noise | None = None,
        lengths: Tensor | None = None,
        links: Links | None = None,
        guard: InPlaceGuard | None = None,
    ) -> tuple[Tensor, list[Record]]:
        """Runs one pass over x [T, B, ...]. Returns the outputs and a record of each layer that drew spikes. Without
        noise, firing is deterministic. lengths, links, guard: see `bind`."""
        with bind(self.model, level, noise, lengths, len(x), self.layers, links, guard) as records:
            outputs = model_outputs(self.model, x, self.by_step)
        return outputs, records

    def measure_levels(self, level: NoiseLevel, run: Callable[[], Any]) -> int:
        """Runs passes until all layers run by their library's code have a noise level. Returns the number of passes."""
        names = [site for site, neuron in self.layers if not (isinstance(neuron, SpikingNeuron) or neuron.scans)]
        level.currents.update({site: neuron.noise for site, neuron in self.layers if isinstance(neuron, BlackBox)})
        passes = 0
        while unknown := [site for site in names if not (level.is_calibrated(site) or site in level.noiseless)]:
            known = len(level.starts)
            with no_side_effects(self.model), torch.no_grad():
                run()
            passes += 1
            if len(level.starts) == known:
                level.idle.update(unknown)  # these layers do not run
        return passes

    def describe(self) -> list[str]:
        """Describes which code runs, for `plan`. The list is empty for models of `ulr_snn`'s own neurons."""
        if isinstance(self.model, Chain):
            return [f"engine: runs as a chain {' -> '.join(self.model.names)}, neurons as scans over time"]
        return [f"engine: the model's own code, as it is ({self.why})"] if self.why else []


class Binder:
    """Binds a model to batches, and keeps the `BoundModel` until something that it depends on changes."""

    def __init__(self, model: nn.Module, noise: Mapping[str, Any], own_code: bool = False) -> None:
        self.model, self.noise, self.own_code = model, noise, own_code
        self._seen: Any = None
        self._bound: BoundModel | None = None

    def bound(self, batch: Batch) -> BoundModel:
        """Returns the model bound to batches like this one: the same object as long as nothing has changed."""
        seen = self._look(batch)
        if self._bound is None or seen != self._seen:
            self._seen, self._bound = seen, BoundModel.of(self.model, batch, self.noise, self.own_code)
        return self._bound

    def _look(self, batch: Batch) -> Any:
        """Returns everything that a bound model depends on, other than parameters and buffers."""
        modules = [(id(m), m.training, hooked(m)) for m in self.model.modules()]
        neurons = [neuron for _, neuron in spiking_layers(self.model)]
        options = [neuron.options() for neuron in neurons if isinstance(neuron, StepNeuron)]
        counted = "operations" in batch.objective.counts
        return modules, options, batch.frames.device, batch.dtype, counted, self.own_code
