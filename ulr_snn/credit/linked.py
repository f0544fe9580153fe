"""Exact credit of all layers in one backward pass.

This works where every map between layers is a product of known derivatives. Each layer's spikes stay in the graph,
linked to the drives that they were drawn from. The layer turns a gradient at its spikes into the gradient of its input
current, by `Recurrence` or by its own library's graph. So one product serves both credit and parameters. The credit
equals `Prediction.credit` of the same pass.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ulr_snn.credit.recurrence import recurrence_of
from ulr_snn.kernels import dispatch
from ulr_snn.kernels.precision import full_precision, widened
from ulr_snn.model.neurons import zero_padding
from ulr_snn.noise.random import Drawer
from ulr_snn.noise.secant import farthest
from ulr_snn.sites.records import LinkedRecord, Record, response_of


class Linked:
    """The `records.Links` that carry credit through spikes."""

    @staticmethod
    def spikes(record: Record) -> Tensor:
        """Returns the spikes [T, B, ...] of a neuron of `ulr_snn`, linked to its input current."""
        if record.through is None:
            return _Spikes.apply(record.x, None, record)
        return _Spikes.apply(record.through, record.neuron.beta.clamp(0, 1), record)

    @staticmethod
    def steps(drawer: Drawer, scale: Tensor, over: Tensor | None, lengths: Tensor | None, whole: bool) -> "StepLink":
        """Returns the link of a layer whose membranes arrive time step by time step."""
        return StepLink(drawer, scale, over, lengths, whole)


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
    """Draws the spikes of a layer that its library's code runs, and keeps the slopes that a gradient at them needs.

    It keeps no graph, so that the graph can refer to it. scale: the noise scale. If it depends on a learned threshold,
    spikes are linked to drives over the scale, and autograd divides; else to drives. over: distances [K] of the
    secants, see `Record`. lengths: [B]; later steps are padding. whole: all time steps arrive at once.
    """

    def __init__(self, drawer: Drawer, scale: Tensor, over: Tensor | None, lengths: Tensor | None, whole: bool) -> None:
        self.drawer, self.scale, self.over, self.lengths, self.whole = drawer, scale, over, lengths, whole
        self._unit = torch.ones_like(scale.detach()) if scale.requires_grad else scale  # of drives
        self._slopes: Tensor | None = None  # [T, B, ...], per unit of the drives
        self._x: dict[int, Tensor] = {}  # standardised drives, if slopes are computed later
        self._draw: dispatch.StepDraw | None = None

    def fired(self, t: int, drive: Tensor) -> Tensor:
        """Draws spikes from drives [B, ...] of time step t, or [T, B, ...] of all steps, linked to the drives."""
        if self._unit is self.scale:
            return self._fired(t, drive)
        return self._fired(t, widened(drive) / self.scale).to(drive.dtype)

    def _fired(self, t: int, drive: Tensor) -> Tensor:
        if drive.dtype == torch.float32 and not self.whole:
            draw = self._kernel(drive) if self._draw is None else self._draw
            if draw is not None:
                return draw.linked(t, drive)
        return _Step.apply(drive, self, t)

    def _kernel(self, drive: Tensor) -> dispatch.StepDraw | None:
        """Returns what draws by a kernel, or None if no kernel applies. The first step decides."""
        if not self._x and self._draw is None and dispatch.kernels(drive) is not None:
            draw, like = self.drawer.draw(), drive[0] if self.whole else drive
            draw = None if draw is None else replace(draw, scale=self._unit)
            self._draw = None if draw is None else dispatch.StepDraw(draw, like, self.lengths, self.over)
        return self._draw

    @property
    def kernel(self) -> dispatch.StepDraw | None:
        """What draws the steps by a kernel; None if none does, or before the first step."""
        return self._draw

    def drawn(self, t: int, drive: Tensor) -> Tensor:
        """Draws spikes from drives as in `fired`, without a graph."""
        draw = self._kernel(drive)
        if draw is not None:
            single = drive.dtype == torch.float32
            return draw(t, drive) if single else draw(t, drive.float()).to(drive.dtype)
        x = self._x[t] = drive / self._unit
        spikes = torch.stack([self.drawer(*now) for now in enumerate(x)]) if self.whole else self.drawer(t, x)
        return zero_padding(spikes, t, self.lengths, self.whole)

    def slope(self, t: int) -> Tensor:
        """Returns ∂p/∂drive as credit uses it (see `response_of`), in the unit and the shape of the drive."""
        if self._slopes is None:
            if self._draw is not None:
                self._slopes = self._draw.slope
            else:
                x = self._x[t] if self.whole else torch.stack([self._x[step] for step in range(len(self._x))])
                self._slopes = response_of(self.drawer.firing, x, self.lengths, self.over) / self._unit
        return self._slopes if self.whole else self._slopes[t]

    def _mask(self, t: int, x: Tensor) -> Tensor | None:
        return None if self.lengths is None else zero_padding(torch.ones_like(x), t, self.lengths, self.whole)

    def record(self, site: str) -> LinkedRecord:
        """Returns the record of the pass after its last step."""
        if self._draw is not None:
            largest = self._draw.farthest
        else:
            largest = torch.stack([farthest(x, self._mask(t, x)) for t, x in self._x.items()]).amax(0)
        return LinkedRecord(site, largest * self.scale.detach().mean())


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, drive: Tensor, link: StepLink, t: int) -> Tensor:
        ctx.link, ctx.t = link, t
        return link.drawn(t, drive.detach())

    @staticmethod
    def backward(ctx: Any, a: Tensor) -> tuple[Tensor, None, None]:
        return a * ctx.link.slope(ctx.t), None, None
