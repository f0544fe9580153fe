"""Step sizes of `train`'s own optimizer, from how far a step moves membranes and outputs.

Adam moves every weight by about the learning rate, whatever its gradient. What that does to a membrane depends on the
layer: the weights of n inputs with leaky traces of mean m, moved alike, move it by lr n m. Where that is many
thresholds, a step throws the layer into another regime, silent or saturated, from which few spikes teach it to return.
A readout of rates averaged over time has no thresholds and needs large weights: there small steps take too long. So a
parameter's learning rate is

    lr min(1, REACH / G)     of parameters that feed a spiking layer
    lr max(READOUT / τ, min(OUTPUTS / H, MOST_READOUT, SIZE W))     of a readout's, whose gradient is exact

    G = sum over a parameter's entries of |m| / threshold, m the mean of ∂u/∂entry over samples, times and neurons
    H = the same sum for an output that the loss sees, without a threshold: how far a step of learning rate 1 moves it
    W = root mean square of its weights at the start, infinite of parameters of one dimension
    τ = time steps of the outputs that the loss adds up (1 where it averages over them)

Behind few neurons, or such as hardly fire, H is small, and a readout needs large weights to say anything. But credit
for the layers below goes through it, and where steps turn it around they cannot follow: so a step is at most a part of
what weights are at the start. This is for readouts that are linear, but for an offset of all outputs. Others, such as
a long short-term memory, have at most lr: larger steps destroy what they have learned.

Where τ > READOUT and layers begin at rest, such a readout learns more slowly than they do. In their silence gradients
are single spikes of noise, of each of which Adam, whose steps have one size whatever the gradient, makes a step of
several learning rates. The layers wake by these, and the readout does not know yet what to do with their spikes, so
that firing less is what lowers the loss, and they fall silent for good. So there all rates are lower at first. Later,
when they should fire by what they have learned, the rates are higher for it:

    factor max(1/3, (progress / SLOW)²), at most MOST, where the length of the training is known
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.losses.evaluation import LossEvaluation
from ulr_snn.model.passes import Pass

REACH = 200.0  # thresholds that a step of learning rate 1 may move a membrane by
READOUT = 6.0
SLOW = 0.2  # of the training: until then all rates are lower; LEAST: what is left of them at first; MOST: the highest
LEAST, MOST = 1 / 3, 2.5
OUTPUTS, MOST_READOUT = 50.0, 20.0  # that far a step of learning rate 1 may move an output; the largest factor for it
SIZE = 140.0  # that many times W it may move a weight of a readout
LINEAR = 0.03  # of all values: what a sum of linear ones may be off by
OFTEN, SELDOM = 4, 16  # G is measured at each of the first steps, then at every so many


class StepSizes:
    """reach: by site, G of each parameter by name, and H by "outputs". size: W of each parameter of several dimensions.
    summed: τ, None before it is known. linear: whether outputs are linear in what they alone teach."""

    def __init__(self) -> None:
        self.reach: dict[str, dict[str, float]] = {}
        self.size: dict[str, float] = {}
        self.summed: float | None = None
        self.linear = True

    def measure(self, model: nn.Module, p: Pass, step: int, whole: bool = True) -> None:
        """Takes τ from the first pass, and all G and H from one pass, where it is due at this step. whole: the pass is
        over all time steps; the first ones alone do not tell H."""
        if self.summed is None and p.error is not None:
            self.summed = times_summed(p.evaluation)
        if not self.due(step):
            return
        parameters = {name: q for name, q in model.named_parameters() if q.requires_grad}
        self.size = self.size or {
            name: float(q.detach().norm()) / q.numel() ** 0.5 for name, q in parameters.items() if q.ndim > 1
        }
        for r in p.records:
            if r.x.requires_grad:
                unit = r.scale / r.neuron.threshold.detach() * (1 if r.mask is None else r.mask)
                self.reach[r.site] = reach(derivatives(r.x * unit.to(r.x.dtype) / r.x.numel(), parameters))
        if whole and p.outputs.requires_grad and self.summed is not None:
            signs = 1.0 - 2.0 * (torch.arange(p.outputs.shape[-1], device=p.outputs.device) % 2)
            values = p.outputs * (signs - signs.mean()) * (self.summed / p.outputs.numel())  # no offset of all counts
            found = derivatives(values, parameters)
            # Where hardly anything comes in, others are nearly linear, too: what has once been none is none.
            self.linear = self.linear and bool(found) and linear(values, parameters, found)
            self.reach["outputs"] = reach(found) if self.linear else {}

    def due(self, step: int) -> bool:
        """Whether this is a step to measure at."""
        return step < OFTEN or step % SELDOM == 0

    def factor(self, parameter: str, sources: list[str]) -> float:
        """Of the learning rate, for a parameter whose gradient comes from these sites or "outputs"."""
        if sources == ["outputs"]:
            least = READOUT / (self.summed or 1.0)
            if not self.linear:
                return min(1.0, least)
            moved = self.reach.get("outputs", {}).get(parameter)
            size = self.size.get(parameter, math.inf)
            return max(least, min(OUTPUTS / moved, MOST_READOUT, SIZE * size) if moved else 0.0)
        reached = [self.reach.get(source, {}).get(parameter) for source in sources]
        return min([1.0, *(REACH / g for g in reached if g)])

    def at_rest(self, progress: float) -> float:
        """Of all learning rates, where layers began at rest and a readout learns through the outputs alone."""
        if self.summed is None or self.summed <= READOUT:
            return 1.0
        return min(MOST, max(LEAST, (progress / SLOW) ** 2))

    def state_dict(self) -> dict[str, Any]:
        reach = {source: dict(found) for source, found in self.reach.items()}
        return {"reach": reach, "size": dict(self.size), "summed": self.summed, "linear": self.linear}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reach = {source: dict(found) for source, found in state["reach"].items()}
        self.size = dict(state.get("size", {}))
        self.summed, self.linear = state["summed"], state.get("linear", True)


def times_summed(evaluation: LossEvaluation) -> float:
    """τ at the start of training, of several losses that of the one which adds up most. Of a loss with a gradient, from
    ∂L/∂outputs: what a cross-entropy asks of all its logits together is about 1, so that a loss that asks less of the
    outputs of a time step averages over them. Of one without, that it adds them up. 1 for outputs without a time axis.
    """
    found = [1.0]
    for i, (error, weight) in enumerate(zip(evaluation.errors, evaluation.weights, strict=True)):
        if error is not None and error.ndim >= 3 and weight:
            asked = error.abs().flatten(2).sum(2).mean().item() / abs(weight)
            found.append(len(error) * (1.0 if i in evaluation.treatment.smoothed else min(1.0, asked)))
    return max(found)


def linear(values: Tensor, parameters: dict[str, nn.Parameter], found: dict[str, Tensor]) -> bool:
    """Whether values are linear in the parameters that they depend on, as behind a single linear readout: the sum of
    parameters times derivatives is the sum of the values, as far as a few percent of both tell."""
    total = sum(float((parameters[name].detach() * g).sum()) for name, g in found.items())
    return abs(total - float(values.detach().sum())) <= LINEAR * float(values.detach().abs().sum())


def reach(found: dict[str, Tensor]) -> dict[str, float]:
    """By how much each parameter's entries, all moved by 1 in the right direction, move the sum of the values."""
    return {name: float(g.abs().sum()) for name, g in found.items()}


def derivatives(values: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Of the sum of the values, in each parameter that they depend on."""
    if not parameters:
        return {}
    found = torch.autograd.grad(values.sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
