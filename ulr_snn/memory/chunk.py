"""A chunk of time: its firing sites, the layer states at its two ends, and what it leaves for credit assignment."""

from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class Fired:
    """The activity of a layer in a chunk.

    state: state after the last step; before: spikes of the step before the first; x: standardised drive;
    fed_back: recurrent current; scale: scale of the noise; mask: 0 on padding, or None.
    """

    state: State
    before: Tensor
    current: Tensor
    spikes: Tensor
    x: Tensor
    fed_back: Tensor | None
    scale: Tensor
    mask: Tensor | None

    @property
    def farthest(self) -> Tensor:
        """Largest distances of membranes below and above the threshold, [2]."""
        return farthest(self.x, self.mask) * self.scale.mean()


@dataclass
class ChunkSite:
    """The firing site of a layer over a chunk of time that begins at step `first`.

    state: state before the chunk, None at the start; fired: receives the layer's activity by its name;
    records: receives the layer's record, if there is a list.
    """

    name: str
    index: int
    level: NoiseLevel
    noise: Noise
    first: int
    state: State | None
    fired: dict[str, Fired]
    records: list[Record] | None = None

    def fire_sequence(self, neuron: LIF, current: Tensor) -> Tensor:
        """Runs the neuron over the chunk, from current [t, B, ...] to spikes [t, B, ...]."""
        scale = self.level.scale(self.name, neuron.threshold, not_measured).detach()
        drawer = Drawer(self.noise, self.level.firing, self.index, len(current), scale, self.first)
        if self.state is None:
            state = State(*torch.zeros(2, *current.shape[1:], dtype=current.dtype, device=current.device))
        else:
            state = State(self.state.membrane.clone(), self.state.spikes.to(current.dtype, copy=True))
        before = state.spikes.clone()
        with torch.no_grad():
            spikes, x, fed_back = fired = neuron.fired(current, drawer, state)
        mask = None if neuron.lengths is None else step_mask(neuron.lengths, x)
        self.fired[self.name] = Fired(state, before, current.detach(), spikes, x, fed_back, scale, mask)
        if self.records is not None:
            record = record_of(self.name, neuron, current, scale, fired, self.level, before)
            self.records.append(replace(record, current=None, fed_back=None))
            record.spikes.requires_grad_()
        return spikes


def not_measured() -> float:
    """Raises RuntimeError, because chunks run only when the noise level is known."""
    raise RuntimeError("a layer runs in a chunk of time before the level of its noise is known")


@dataclass(frozen=True)
class LayerStates:
    """The states of all layers between two time steps; empty at the start.

    states: states by site, with spikes as bits; membranes: membranes of the readouts.
    """

    states: Mapping[str, State] = field(default_factory=dict)
    membranes: Sequence[Tensor | None] = ()

    @classmethod
    def of(cls, fired: Mapping[str, Fired], membranes: Sequence[Tensor]) -> "LayerStates":
        states = {name: layer.state for name, layer in fired.items()}
        packed = {name: State(s.membrane, pack_bits(s.spikes.flatten(1))) for name, s in states.items()}
        return cls(packed, membranes)

    def state(self, name: str, dtype: torch.dtype) -> State | None:
        """Returns the state of a site, with spikes [B, ...] of this type; None at the start."""
        kept = self.states.get(name)
        if kept is None:
            return None
        spikes = unpack_bits(kept.spikes, kept.membrane[0].numel(), dtype)
        return State(kept.membrane, spikes.view(kept.membrane.shape))


@dataclass
class Chunk:
    """What credit assignment needs of a chunk of time; stands in for a `Pass`."""

    ends: list[tuple[Tensor, Tensor]]
    records: list[Record]
    copies: list[int] = field(default_factory=lambda: [0])
    error: None = None
    linked: bool = False
