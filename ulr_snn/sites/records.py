"""Records of one forward pass at one site."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ulr_snn.errors import UsageError
from ulr_snn.kernels import dispatch
from ulr_snn.model.neurons import step_mask
from ulr_snn.noise.firing import Firing, law_of
from ulr_snn.noise.random import Drawer
from ulr_snn.noise.secant import farthest, secant


@dataclass
class Trace:
    """The tensors, in the autograd graph, of every call of a layer that its library's code ran.

    x: [B, ...] each, or one [T, B, ...]. resets: the spikes that the layer's own reset reads, if its library reads them
    separately. states: the state that the layer carries to the next call.
    """

    x: list[Tensor] = field(default_factory=list)
    resets: list[Tensor] = field(default_factory=list)
    states: list[list[Tensor]] = field(default_factory=list)


def response_of(firing: Firing, x: Tensor, lengths: Tensor | None, over: Tensor | None) -> Tensor:
    """Returns the estimate of ∂p/∂x that credit uses, for standardised drives [T, B, ...]; zero on padding. over:
    distances [K] of the secants of F; None: it is p'. lengths: number of steps of each row, without padding, [B]."""
    law = law_of(firing)
    done = None if law is None else dispatch.slopes(x, law, torch.ones(()), lengths, over)
    if done is not None:
        return done
    found = firing.slope(x) if over is None else secant(firing.probability, x, over)
    return found if lengths is None else found * step_mask(lengths, found)


@dataclass
class Record:
    """The record of one forward pass at one site. Sequences are [T, B, ...]; B is the number of rows, with all copies.

    through: autograd handle of the total current, with undefined values; None if x depends on more learned parameters
    than a leak.
    """

    site: str
    neuron: Any  # a SpikingNeuron or an adapters.StepNeuron
    current: Tensor | None  # None in a time chunk, where nothing reads it
    scale: Tensor
    x: Tensor  # standardised drive, differentiable in current and parameters with the spikes held fixed
    spikes: Tensor
    leaves: list[Tensor]  # the spikes as autograd leaves, one for all time steps or one a time step
    firing: Firing
    mask: Tensor | None
    fed_back: Tensor | None = None  # recurrent current of a layer that has one; None in a time chunk
    trace: Trace | None = None  # None for a layer of this package
    through: Tensor | None = None
    over: Tensor | None = None  # standardised distances [K] of the secants that replace p' in credit; None: p'
    arrived: list[Tensor] = field(default_factory=list)  # the current in the graph, for all time steps or one a step

    @property
    def farthest(self) -> Tensor:
        """Largest distances of membranes below and above the threshold, [2], without padding."""
        return farthest(self.x, self.mask) * self.scale.detach().mean()

    @property
    def current_handle(self) -> Tensor | None:
        """Autograd handle at which credit of the current continues; None if the neuron has learned parameters."""
        return None if self.through is None or self.neuron.beta.requires_grad else self.through

    @property
    def whole(self) -> bool:
        """True if the layer ran all time steps at once."""
        return self.trace is None or self.neuron.whole

    def _without_padding(self, value: Tensor) -> Tensor:
        return value if self.mask is None else value * self.mask

    def valid_steps(self) -> Tensor:
        """Returns [T, B] bool, which is False on padding."""
        if self.mask is None:
            return torch.ones(self.spikes.shape[:2], dtype=torch.bool, device=self.spikes.device)
        return self.mask.flatten(1).bool()

    def innovation(self) -> Tensor:
        """Returns ε = s - p."""
        return self._without_padding(self.spikes.detach() - self.firing.probability(self.x.detach()))

    def membrane(self) -> Tensor:
        """Returns the membrane u."""
        return self.x.detach() * self.scale + self.neuron.threshold.detach()

    @cached_property
    def slope(self) -> Tensor:
        """The derivative p' = ∂p/∂x."""
        return self._without_padding(self.firing.slope(self.x.detach()))

    @cached_property
    def response(self) -> Tensor:
        """The estimate of ∂p/∂x that credit uses: p', or secants of F."""
        return self.slope if self.over is None else response_of(self.firing, self.x.detach(), self._lengths, self.over)

    def response_of_membrane(self) -> Tensor:
        """Computes `response` per unit of membrane."""
        law = law_of(self.firing)
        done = None if law is None else dispatch.slopes(self.x.detach(), law, self.scale, self._lengths, self.over)
        return self.response / self.scale if done is None else done

    def leak_gradient(self, currents: Tensor) -> Tensor:
        """Returns ∂L/∂beta [...] of each neuron, from g = ∂L/∂J [T, B, ...] at fixed spikes."""
        scale, threshold = self.scale, self.neuron.threshold.detach()
        x, spikes = self.x.detach(), self.spikes.detach()
        done = dispatch.leak_gradient(currents, x, scale, threshold, spikes, self.neuron.reset)
        if done is not None:
            return done
        before = self.membrane()[:-1]
        before = before * (1 - spikes[:-1]) if self.neuron.reset == "zero" else before
        return (currents[1:] * before).sum((0, 1))

    def fused_credit(
        self, a: Tensor, later: Tensor | None, totals: bool, overwrite: bool, weight: Tensor | None
    ) -> tuple[Tensor | None, Tensor] | None:
        """Calls `kernels.dispatch.credit` for this record; returns None if no kernel applies."""
        law, neuron = law_of(self.firing), self.neuron
        if law is None:
            return None
        beta, threshold = neuron.beta.detach().clamp(0, 1), neuron.threshold.detach()
        of_pass = self.x.detach(), law, self.scale, self._lengths, self.spikes.detach()
        return dispatch.credit(a, *of_pass, beta, threshold, neuron.reset, later, totals, overwrite, weight, self.over)

    @property
    def _lengths(self) -> Tensor | None:
        """Number of steps of each row, without padding, [B]."""
        return None if self.mask is None else self.mask.sum(0).flatten()

    def score(self) -> Tensor:
        """Returns δ = ∂ log P(s) / ∂x."""
        return self._without_padding(self.firing.score(self.spikes.detach(), self.x.detach()))


