"""Bound models: which code runs, which layers get noise, and how the model is called. All parts run models by them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.adapters import BlackBox, StepNeuron
from ulr_snn.errors import UsageError
from ulr_snn.kernels.layout import Views, channels_last, free_layout, laid
from ulr_snn.kernels.pool import in_step
from ulr_snn.kernels.walk import modules_in
from ulr_snn.model.batch import Batch
from ulr_snn.model.call import Call, copied, no_side_effects
from ulr_snn.model.chain import Chain, NoChain, hooked
from ulr_snn.model.discovery import find_layers
from ulr_snn.model.events import Events
from ulr_snn.model.finding import OF_SHAPES, STEPS, few, find_call
from ulr_snn.model.habits import options
from ulr_snn.model.mode import mode_of
from ulr_snn.model.neurons import SpikingNeuron, TimeAverage
from ulr_snn.model.recognition import recognise
from ulr_snn.model.trees import tensors
from ulr_snn.noise.firing import Logistic
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.noise.random import Noise
from ulr_snn.sites.binding import Layers, bind, spiking_layers
from ulr_snn.sites.records import InPlaceGuard, Links, Record

PADDING = "leaves padding out"  # a finding about a model


@dataclass(frozen=True)
class BoundModel:
    """A model with its noisy layers and its way of being called. model: the module that runs, the user's model or a
    chain in its place. call: how this module is called. seen: how the user's model is called. steps: time steps of a
    pass over a static input, else None. layers: the layers that get noise, by name. notes: a line for every other
    module that cuts the graph. why: the reason why no chain runs. views: the user's code needs pictures with channels
    first. findings: what users have found out about it."""

    model: nn.Module
    call: Call
    seen: Call
    steps: int | None
    layers: Layers
    notes: tuple[str, ...] = ()
    why: str = ""
    views: bool = False
    findings: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls, model: nn.Module, batch: Batch, noise: Mapping[str, Any], own_code: bool = False, plain: bool = True
    ) -> "BoundModel":
        """Binds a model to batches like this one. noise: see `ULR`; own_code: no chain is looked for; plain: see
        `find_layers`."""
        running, why = model, ""
        notes: list[str] = []
        with Views(model) as views:
            seen, steps = find_call(model, batch)
        batch = batch.over(steps)
        try:
            chain = None if own_code else recognise(model, seen, batch.frames, batch.dtype, noise, plain=plain)
            # Operations of recurrent weights, and of modules behind a chain, are counted in the model's own modules.
            counted = "operations" in batch.objective.counts
            if chain is not None and counted and (chain.recurs or chain.tail is not None):
                raise NoChain("it counts operations of recurrent weights, or behind a chain")
            running = model if chain is None else chain
        except NoChain as error:
            why = str(error)
        call = seen if running is model else Call(view=seen.view.time_first)
        layers = find_layers(running, lambda: batch.x, call, noise, notes, plain)
        return cls(running, call, seen, steps if batch.static else None, layers, tuple(notes), why, views.found)

    def adapted(self, batch: Batch) -> Batch:
        """Returns a batch as the model sees it: its objective and targets fit the outputs, and a static input is
        repeated. Raises UsageError if they do not fit."""
        call = self.seen
        if call.count > 1 and call.interface.output is None and not all(x.reads_one for x in batch.objective.brought):
            raise UsageError(
                f"the model returns {call.count} outputs, and a loss of your own could read any; choose by output=, as "
                "output=0 for the first or output='all'"
            )
        if batch.lengths is not None and not call.keeps_time:
            raise UsageError(
                "the model runs over other time steps than those of the events, so that lengths cannot be kept; leave "
                "lengths out"
            )
        if batch.lengths is not None and not self._leaves_padding_out(batch):
            raise UsageError(
                "the model reduces its outputs over time itself, padding included, so that lengths cannot be kept; "
                "return outputs [T, B, C], reduce them by TimeAverage, or leave lengths out"
            )
        return batch.over(self.steps or batch.steps).seen_by(call.view)

    def _leaves_padding_out(self, batch: Batch) -> bool:
        """Returns whether outputs without a time axis leave padding out. They are tried, once: the outputs of half of
        the time steps must be the same with the other half as padding. A model that takes no other number of time
        steps is taken to leave padding out if it has a `TimeAverage`."""
        reduced = [i for i, slot in enumerate(self.call.view.slots) if not slot.over_time]
        if not reduced:
            return True
        if not any(isinstance(module, TimeAverage) for module in self.model.modules()):
            return False
        if PADDING in self.findings:
            return bool(self.findings[PADDING])
        steps = min(STEPS, batch.steps)
        half = steps // 2
        x, first = few(batch, steps, 3), few(batch, half, 3)
        if not isinstance(x, Events):  # of events, no frames are made
            x, first = (torch.cat([part, 10 * (1 + part.abs())], 1) for part in (x, first))  # so that neurons fire
        level, lengths = NoiseLevel(Logistic()), torch.full((x.shape[1],), half, device=x.device)
        found = []
        try:
            with mode_of(self.model, training=False), no_side_effects(self.model), torch.no_grad():
                for events, own in ((x, lengths), (first, None)):
                    whole = self.call.view.external(self.outputs(copied(events), level, lengths=own)[0])
                    found.append(torch.cat([tensors(whole)[i].flatten() for i in reduced]))
            error, scale = (found[0] - found[1]).abs().max(), found[1].abs().max()
            self.findings[PADDING] = not bool(error > scale * torch.finfo(scale.dtype).eps ** 0.5)
        except OF_SHAPES:
            self.findings[PADDING] = True
        return bool(self.findings[PADDING])

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
            outputs = self.called(x)
        return outputs, records

    def called(self, x: Tensor) -> Tensor:
        """Calls the model, whose sites are bound, with x [T, B, ...]. Within a step, pictures may have channels last,
        but not the outputs, which users' losses read."""
        with free_layout(in_step() and (isinstance(self.model, Chain) or not self.views)):
            outputs = self.call.outputs(self.model, x)
        return laid(outputs, last=False) if channels_last(outputs) else outputs

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
            rest = f", then the model's own code ({self.model.why})" if self.model.tail is not None else ""
            return [f"engine: runs as a chain {' -> '.join(self.model.names)}, neurons as scans over time{rest}"]
        return [f"engine: the model's own code, as it is ({self.why})"] if self.why else []


