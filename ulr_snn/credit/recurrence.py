"""Credit inside a layer: how a spike acts on its own layer's later firing, through the reset and recurrent weights.

A spike at t changes its neuron's membrane at t+1 by the reset, h_t = ∂u_{t+1}/∂s_t:
    reset "subtract": h_t = -threshold,     "zero": h_t = -beta u_t,     "none": h_t = 0
It changes all membranes of the layer by the recurrent current, which is a matrix C, known or learned (feedback.py).
So, to first order, it changes later firing probabilities. With a from outside the layer (direct credit, learned
feedback), p' per unit of membrane, and k_t the factor of the membrane that the reset leaves:
    c_t = (a_t + h_t g_{t+1} + C g_{t+1}) p'_t          credit times slope
    g_t = c_t + beta k_t g_{t+1}                        = ∂L/∂J_t, credit of the input current
Direct credit lacks both effects. This credit depends on the pass's own later probabilities, so with λ = 1 it must come
from an independent copy, as all credit must.

The transpose is the effect of innovations ε and of changes δJ of the input currents on the spikes,
    δu_t = beta k_{t-1} δu_{t-1} + h_{t-1} e_{t-1} + C^T e_{t-1} + δJ_t,    e_t = ε_t + p'_t δu_t,
so that sum_t a_t e_t = sum_t (a + h g + C g)_t ε_t + g_t δJ_t.

A layer of another library has its own equations. There the graph of its steps, at fixed spikes, takes the place of
beta, k, h and C. The states that it carries between steps are recorded. The vector-Jacobian product of one step leads
from the credit of x_t and of the states after t to the credit of J_t, of the spikes at t-1 and of the states before.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ulr_snn.credit.maps import Full, Path
from ulr_snn.kernels.layout import rest
from ulr_snn.kernels.pool import empty_like
from ulr_snn.model.neurons import SpikingNeuron
from ulr_snn.sites.records import Record


@dataclass
class Recurrence:
    """One pass of one layer, linearised along its reset and its recurrent weights.

    slope: computes p' per unit of membrane; membrane: computes u for the reset; spikes; all [T, B, ...].
    path, weight: the map C of the recurrent current; None where there is none, or it is not learned yet.
    fused: computes credit by a kernel, where there is one (`Record.fused_credit`).
    """

    neuron: SpikingNeuron
    slope: Callable[[], Tensor]
    spikes: Tensor
    membrane: Callable[[], Tensor]
    path: Path | None = None
    weight: Tensor | None = None
    fused: Callable[[Tensor, Tensor | None, bool, bool, Tensor | None], Any] | None = None

    def _steps(self) -> tuple[Tensor, Tensor]:
        """Returns beta k_t and h_t, expanded over time where they are constant."""
        beta = self.neuron.beta.detach().clamp(0, 1)
        steps = len(self.spikes)
        if self.neuron.reset == "zero":
            return beta * (1 - self.spikes), -beta * self.membrane()
        h = -self.neuron.threshold.detach() if self.neuron.reset == "subtract" else torch.zeros_like(beta)
        return beta.expand(steps, *beta.shape), h.expand(steps, *h.shape)

    def credit(
        self, a: Tensor, totals: bool = True, later: Tensor | None = None, overwrite: bool = False
    ) -> tuple[Tensor | None, Tensor]:
        """Returns (a + h g + C g, g) [T, B, ...]: the total credit of every spike, and ∂L/∂J of every input current.
        Without `totals` the first is None. later: g [B, ...] of the step after the last; it is overwritten by g of the
        first step. overwrite: the memory of a may be reused."""
        if self.fused is not None and (self.weight is None or self._dense):
            done = self.fused(a, later, totals, overwrite, self.weight)
            if done is not None:
                return done
        later = rest(self.spikes).to(a.dtype) if later is None else later
        kept, h = self._steps()
        through, total, currents = self._through(h), empty_like(a if totals else a[:1]), self.slope()
        steps = zip(*(each.unbind() for each in (a, h, kept, currents, total.expand(a.shape))), strict=True)
        g = later
        for a_t, h_t, kept_t, current, now in reversed(list(steps)):
            through(a_t, h_t, g, now)
            g = current.mul_(now).addcmul_(kept_t, g)
        later.copy_(g)
        return total if totals else None, currents

    @property
    def _dense(self) -> bool:
        """True if the recurrent weights are a matrix."""
        return isinstance(self.path, Full) and self.spikes.ndim == 3

    def _through(self, h: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], object]:
        """Returns a function (a_t, h_t, g, out) that writes a_t + h_t g + C g, all [B, ...], to out."""
        path, weight, threshold = self.path, self.weight, self.neuron.threshold
        uniform = self.neuron.reset == "none" or (self.neuron.reset == "subtract" and threshold.numel() == 1)
        if weight is not None and self._dense and uniform:
            both = (weight + torch.diag(h[0].expand(len(weight)))).T  # a reset is a neuron's weight to itself
            return lambda a_t, _, g, out: torch.addmm(a_t, g, both, out=out)

        def through(a_t: Tensor, h_t: Tensor, g: Tensor, out: Tensor) -> None:
            torch.addcmul(a_t, g, h_t, out=out)
            if path is not None and weight is not None:
                out += path.backward(weight, g)

        return through

    def response(self, innovations: Tensor, currents: Tensor | None = None) -> Tensor:
        """Returns e [T, B, ...]: innovations plus the effect of innovations and current changes on the spikes."""
        kept, h = self._steps()
        slope = self.slope()
        response = torch.empty_like(innovations)
        moved = torch.zeros_like(innovations[0])
        for t in range(len(innovations)):
            if currents is not None:
                moved = moved + currents[t]
            torch.addcmul(innovations[t], moved, slope[t], out=response[t])
            moved = kept[t] * moved + h[t] * response[t]
            if self.path is not None and self.weight is not None:
                moved = moved + self.path.forward(self.weight, response[t])
        return response


@dataclass
class StepRecurrence:
    """One pass of one layer of another library, linearised along its own steps."""

    record: Record

    def credit(
        self, a: Tensor, totals: bool = True, later: Tensor | None = None, overwrite: bool = False, twice: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Returns credit as `Recurrence.credit` does, always with totals, of a whole sequence, and without overwriting.
        twice: the credit is differentiable in a."""
        trace, arrived, slope = self.record.trace, self.record.arrived, self.record.response
        assert trace is not None  # see `recurrence_of`
        if self.record.whole:
            (current,) = gradients([(trace.x[0], a * slope)], arrived, twice)
            return a, torch.zeros_like(arrived[0]) if current is None else current
        total, currents = [], []
        arriving = torch.zeros_like(a[0])  # credit of this step's spikes by way of later steps
        carried: list[Tensor | None] = []  # and of its states
        for t in range(len(a) - 1, -1, -1):
            total.append(a[t] + arriving)
            known = [(x, g) for x, g in zip(trace.states[t], carried, strict=False) if g is not None]
            known.append((trace.x[t], total[-1] * slope[t]))
            before = [self.record.leaves[t - 1], trace.resets[t - 1], *trace.states[t - 1]] if t else []
            found = gradients(known, [arrived[t], *before], twice)
            currents.append(torch.zeros_like(arrived[t]) if found[0] is None else found[0])
            arriving = sum((g for g in found[1:3] if g is not None), torch.zeros_like(a[0]))
            carried = partial(before[2:], found[3:], twice)
        return torch.stack(total[::-1]), torch.stack(currents[::-1])

    def response(self, innovations: Tensor, currents: Tensor | None = None) -> Tensor:
        """Returns the derivative of sum_t total_t ε_t + g_t δJ_t with respect to a, as `Recurrence.response` does."""
        a = torch.zeros_like(innovations, requires_grad=True)
        with torch.enable_grad():
            total, arrived = self.credit(a, twice=True)
        sums = [(total, innovations)] + ([(arrived, currents)] if currents is not None else [])
        (found,) = gradients(sums, [a], twice=False)
        assert found is not None  # total depends on a
        return found


