"""The firing site of a layer that another library's code runs, usually one time step a call."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ulr_snn.adapters import StepNeuron
from ulr_snn.errors import UsageError
from ulr_snn.model.neurons import spread_without_padding, step_mask, zero_padding
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.noise.random import Drawer, Noise
from ulr_snn.noise.secant import farthest
from ulr_snn.sites.records import InPlaceGuard, LinkedRecord, Links, Record, Trace

ANY_STEPS = 1 << 62  # as the number of time steps of a pass in which layers are counted


@dataclass
class StepSite:
    """The firing site of a layer that its own library's code runs (see `adapters.Step`).

    records: records of the pass; the site holds the place of its record until `bind` replaces it. steps: number of time
    steps of the events, or of a longer first sequence; given: number of time steps of the sequences that the layer got.
    measured: whether the layer is in its first pass, in which it fires deterministically to calibrate the scale of its
    noise. links: keep spikes in the graph behind their drive; None: spikes are leaves.
    """

    name: str
    index: int
    level: NoiseLevel
    noise: Noise | None
    records: list[Any]
    neuron: StepNeuron
    steps: int
    lengths: Tensor | None
    guard: InPlaceGuard
    resetting: Tensor | None = None
    measured: bool = False
    calls: int = 0
    given: int = 0
    links: Links | None = None
    arrived: list[Tensor] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    inner: list[Tensor] = field(default_factory=list)  # spikes inside functions of autograd, whose outputs are leaves
    trace: Trace = field(default_factory=Trace)
    _draw: Drawer = field(init=False, repr=False)  # `_start` sets this and the scale, if the layer draws
    _scale: Tensor = field(init=False, repr=False)
    _over: Tensor | None = None
    _link: Any = None

    def takes(self, sequence: Tensor) -> None:
        """Takes a sequence [T, B, ...] over which the layer is about to run. The first may be shorter or longer than
        the events."""
        if self.lengths is not None and len(sequence) > self.steps:
            raise other_steps(self.name)
        if self.calls == 0:
            self.steps = max(self.steps, len(sequence))
        self.given += len(sequence)

    def begin(self, current: Tensor) -> None:
        if self.calls == 0 and self.noise is not None:
            if self.name in self.level.idle:
                raise UsageError(f"{self.name} did not run in the first step; a layer runs in every step or in none")
            self.measured = not self.level.is_calibrated(self.name)
            if not self.measured:
                self._start(self.noise)
            self.records.append(self)
        if self.calls >= self.steps:
            raise UsageError(
                f"{self.name} ran more than once in a time step, or over more steps than the {self.steps} of the "
                "events; give each use a neuron of its own (they may share weights), give several inputs of one net an "
                "axis behind the samples ([T, B, 2, ...]), and a step of events to every step (or layout='B' for a "
                "static input that the model repeats itself)"
            )
        if self.noise is not None and not self.measured and self._link is None:
            self.arrived.append(current)

    def _start(self, noise: Noise) -> None:
        self._scale = self.level.scale(self.name, self.neuron.threshold)
        self._draw = Drawer(noise, self.level.firing, self.index, self.steps, self._scale)
        self._over = self.level.secants(self.name, self._scale)
        if self.links is not None:
            self._link = self.links.steps(self._draw, self._scale, self._over, self.lengths, self.neuron.whole)

    def fire(self, drive: Tensor) -> Tensor:
        t, self.calls = self.calls, self.calls + (self.steps if self.neuron.whole else 1)
        if t == 0 and self.noise is not None:
            check_rows(self.name, drive.shape[int(self.neuron.whole) :], len(self.noise.sample))
        if self.measured:
            self.trace.x.append(drive.detach())
        if self.noise is None or self.measured:
            return self._settled(t, drive)
        if self._link is not None:
            if self.neuron.inside:
                return self._link.drawn(t, drive.detach())
            self.resetting = self._link.fired(t, drive)
            return self.guard(self.resetting)
        x = drive / self._scale
        with torch.no_grad():
            drawn = torch.stack([self._draw(*now) for now in enumerate(x)]) if self.neuron.whole else self._draw(t, x)
            spikes = self._zero_padding(t, drawn, drive)
        if self.neuron.inside:
            self.trace.x.append(x)
            self.inner.append(spikes)
            return spikes.clone()  # the function's output, which the model may change in place
        self.resetting = spikes.clone().requires_grad_()
        self.trace.resets.append(self.resetting)
        self.trace.x.append(x)
        self.leaves.append(spikes.requires_grad_())
        return self.guard(spikes)

    def _settled(self, t: int, drive: Tensor) -> Tensor:
        return self._zero_padding(t, drive > 0 if self.neuron.strict else drive >= 0, drive)

    def later(self) -> Callable[[int, Tensor], Tensor] | None:
        """Returns what fires in the time steps after the first one, from their number and drives; None if that is
        `fire`."""
        if self._link is not None:
            kernel: Callable[[int, Tensor], Tensor] | None = self._link.kernel
            return kernel
        return self._settled if self.noise is None and not self.measured else None

    @property
    def settles(self) -> bool:
        """True if the layer fires without noise."""
        return self.noise is None or self.measured

    @property
    def link(self) -> Any:
        """What passes credit on to the drives; None in a pass that is cut at spikes."""
        return self._link

    def end(self, states: list[Any]) -> None:
        if self._link is not None:
            return
        if self.neuron.inside:
            self.leaves += states if self.noise is not None and not self.measured else []
            return
        carried = [state for state in states if isinstance(state, Tensor) and state.grad_fn is not None]
        self.trace.states.append(carried if self.noise is not None else [])

    def _zero_padding(self, t: int, spikes: Tensor, drive: Tensor) -> Tensor:
        return zero_padding(spikes.to(drive.dtype), t, self.lengths, self.neuron.whole)

    def finish(self) -> None:
        """Checks that the layer ran once a step. Calibrates the scale of its noise if it was measured."""
        if self.lengths is not None and self.given not in (0, self.steps):
            raise other_steps(self.name)
        if self.calls not in (0, self.steps, self.given) and self.steps != ANY_STEPS:
            raise UsageError(
                f"{self.name} ran {self.calls} times in {self.steps} steps of events; a layer fires once a step "
                "(layout='BT' if events are [B, T, ...])"
            )
        if self.measured:
            self.measure()

    def measure(self) -> None:
        """Calibrates the scale of the noise, and stores how far membranes are from the threshold."""
        drive = self._joined(self.trace.x)
        mask = self._mask(drive)
        self.level.store_distances({self.name: farthest(drive, mask)})
        threshold = self.neuron.threshold
        self.level.scale(self.name, threshold, lambda: self._spread(drive, threshold.detach(), mask))

    def _spread(self, drive: Tensor, threshold: Tensor, mask: Tensor | None) -> float:
        found = spread_without_padding(drive + threshold, mask)
        widest = self.neuron.widest
        return found if math.isinf(widest) else min(found, widest * float(threshold.double().abs().mean()))

    def record(self) -> Record | LinkedRecord:
        """Returns the record of the pass."""
        if self._link is not None:
            return self._link.record(self.name)
        trace = self.trace
        x, spikes = self._joined(trace.x), self._joined(self.inner or self.leaves).detach()
        current = self._joined(self.arrived).detach()
        firing, scale = self.level.firing, self._scale.detach()
        arguments = self.name, self.neuron, current, scale, x, spikes, self.leaves, firing, self._mask(x)
        return Record(*arguments, trace=trace, over=self._over, arrived=self.arrived)

    def _joined(self, calls: list[Tensor]) -> Tensor:
        """Stacks the tensors of all calls to [T, B, ...]."""
        return calls[0] if self.neuron.whole else torch.stack(calls)

    def _mask(self, sequence: Tensor) -> Tensor | None:
        return None if self.lengths is None else step_mask(self.lengths, sequence)


def other_steps(name: str) -> UsageError:
    """Returns the error of a layer that runs over other time steps than the events, which have lengths."""
    return UsageError(f"{name} runs over other time steps than those of the events, so leave lengths out")


def check_rows(name: str, shape: torch.Size, samples: int) -> None:
    """Raises UsageError unless a layer's drives [B, ...] in a time step have a row for each sample."""
    if shape[:1] != (samples,):
        raise UsageError(
            f"{name} got {shape[0] if shape else 'no'} rows in a pass of {samples} samples; keep samples the first "
            "axis of every time step, and give patches or views an axis behind it ([B, P, ...])"
        )