@dataclass(frozen=True)
class LinkedRecord:
    """The record of a linked pass at a site in another library's code. farthest: see `Record`."""

    site: str
    farthest: Tensor


class Links(Protocol):
    """Connections from spikes to the drives that they were drawn from, for a graph that passes through spikes."""

    def spikes(self, record: Record) -> Tensor:
        """Returns the spikes [T, B, ...] of a record, connected to its current in the graph."""

    def steps(self, drawer: Drawer, scale: Tensor, over: Tensor | None, lengths: Tensor | None, whole: bool) -> Any:
        """Returns a `credit.linked.StepLink`, which connects the spikes of a layer that runs step by step."""


class InPlaceGuard:
    """A guard of the spikes against changes in place by the model, as in `spikes += x`. copies: whether the model gets
    copies of the spikes. A model that is known not to change them gets the spikes."""

    def __init__(self, copies: bool) -> None:
        self.copies = copies
        self._given: list[tuple[Tensor, int]] = []

    def __call__(self, spikes: Tensor) -> Tensor:
        given = spikes.clone() if self.copies else spikes
        self._given.append((given, given._version))
        return given

    @property
    def changed(self) -> bool:
        """True if the model has changed a copy. Raises UsageError if it has changed the spikes themselves."""
        found = any(given._version != version for given, version in self._given)
        if found and not self.copies:
            raise UsageError(
                "the model changed the spikes of a layer in place, which it did not in the first step, so that credit "
                "would be wrong; write spikes = spikes + x in place of spikes += x"
            )
        return found


@dataclass
class CurrentRecord(Record):
    """The record of one pass at a site with Gaussian noise on the input current. x: J / scale [T, B, ...]. z: the noise
    in the same shape. spikes: the module's output for J + scale z, [T, B, ...] of any shape. The record is that of a
    site that draws z: innovation and score are z, and a predicts ∂L/∂z."""

    z: Tensor = field(kw_only=True)

    @property
    def elementwise(self) -> bool:
        """True if each output depends only on the current at its own place."""
        return self.neuron.elementwise and self.spikes.shape == self.x.shape

    def innovation(self) -> Tensor:
        return self._without_padding(self.z)

    @cached_property
    def slope(self) -> Tensor:
        return self._without_padding(torch.ones_like(self.x))

    score = innovation  # for Gaussian noise both are z