def partial(states: list[Tensor], totals: list[Tensor | None], twice: bool) -> list[Tensor | None]:
    """Returns the partial derivatives in the states of one time step, each with the other states fixed. totals: the
    derivatives of autograd. In a state that other states are computed from, they include the effect by way of those.
    The order of computation is known only from the private sequence numbers of autograd's nodes."""
    made = [(i, state.grad_fn) for i, state in enumerate(states) if state.grad_fn is not None]  # not detached since
    order = [i for i, node in sorted(made, key=lambda pair: pair[1]._sequence_nr(), reverse=True)]
    found = list(totals)
    for place, i in enumerate(order):
        earlier, total = order[place + 1 :], found[i]
        if total is None or not earlier:
            continue
        through = gradients([(states[i], total)], [states[j] for j in earlier], twice)
        for j, part in zip(earlier, through, strict=True):
            before = found[j]
            if part is not None and before is not None:
                found[j] = before - part
    return found


def recurrence_of(
    record: Record, read: bool = True, path: Path | None = None, weight: Tensor | None = None
) -> Recurrence | StepRecurrence:
    """Returns the recurrence of one pass of a layer. read: recurrent weights are read from the layer; else path and
    weight are the learned map."""
    if record.trace is not None:
        return StepRecurrence(record)
    recurrent = getattr(record.neuron, "recurrent", None)
    if recurrent is not None and (read or not record.neuron.learns_recurrence):
        path = Full(*[tuple(record.spikes.shape[2:])] * 2)
        weight = recurrent.weight.detach().T.to(record.x.dtype)
    gives = record.response_of_membrane, record.spikes.detach(), record.membrane
    return Recurrence(record.neuron, *gives, path, weight, record.fused_credit)


def gradients(known: list[tuple[Tensor, Tensor]], wanted: list[Tensor], twice: bool) -> list[Tensor | None]:
    """Returns Σ gradient · ∂output/∂wanted over pairs (output, gradient) for each wanted tensor, or None for zero."""
    known = [(output, gradient) for output, gradient in known if output.requires_grad]
    asked = [tensor for tensor in wanted if tensor.requires_grad]
    found: Iterable[Tensor | None] = [None] * len(asked)
    if known and asked:
        outputs, weights = zip(*known, strict=True)
        found = torch.autograd.grad(outputs, asked, weights, retain_graph=True, create_graph=twice, allow_unused=True)
    parts = iter(found)
    return [next(parts) if tensor.requires_grad else None for tensor in wanted]