class Binder:
    """Binds a model to batches, and keeps the `BoundModel` until something that it depends on changes."""

    def __init__(self, model: nn.Module, noise: Mapping[str, Any], own_code: bool = False, plain: bool = True) -> None:
        self.model, self.noise, self.own_code, self.plain = model, noise, own_code, plain
        self._seen: Any = None
        self._bound: BoundModel | None = None

    def bound(self, batch: Batch) -> tuple[BoundModel, Batch]:
        """Returns the model bound to batches like this one, the same object as long as nothing has changed, and the
        batch as the model sees it."""
        seen = self._look(batch)
        if self._bound is None or seen != self._seen:
            found = BoundModel.of(self.model, batch, self.noise, self.own_code, self.plain)
            if not found.seen.keeps_time and any(getattr(noise, "per_sample", False) for noise in self.noise.values()):
                raise UsageError(
                    "WeightNoise(per_sample=True) needs layers and outputs with the events' time steps; use "
                    "per_sample=False"
                )
            attributes = self._seen is not None and self._seen[1:] == seen[1:]  # nothing else has changed
            if self._bound is None or not (attributes and same_chain(self._bound.model, found.model)):
                self._bound = found
            self._seen = self._look(batch)
        return self._bound, self._bound.adapted(batch)

    def _look(self, batch: Batch) -> Any:
        """Returns everything that the bound model depends on, other than parameters and buffers. A chain also depends
        on plain attributes that choose what the model's own code does."""
        parts = modules_in(self.model)
        modules = [(id(m), m.training, hooked(m)) for m in parts]
        # Functions that these lie before may fire.
        trained = [q.requires_grad for m in parts for q in m._parameters.values() if q is not None]
        neurons = [neuron for _, neuron in spiking_layers(self.model)]
        own = [neuron.options() for neuron in neurons if isinstance(neuron, StepNeuron)]
        running = None if self._bound is None else self._bound.model
        chosen = options(self.model) if isinstance(running, Chain) else {}
        counted = "operations" in batch.objective.counts
        given = batch.interface, batch.inputs, batch.static and batch.frames.shape[2:]
        return chosen, modules, trained, own, batch.frames.device, batch.dtype, counted, self.own_code, given


def same_chain(one: nn.Module, other: nn.Module) -> bool:
    """Returns whether two modules that run in a model's place are chains of the same stages."""
    if not (isinstance(one, Chain) and isinstance(other, Chain)) or (one.tail is None) != (other.tail is None):
        return False
    return one.names == other.names and [repr(stage) for stage in one.stages] == [repr(s) for s in other.stages]
