"""A chunk of time: the sites of its layers, how layers stand before and after it, what it leaves for credit."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ulr_snn.kernels.bits import pack_bits, unpack_bits
from ulr_snn.kernels.state import State
from ulr_snn.model.neurons import LIF, step_mask
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.noise.random import Drawer, Noise
from ulr_snn.noise.secant import farthest
from ulr_snn.sites.binding import record_of
from ulr_snn.sites.records import Record


@dataclass
class ChunkSite:
    """The firing site of a layer over a chunk of time from step `first` on. records: gets its record, if there is a
    list; watched: whether it keeps what it has seen. Afterwards
    `state` is that of its last step."""

    name: str
    index: int
    level: NoiseLevel
    noise: Noise
    first: int
    state: State | None
    records: list[Record] | None
    watched: bool = False
    before: Tensor | None = None  # spikes of the step before
    current: Tensor | None = None
    spikes: Tensor | None = None
    fed_back: Tensor | None = None
    farthest: Tensor | None = None  # distance of a membrane to its threshold

    def fire_sequence(self, neuron: LIF, current: Tensor) -> Tensor:
        scale = self.level.scale(self.name, neuron.threshold, None).detach()
        drawer = Drawer(self.noise, self.level.firing, self.index, len(current), scale, self.first)
        if self.state is None:
            self.state = State(*torch.zeros(2, *current.shape[1:], dtype=current.dtype, device=current.device))
        before = self.state.spikes.to(current.dtype)
        self.state = State(self.state.membrane.clone(), before.clone())
        with torch.no_grad():
            fired = neuron.fired(current, drawer, self.state)
        if self.watched:
            mask = None if neuron.lengths is None else step_mask(neuron.lengths, fired[1])
            self.farthest = farthest(fired[1], mask) * scale.mean()
            self.before, self.current, (self.spikes, _, self.fed_back) = before, current.detach(), fired
        if self.records is not None:
            record = record_of(self.name, neuron, current, scale, fired, self.level, before)
            self.records.append(replace(record, current=None, fed_back=None))
            record.spikes.requires_grad_()
        return fired[0]


@dataclass(frozen=True)
class LayerStates:
    """The states of the layers between two time steps. states: by site, their spikes as bits; membranes: of the
    readouts; empty at the start."""

    states: dict[str, State] = field(default_factory=dict)
    membranes: list[Tensor | None] = field(default_factory=list)

    @classmethod
    def of(cls, sites: dict[str, ChunkSite], membranes: list[Tensor]) -> "LayerStates":
        """The states of sites that a chunk has run through."""
        states = {name: site.state for name, site in sites.items()}
        return cls({n: State(s.membrane, pack_bits(s.spikes.flatten(1))) for n, s in states.items()}, membranes)

    def state(self, name: str, dtype: torch.dtype) -> State | None:
        """Of a site, with spikes [B, ...] of that type; None at the start."""
        kept = self.states.get(name)
        if kept is None:
            return None
        spikes = unpack_bits(kept.spikes, kept.membrane[0].numel(), dtype)
        return State(kept.membrane, spikes.view(kept.membrane.shape))


@dataclass(frozen=True)
class Chunk:
    """What a chunk of time leaves for the credit, as a `Pass` does."""

    ends: list[tuple[Tensor, Tensor]]
    records: list[Record]
    copies: list[int] = field(default_factory=lambda: [0])
    error: None = None
    linked: bool = False
