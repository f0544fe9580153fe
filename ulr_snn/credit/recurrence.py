"""Credit inside a layer: how a spike acts on its own layer's later firing, through the reset and recurrent weights.

A spike at t changes its neuron's membrane at t+1 by the reset, h_t = ∂u_{t+1}/∂s_t:
    reset "subtract": h_t = -threshold,     "zero": h_t = -beta u_t,     "none": h_t = 0
and all of the layer's membranes by the recurrent current, which is learned as a matrix C like that between two layers
(feedback.py). With it, to first order, it changes later firing probabilities. With a from outside the layer (direct
credit, learned feedback), p' per unit of membrane, and k_t the factor of the membrane that the reset leaves:
    c_t = (a_t + h_t g_{t+1} + C g_{t+1}) p'_t          credit times slope
    g_t = c_t + beta k_t g_{t+1}                        = ∂L/∂J_t, credit of the input current
Direct credit misses both; this carries them. It looks at the pass's own later probabilities, so with λ = 1 it must
come from an independent copy, as all credit does there.

The same linear map the other way: what innovations ε and changes δJ of the input currents do to the spikes,
    δu_t = beta k_{t-1} δu_{t-1} + h_{t-1} e_{t-1} + C^T e_{t-1} + δJ_t,    e_t = ε_t + p'_t δu_t,
so that sum_t a_t e_t = sum_t (a + h g + C g)_t ε_t + g_t δJ_t.

A layer of another library brings equations of its own. There the graph of its own steps, at fixed spikes, takes the
place of beta, k, h and C: what it carries from one step to the next is known, and one step's vector-Jacobian product
leads from the credit of x_t and of the states after t to that of J_t, of the spikes at t-1 and of the states before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ulr_snn.credit.maps import Full, Path
from ulr_snn.kernels.pool import empty_like
from ulr_snn.model.neurons import SpikingNeuron
from ulr_snn.sites.records import Record


@dataclass
class Recurrence:
    """One pass of one layer, linearised along its reset and its recurrent weights.

    slope: gives p' per unit of membrane, anew; membrane: gives u where the reset needs it; all [T, B, ...].
    path, weight: of the recurrent current, as learned; None where there is none, or nothing is learned yet.
    fused: credit at one go, where there is a kernel (`Record.fused_credit`).
    """

    neuron: SpikingNeuron
    slope: Callable[[], Tensor]
    spikes: Tensor
    membrane: Callable[[], Tensor]
    path: Path | None = None
    weight: Tensor | None = None
    fused: Callable[[Tensor, Tensor, bool, bool, Tensor | None], Any] | None = None

    def _steps(self) -> tuple[Tensor, Tensor]:
        """beta k_t and h_t, broadcast over time where they are constant."""
        beta = self.neuron.beta.detach().clamp(0, 1)
        steps = len(self.spikes)
        if self.neuron.reset == "zero":
            return beta * (1 - self.spikes), -beta * self.membrane()
        h = -self.neuron.threshold.detach() if self.neuron.reset == "subtract" else torch.zeros_like(beta)
        return beta.expand(steps, *beta.shape), h.expand(steps, *h.shape)

    def credit(
        self, a: Tensor, totals: bool = True, later: Tensor | None = None, overwrite: bool = False
    ) -> tuple[Tensor | None, Tensor]:
        """(a + h g + C g, g) [T, B, ...]: total credit of every spike, if it is asked for, and credit ∂L/∂J of every
        input current. later: g [B, ...] of the step after the last, which becomes that of the first. overwrite: a is
        not needed any more."""
        later = a.new_zeros(a.shape[1:]) if later is None else later
        if self.fused is not None and (self.weight is None or self._dense):
            done = self.fused(a, later, totals, overwrite, self.weight)
            if done is not None:
                return done
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
        """Whether the recurrent weights are a matrix."""
        return isinstance(self.path, Full) and self.spikes.ndim == 3

    def _through(self, h: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
        """(a_t, h_t, g, out) -> a_t + h_t g + C g, all [B, ...]."""
        weight, threshold = self.weight, self.neuron.threshold
        uniform = self.neuron.reset == "none" or (self.neuron.reset == "subtract" and threshold.numel() == 1)
        if weight is not None and self._dense and uniform:
            both = (weight + torch.diag(h[0].expand(len(weight)))).T  # to itself a neuron's reset is one more weight
            return lambda a_t, _, g, out: torch.addmm(a_t, g, both, out=out)

        def through(a_t: Tensor, h_t: Tensor, g: Tensor, out: Tensor) -> None:
            torch.addcmul(a_t, g, h_t, out=out)
            if weight is not None:
                out += self.path.backward(weight, g)

        return through

    def response(self, innovations: Tensor, currents: Tensor | None = None) -> Tensor:
        """e [T, B, ...]: innovations and changes of the input currents, with what they do to the layer's spikes."""
        kept, h = self._steps()
        slope = self.slope()
        response = torch.empty_like(innovations)
        moved = torch.zeros_like(innovations[0])
        for t in range(len(innovations)):
            if currents is not None:
                moved = moved + currents[t]
            torch.addcmul(innovations[t], moved, slope[t], out=response[t])
            moved = kept[t] * moved + h[t] * response[t]
            if self.weight is not None:
                moved = moved + self.path.forward(self.weight, response[t])
        return response


