"""The firing site of a layer that another library's code runs, in most cases one time step a call."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ulr_snn.adapters import StepNeuron
from ulr_snn.errors import UsageError
from ulr_snn.model.neurons import own_spread, own_steps, step_mask
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.noise.random import Drawer, Noise
from ulr_snn.noise.secant import farthest
from ulr_snn.sites.records import InPlaceGuard, LinkedRecord, Links, Record, Trace


@dataclass
class StepSite:
    """The firing site of a layer that its own library's code runs (see `adapters.Step`).

    steps: of the sequence. measured: the layer is on its first pass, and fires deterministically, so that its membranes
    tell at which level the noise begins.
    """

    name: str
    index: int
    level: NoiseLevel
    noise: Noise | None
    records: list[Record]
    neuron: StepNeuron
    steps: int
    lengths: Tensor | None
    guard: InPlaceGuard
    resetting: Tensor | None = None
    measured: bool = False
    calls: int = 0
    links: Links | None = None  # that keep spikes in the graph behind their drive; else they are leaves of it
    arrived: list[Tensor] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    trace: Trace = field(default_factory=Trace)
    _draw: Drawer | None = None
    _link: Any = None
    _scale: Tensor | None = None
    _over: Tensor | None = None

    def begin(self, current: Tensor) -> None:
        if self.calls == 0 and self.noise is not None:
            if self.name in self.level.idle:
                raise UsageError(f"{self.name} did not run in the first step; a layer runs in every step or in none")
            self.measured = not self.level.knows(self.name)
            if not self.measured:
                self._start()
            self.records.append(self)  # its place in the order of execution; `bind` puts the record there
        if self.calls >= self.steps:
            raise UsageError(
                f"{self.name} ran more than once in a time step, or over more steps than the {self.steps} of the "
                "events; give each layer a neuron of its own, and a step of events to every step"
            )
        if self.noise is not None and not self.measured and self._link is None:
            self.arrived.append(current)

    def _start(self) -> None:
        self._scale = self.level.scale(self.name, self.neuron.threshold, None)
        self._draw = Drawer(self.noise, self.level.firing, self.index, self.steps, self._scale)
        self._over = self.level.over(self.name, self._scale)
        if self.links is not None:
            self._link = self.links.steps(self._draw, self._scale, self._over, self.lengths, self.neuron.whole)

    def fire(self, drive: Tensor) -> Tensor:
        t, self.calls = self.calls, self.calls + (self.steps if self.neuron.whole else 1)
        if self.measured:
            self.trace.x.append(drive.detach())
        if self.noise is None or self.measured:
            return self._own_steps(t, drive > 0 if self.neuron.strict else drive >= 0, drive)
        if self._link is not None:
            self.resetting = self._link.fired(t, drive)
            return self.guard(self.resetting)
        x = drive / self._scale
        with torch.no_grad():
            drawn = torch.stack([self._draw(*now) for now in enumerate(x)]) if self.neuron.whole else self._draw(t, x)
            spikes = self._own_steps(t, drawn, drive)
        self.resetting = spikes.clone().requires_grad_()
        self.trace.resets.append(self.resetting)
        self.trace.x.append(x)
        self.leaves.append(spikes.requires_grad_())
        return self.guard(spikes)

    def end(self, states: list[Any]) -> None:
        if self._link is not None:
            return
        carried = [state for state in states if isinstance(state, Tensor) and state.grad_fn is not None]
        self.trace.states.append(carried if self.noise is not None else [])

    def _own_steps(self, t: int, spikes: Tensor, drive: Tensor) -> Tensor:
        return own_steps(spikes.to(drive.dtype), t, self.lengths, self.neuron.whole)

    def finish(self) -> None:
        """Checks that the layer ran once a step. If it was measured, sets the level at which its noise begins."""
        if self.calls not in (0, self.steps):
            raise UsageError(
                f"{self.name} ran {self.calls} times in {self.steps} steps of events; a layer fires once a step"
            )
        if self.measured:
            self.measure()

    def measure(self) -> None:
        """Sets the level at which the noise begins, and notes how far membranes are from the threshold."""
        drive = self._joined(self.trace.x)
        mask = self._mask(drive)
        self.level.take({self.name: farthest(drive, mask)})
        spread = partial(own_spread, drive + self.neuron.threshold.detach(), mask)
        self.level.scale(self.name, self.neuron.threshold, spread)

    def record(self) -> Record | LinkedRecord:
        """The record of the pass."""
        if self._link is not None:
            return self._link.seen(self.name)
        trace = self.trace
        x, spikes = self._joined(trace.x), self._joined(self.leaves).detach()
        current = self._joined(self.arrived).detach()
        firing, scale = self.level.firing, self._scale.detach()
        about = self.name, self.neuron, current, scale, x, spikes, self.leaves, firing, self._mask(x)
        return Record(*about, trace=trace, over=self._over, arrived=self.arrived)

    def _joined(self, calls: list[Tensor]) -> Tensor:
        """[T, B, ...] of what belongs to each call."""
        return calls[0] if self.neuron.whole else torch.stack(calls)

    def _mask(self, sequence: Tensor) -> Tensor | None:
        return None if self.lengths is None else step_mask(self.lengths, sequence)
