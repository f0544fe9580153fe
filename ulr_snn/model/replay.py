"""Replays of a pass, in which layers fire as before. They show what depends on events and on spikes."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ulr_snn.kernels import ranks
from ulr_snn.model.batch import Batch
from ulr_snn.model.call import copied
from ulr_snn.model.forward import Forward
from ulr_snn.model.neurons import SpikingNeuron
from ulr_snn.model.passes import Pass
from ulr_snn.sites.binding import bind_sites, call_name
from ulr_snn.sites.records import Record


def driven_by_events(forward: Forward, batch: Batch, p: Pass) -> set[str]:
    """Returns the sites whose input current changes with the events while all spikes stay as in the pass p of one copy.
    The events are exchanged for the batch's own events at other times, in other samples."""
    forward.log.extra += 1
    others = batch.x.roll((1, 1), (0, 1))
    sites = [r.site for r in p.records]
    if ranks.everywhere(torch.equal(others, batch.x))[0]:
        return set(sites)  # equal events tell nothing
    changed = replayed(forward, batch, p, others)[1]
    found = ranks.anywhere(*(site in changed for site in sites))
    return {site for site, driven in zip(sites, found, strict=True) if driven}


def sites_without_effect(forward: Forward, batch: Batch, p: Pass, sites: Collection[str]) -> set[str]:
    """Returns the sites on whose spikes neither the outputs nor the current of another layer depend. A site's spikes
    are all flipped in a replay of the pass p of one copy, in which all other spikes stay."""
    found = set()
    for site in sites:
        forward.log.extra += 1
        outputs, changed = replayed(forward, batch, p, copied(batch.x), flipped=site)
        if ranks.everywhere(torch.equal(outputs, p.outputs) and changed <= {site})[0]:
            found.add(site)
    return found


@torch.no_grad()
def replayed(forward: Forward, batch: Batch, p: Pass, x: Tensor, flipped: str | None = None) -> tuple[Tensor, set[str]]:
    """Returns the outputs for events x with the spikes of the pass p, and the sites whose input current changes.
    flipped: a site whose spikes are flipped."""
    records, bound = {r.site: r for r in p.records}, forward.bound
    currents: dict[str, Tensor] = {}
    replays = [Replay(name, records, currents, batch.lengths, flipped) for name, _ in bound.layers]
    with forward.side_effects_once(), bind_sites(bound.model, replays, batch.lengths, bound.layers):
        outputs = bound.called(x)
    return outputs, {r.site for r in p.records if r.current is None or not torch.equal(currents[r.site], r.current)}


@dataclass
class Replay:
    """A site that fires the recorded spikes of a layer, whatever its current, and keeps the current. flipped: a
    site that fires the opposite spikes, but resets by the recorded ones, where the layer tells them apart."""

    name: str
    records: dict[str, Record]
    currents: dict[str, Tensor]  # of all layers, by site
    lengths: Tensor | None = None  # steps of each row that are no padding, for scans
    flipped: str | None = None
    settles = False
    calls: int = 0
    inputs: list[Tensor] = field(default_factory=list)
    resetting: Tensor | None = None

    def fire_sequence(self, neuron: SpikingNeuron, current: Tensor) -> Tensor:
        self.calls += 1
        site = call_name(self.name, self.calls)
        self.currents[site] = current.detach()
        return self._fired(site, self.records[site].spikes)

    def _fired(self, site: str, spikes: Tensor) -> Tensor:
        spikes = spikes.detach()
        return 1 - spikes if site == self.flipped else spikes.clone()  # a model may change them in place

    def begin(self, current: Tensor) -> None:
        self.inputs.append(current.detach())

    def disturb(self, current: Tensor) -> Tensor:
        self.begin(current)
        return current.detach()

    def release(self, spikes: Tensor) -> Tensor:
        fired = self.fire(spikes)
        self.end([])
        return fired

    @property
    def steps(self) -> int:
        """The number of calls of a layer that runs step by step."""
        return len(self.records[self.name].spikes)

    def fire(self, drive: Tensor) -> Tensor:
        record = self.records[self.name]
        self.resetting = record.spikes if record.whole else record.spikes[len(self.inputs) - 1]
        return self._fired(self.name, self.resetting)

    def end(self, states: list[Any]) -> None:
        record = self.records[self.name]
        if record.whole:
            self.currents[self.name] = self.inputs[0]
        elif len(self.inputs) == len(record.spikes):
            self.currents[self.name] = torch.stack(self.inputs)