@dataclass
class StepRecurrence:
    """One pass of one layer of another library, linearised along its own steps."""

    record: Record

    def credit(self, a: Tensor, totals: bool = True, later: None = None, twice: bool = False) -> tuple[Tensor, Tensor]:
        """As `Recurrence.credit`, always with totals, from the last step of the sequence on; twice: differentiable in
        a."""
        trace, arrived, slope = self.record.trace, self.record.arrived, self.record.response
        if self.record.whole:
            (current,) = gradients([(trace.x[0], a * slope)], arrived, twice)
            return a, torch.zeros_like(arrived[0]) if current is None else current
        total, currents = [], []
        arriving, carried = torch.zeros_like(a[0]), []  # what later steps say about this step's spikes and states
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
        """As `Recurrence.response`: the derivative of sum_t total_t ε_t + g_t δJ_t with respect to a."""
        a = torch.zeros_like(innovations, requires_grad=True)
        with torch.enable_grad():
            total, arrived = self.credit(a, twice=True)
        sums = [(total, innovations)] + ([(arrived, currents)] if currents is not None else [])
        return gradients(sums, [a], twice=False)[0]


def partial(states: list[Tensor], totals: list[Tensor | None], twice: bool) -> list[Tensor | None]:
    """Derivatives in the states of one time step, each with the others as they are, from those of autograd: in a state
    of which another one is made, these hold what it does by way of that other, too."""
    made = [i for i, state in enumerate(states) if state.grad_fn is not None]  # not cut off since then
    order = sorted(made, key=lambda i: states[i].grad_fn._sequence_nr(), reverse=True)
    found = list(totals)
    for place, i in enumerate(order):
        earlier = order[place + 1 :]
        if found[i] is None or not earlier:
            continue
        for j, through in zip(
            earlier, gradients([(states[i], found[i])], [states[j] for j in earlier], twice), strict=True
        ):
            if through is not None:
                found[j] = found[j] - through
    return found


def recurrence_of(
    record: Record, read: bool = True, path: Path | None = None, weight: Tensor | None = None
) -> Recurrence | StepRecurrence:
    """Of one pass of a layer. read: whether recurrent weights are taken as they are; else path and weight are of what
    has been learned of them."""
    if record.trace is not None:
        return StepRecurrence(record)
    recurrent = getattr(record.neuron, "recurrent", None)
    if recurrent is not None and (read or not record.neuron.learns_recurrence):
        path = Full(*[tuple(record.spikes.shape[2:])] * 2)
        weight = recurrent.weight.detach().T.to(record.x.dtype)
    gives = record.response_of_membrane, record.spikes.detach(), record.membrane
    return Recurrence(record.neuron, *gives, path, weight, record.fused_credit)


def gradients(known: list[tuple[Tensor, Tensor]], wanted: list[Tensor], twice: bool) -> list[Tensor | None]:
    """Σ gradient · ∂output/∂wanted over pairs of outputs and their gradients; None where nothing depends on it."""
    known = [(output, gradient) for output, gradient in known if output.requires_grad]
    asked = [tensor for tensor in wanted if tensor.requires_grad]
    found = iter([None] * len(asked))
    if known and asked:
        outputs, weights = zip(*known, strict=True)
        found = iter(
            torch.autograd.grad(outputs, asked, weights, retain_graph=True, create_graph=twice, allow_unused=True)
        )
    return [next(found) if tensor.requires_grad else None for tensor in wanted]
