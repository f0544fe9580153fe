"""Exact credit of all layers in one backward pass.

Where every map between layers is the product of known derivatives, credit needs no layer to be taken by itself: each
layer's spikes stand in the graph behind what they were drawn from, and where a gradient arrives at them, the layer
turns it into that of its input current, by `Recurrence` or by its own library's graph. So products are taken once for
credit and for parameters together. It is the same credit as `Prediction.credit` of the same pass.
"""

from typing import Any

import torch
from torch import Tensor

from ulr_snn.credit.recurrence import recurrence_of
from ulr_snn.kernels import dispatch
from ulr_snn.kernels.precision import full_precision
from ulr_snn.model.neurons import own_steps
from ulr_snn.noise.random import Drawer
from ulr_snn.noise.secant import farthest
from ulr_snn.sites.records import LinkedRecord, Record, response_of


class Linked:
    """The `records.Links` of credit."""

    @staticmethod
    def spikes(record: Record) -> Tensor:
        """The spikes [T, B, ...] of a layer of ours, in the graph behind its input current."""
        if record.through is None:
            return _Spikes.apply(record.x, None, record)
        return _Spikes.apply(record.through, record.neuron.beta.clamp(0, 1), record)

    @staticmethod
    def steps(*about: Any) -> "StepLink":
        """For a layer whose membranes come in time step by time step."""
        return StepLink(*about)


class _Spikes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, entry: Tensor, beta: Tensor | None, record: Record) -> Tensor:
        ctx.record, ctx.shape = record, None if beta is None else beta.shape
        return record.spikes.detach()

    @staticmethod
    def backward(ctx: Any, a: Tensor) -> tuple[Tensor, Tensor | None, None]:
        record = ctx.record
        with full_precision():
            total, current = recurrence_of(record).credit(a, totals=record.through is None)
            if total is not None:
                return total * record.response, None, None
            if not ctx.needs_input_grad[1]:
                return current, None, None
            return current, record.leak_gradient(current).sum_to_size(ctx.shape), None


class StepLink:
    """Draws the spikes of a layer that its library's code runs, and keeps what turns a gradient at them into that of
    the membranes: no graph, so that the graph can refer to it.

    scale: of the noise, which may depend on a threshold that is learned; over: distances [K] of the secants, see
    `Record`; lengths [B]: steps of each row that are no padding; whole: whether all time steps come in at once.
    """

    def __init__(self, drawer: Drawer, scale: Tensor, over: Tensor | None, lengths: Tensor | None, whole: bool) -> None:
        self.drawer, self.scale, self.over, self.lengths, self.whole = drawer, scale, over, lengths, whole
        self._slopes: Tensor | None = None  # [T, B, ...], per unit of membrane
        self._x: dict[int, Tensor] = {}  # standardised drives, where slopes are made of them later
        self._draw: dispatch.StepDraw | None = None

    def fired(self, t: int, drive: Tensor) -> Tensor:
        """Spikes of drives [B, ...] of time step t (or of all, [T, B, ...]) in the graph behind them."""
        x = drive / self.scale if self.scale.requires_grad else drive
        return _Step.apply(x, drive.detach(), self, t)

    def drawn(self, t: int, drive: Tensor) -> Tensor:
        """Spikes of such drives, without a graph."""
        if not self._x and self._draw is None and dispatch.kernels(drive) is not None:  # the first step decides
            draw, like = self.drawer.draw(), drive[0] if self.whole else drive
            self._draw = None if draw is None else dispatch.StepDraw(draw, like, self.lengths, self.over)
        if self._draw is not None:
            wide = drive.float()
            spikes = torch.stack([self._draw(*now) for now in enumerate(wide)]) if self.whole else self._draw(t, wide)
            return spikes.to(drive.dtype)
        x = self._x[t] = drive / self.scale.detach()
        spikes = torch.stack([self.drawer(*now) for now in enumerate(x)]) if self.whole else self.drawer(t, x)
        return own_steps(spikes, t, self.lengths, self.whole)

    def slope(self, t: int) -> Tensor:
        """What credit takes for ∂p/∂drive, in the shape of the drive."""
        if self._slopes is None:
            if self._draw is not None:
                self._slopes = self._draw.slope
            else:
                x = self._x[t] if self.whole else torch.stack([self._x[step] for step in range(len(self._x))])
                self._slopes = response_of(self.drawer.firing, x, self.lengths, self.over) / self.scale.detach()
        return self._slopes if self.whole else self._slopes[t]

    def seen(self, site: str) -> LinkedRecord:
        """Of the pass, once it is over."""
        if self._draw is not None:
            largest = self._draw.farthest
        else:
            own = (own_steps(x, t, self.lengths, self.whole) for t, x in self._x.items())
            largest = torch.stack([farthest(x) for x in own]).max()
        return LinkedRecord(site, largest * self.scale.detach().mean())


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, drive: Tensor, link: StepLink, t: int) -> Tensor:
        ctx.link, ctx.t = link, t
        return link.drawn(t, drive)

    @staticmethod
    def backward(ctx: Any, a: Tensor) -> tuple[Tensor, None, None, None]:
        link = ctx.link
        credit = a * link.slope(ctx.t)
        return credit * link.scale.detach() if link.scale.requires_grad else credit, None, None, None
