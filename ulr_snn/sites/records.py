"""What one forward pass leaves at one firing site."""

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
    """Of a layer that its library's code ran: its tensors of every call, as they stand in the autograd graph.

    x: [B, ...] each, or one [T, B, ...]; resets: the spikes as the layer's own reset sees them, where its library asks
    for them apart; states: what the layer carries to the next call.
    """

    x: list[Tensor] = field(default_factory=list)
    resets: list[Tensor] = field(default_factory=list)
    states: list[list[Tensor]] = field(default_factory=list)


def response_of(firing: Firing, x: Tensor, lengths: Tensor | None, over: Tensor | None) -> Tensor:
    """What credit takes for ∂p/∂x of standardised drives [T, B, ...]: p', or secants of F over these distances [K];
    zero on padding. lengths: steps of each row that are none, [B]."""
    law = law_of(firing)
    done = None if law is None else dispatch.slopes(x, law, torch.ones(()), lengths, over)
    if done is not None:
        return done
    found = firing.slope(x) if over is None else secant(firing.probability, x, over)
    return found if lengths is None else found * step_mask(lengths, found)


@dataclass
class Record:
    """What one forward pass leaves at one site. All [T, B, ...]; B counts the rows of the pass (copies included)."""

    site: str
    neuron: Any  # a SpikingNeuron or an adapters.StepNeuron
    current: Tensor | None  # None of a part of time, of which nobody asks for it
    scale: Tensor
    x: Tensor  # standardised drive, differentiable in current and parameters with the spikes held fixed
    spikes: Tensor
    leaves: list[Tensor]  # the spikes where the path from them to the loss starts: all in one, or one a time step
    firing: Firing
    mask: Tensor | None
    fed_back: Tensor | None = None  # recurrent current, of a layer that has one; None of a part of time
    trace: Trace | None = None  # of a layer of another library
    through: Tensor | None = None  # of its current in the graph, no numbers; None if x has more that learns than a leak
    over: Tensor | None = None  # standardised distances [K] of the secants that stand for p' in credit; None: p'
    arrived: list[Tensor] = field(default_factory=list)  # its current in the graph: all in one, or one a time step

    @property
    def farthest(self) -> Tensor:
        """Largest distance of a membrane to the threshold, a number; padding left out."""
        return farthest(self.x, self.mask) * self.scale.detach().mean()

    @property
    def entry(self) -> Tensor | None:
        """Where credit of the current goes on, if x depends on nothing else that learns."""
        return None if self.through is None or self.neuron.beta.requires_grad else self.through

    @property
    def whole(self) -> bool:
        """Whether the layer ran all time steps at once."""
        return self.leaves[0].ndim == self.spikes.ndim

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
        """p' = ∂p/∂x, as the formula has it."""
        return self._on_own_steps(self.firing.slope(self.x.detach()))

    @cached_property
    def response(self) -> Tensor:
        """What credit takes for ∂p/∂x: p', or secants of F."""
        return self.slope if self.over is None else response_of(self.firing, self.x.detach(), self._lengths, self.over)

    def response_of_membrane(self) -> Tensor:
        """`response` per unit of membrane, anew."""
        law = law_of(self.firing)
        done = None if law is None else dispatch.slopes(self.x.detach(), law, self.scale, self._lengths, self.over)
        return self.response / self.scale if done is None else done

    def leak_gradient(self, currents: Tensor) -> Tensor:
        """∂L/∂beta [...], of each neuron, from g = ∂L/∂J [T, B, ...] at fixed spikes."""
        scale, threshold = self.scale, self.neuron.threshold.detach()
        x, spikes = self.x.detach(), self.spikes.detach()
        done = dispatch.leak_gradient(currents, x, scale, threshold, spikes, self.neuron.reset)
        if done is not None:
            return done
        before = self.membrane()[:-1]
        before = before * (1 - spikes[:-1]) if self.neuron.reset == "zero" else before
        return (currents[1:] * before).sum((0, 1))

    def fused_credit(
        self, a: Tensor, later: Tensor, totals: bool, overwrite: bool, weight: Tensor | None
    ) -> tuple[Tensor | None, Tensor] | None:
        """See `kernels.dispatch.credit`."""
        law, neuron = law_of(self.firing), self.neuron
        if law is None:
            return None
        beta, threshold = neuron.beta.detach().clamp(0, 1), neuron.threshold.detach()
        of_pass = self.x.detach(), law, self.scale, self._lengths, self.spikes.detach()
        return dispatch.credit(a, *of_pass, beta, threshold, neuron.reset, later, totals, overwrite, weight, self.over)

    @property
    def _lengths(self) -> Tensor | None:
        """Steps of each row that are no padding, [B]."""
        return None if self.mask is None else self.mask.sum(0).flatten()

    def score(self) -> Tensor:
        """δ = ∂ log P(s) / ∂x."""
        return self._on_own_steps(self.firing.score(self.spikes.detach(), self.x.detach()))


@dataclass(frozen=True)
class LinkedRecord:
    """What a linked pass leaves at a site of another library's code. farthest: see `Record`."""

    site: str
    farthest: Tensor


class Links(Protocol):
    """What sites put between spikes and what they were drawn from, where the graph is to go through spikes."""

    def spikes(self, record: Record) -> Tensor:
        """Spikes [T, B, ...] of a record in the graph behind its current."""

    def steps(self, drawer: Drawer, scale: Tensor, over: Tensor | None, lengths: Tensor | None, whole: bool) -> Any:
        """The same of a layer whose membranes come in time step by time step: see `credit.linked.StepLink`."""


class InPlaceGuard:
    """What layers hand to the model, which may change it in place (`spikes += x`): copies, or, of a model that is known
    not to, the spikes themselves."""

    def __init__(self, copies: bool) -> None:
        self.copies = copies
        self._given: list[tuple[Tensor, int]] = []

    def __call__(self, spikes: Tensor) -> Tensor:
        given = spikes.clone() if self.copies else spikes
        self._given.append((given, given._version))
        return given

    @property
    def changed(self) -> bool:
        """Whether the model has changed anything of it. Raises UsageError where these were no copies."""
        found = any(given._version != version for given, version in self._given)
        if found and not self.copies:
            raise UsageError(
                "the model changed the spikes of a layer in place, which it did not in the first step, so that credit "
                "would be wrong; write spikes = spikes + x in place of spikes += x"
            )
        return found


@dataclass
class CurrentRecord(Record):
    """What a pass leaves at a site with Gaussian noise on the input current: x = J / scale [T, B, ...], noise z of the
    same shape, and what the module gave for J + scale z in the place of spikes, [T, B, ...] of any shape. Everything
    is as of a site that draws z: its innovation is z, its score z, and the prediction a is that of ∂L/∂z."""

    z: Tensor | None = None

    @property
    def elementwise(self) -> bool:
        """Whether each output depends on the current of its own place alone."""
        return self.neuron.elementwise and self.spikes.shape == self.x.shape

    def innovation(self) -> Tensor:
        return self._on_own_steps(self.z)

    @cached_property
    def slope(self) -> Tensor:
        return self._on_own_steps(torch.ones_like(self.x))

    def score(self) -> Tensor:
        return self._on_own_steps(self.z)
