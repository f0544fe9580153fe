"""Replays of a pass, in which layers fire what they fired before: what depends on the events, and on which spikes."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ulr_snn.model.batch import Batch
from ulr_snn.model.call import model_outputs
from ulr_snn.model.forward import Forward
from ulr_snn.model.neurons import SpikingNeuron
from ulr_snn.model.passes import Pass
from ulr_snn.sites.binding import bind_sites, call_name
from ulr_snn.sites.records import Record


def driven_by_events(forward: Forward, batch: Batch, p: Pass) -> set[str]:
    """Sites whose input current changes when other events come in while all spikes stay as in the pass p of one copy.
    The other events are the batch's own at other times, in other samples."""
    forward.log.extra += 1
    others = batch.x.roll((1, 1), (0, 1))
    if torch.equal(others, batch.x):
        return {r.site for r in p.records}  # nothing to tell by
    _, currents = replayed(forward, batch, p, others)
    return {r.site for r in p.records if not torch.equal(currents[r.site], r.current)}


def read_by_nobody(forward: Forward, batch: Batch, p: Pass, sites: Collection[str]) -> set[str]:
    """Those of these sites whose spikes neither the outputs nor the input current of another layer depend on: all of
    them are flipped in a replay of the pass p of one copy, in which all other spikes stay."""
    found = set()
    for site in sites:
        forward.log.extra += 1
        outputs, currents = replayed(forward, batch, p, batch.x.clone(), flipped=site)
        others = (r for r in p.records if r.site != site)
        if torch.equal(outputs, p.outputs) and all(torch.equal(currents[r.site], r.current) for r in others):
            found.add(site)
    return found


@torch.no_grad()
def replayed(
    forward: Forward, batch: Batch, p: Pass, x: Tensor, flipped: str | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs and the input current of each site, of events x with the spikes of the pass p; those of one site
    flipped."""
    records, currents, bound = {r.site: r for r in p.records}, {}, forward.bound
    replays = [Replay(name, records, currents, batch.lengths, flipped=name == flipped) for name, _ in bound.layers]
    with forward.side_effects_once(), bind_sites(bound.model, replays, batch.lengths, bound.layers):
        outputs = model_outputs(bound.model, x, bound.by_step)
    return outputs, currents


@dataclass
class Replay:
    """Fires what a layer's records hold, whatever comes in, and keeps what came in. flipped: it fires the opposite, but
    for its own reset, where that is told apart."""

    name: str
    records: dict[str, Record]
    currents: dict[str, Tensor]  # of all layers, by site
    lengths: Tensor | None = None
    calls: int = 0
    inputs: list[Tensor] = field(default_factory=list)
    resetting: Tensor | None = None
    flipped: bool = False

    def fire_sequence(self, neuron: SpikingNeuron, current: Tensor) -> Tensor:
        self.calls += 1
        site = call_name(self.name, self.calls)
        self.currents[site] = current.detach()
        return self._fired(self.records[site].spikes)

    def _fired(self, spikes: Tensor) -> Tensor:
        spikes = spikes.detach()
        return 1 - spikes if self.flipped else spikes.clone()  # a model may change them in place

    def begin(self, current: Tensor) -> None:
        self.inputs.append(current.detach())

    def disturb(self, current: Tensor) -> Tensor:
        self.begin(current)
        return current.detach()

    def release(self, spikes: Tensor) -> Tensor:
        fired = self.fire(spikes)
        self.end([])
        return fired

    def fire(self, drive: Tensor) -> Tensor:
        record = self.records[self.name]
        self.resetting = record.spikes if record.whole else record.spikes[len(self.inputs) - 1]
        return self._fired(self.resetting)

    def end(self, states: list[Any]) -> None:
        record = self.records[self.name]
        if record.whole:
            self.currents[self.name] = self.inputs[0]
        elif len(self.inputs) == len(record.spikes):
            self.currents[self.name] = torch.stack(self.inputs)
