"""Step sizes of `train`'s own optimizer, from how far a step moves membranes and outputs.

Adam moves every weight by about the learning rate, whatever its gradient. What that does to a membrane depends on the
layer: the weights of n inputs with leaky traces of mean m, moved alike, move it by lr n m. Where that is many
thresholds, a step throws the layer into another regime, silent or saturated, from which few spikes teach it to return.
A readout of rates averaged over time has no thresholds and needs large weights: there small steps take too long. So a
parameter's learning rate is

    lr min(1, REACH / G)     of parameters that feed a spiking layer
    lr READOUT / τ           where the gradient is exact, through the outputs alone

    G = sum over a parameter's entries of |m| / threshold, m the mean of ∂u/∂entry over samples, times and neurons
    τ = time steps of the outputs that the loss adds up (1 where it averages over them)

Where τ > READOUT and layers begin at rest, such a readout learns more slowly than they do. In their silence gradients
are single spikes of noise, of each of which Adam, whose steps have one size whatever the gradient, makes a step of
several learning rates. The layers wake by these, and the readout does not know yet what to do with their spikes, so
that firing less is what lowers the loss, and they fall silent for good. So there all rates are lower at first. Later,
when they should fire by what they have learned, the rates are higher for it:

    factor max(1/3, (progress / SLOW)²), at most MOST, where the length of the training is known
"""

from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.judgement import Judgement
from ulr_snn.passes import Pass

REACH = 200.0  # thresholds that a step of learning rate 1 may move a membrane by
READOUT = 6.0
SLOW = 0.2  # of the training: until then all rates are lower; LEAST: what is left of them at first; MOST: the highest
LEAST, MOST = 1 / 3, 2.5
OFTEN, SELDOM = 32, 16  # G is measured at each of the first steps, then at every so many


class StepSizes:
    """reach: by site, G of each parameter by name. summed: τ, None before it is known."""

    def __init__(self) -> None:
        self.reach: dict[str, dict[str, float]] = {}
        self.summed: float | None = None

    def measure(self, model: nn.Module, p: Pass, step: int) -> None:
        """Takes τ from the first pass, and all G from one pass, where it is due at this step."""
        if self.summed is None and p.error is not None:
            self.summed = times_summed(p.judgement)
        if not self.due(step):
            return
        parameters = {name: q for name, q in model.named_parameters() if q.requires_grad}
        for r in p.records:
            if r.x.requires_grad:
                unit = r.scale / r.neuron.threshold.detach() * (1 if r.mask is None else r.mask)
                self.reach[r.site] = reach(r.x * unit.to(r.x.dtype) / r.x.numel(), parameters)

    def due(self, step: int) -> bool:
        """Whether this is a step to measure at."""
        return step < OFTEN or step % SELDOM == 0

    def factor(self, parameter: str, sources: list[str]) -> float:
        """Of the learning rate, for a parameter whose gradient comes from these sites or "outputs"."""
        if sources == ["outputs"]:
            return READOUT / (self.summed or 1.0)
        reached = [self.reach.get(source, {}).get(parameter) for source in sources]
        return min([1.0, *(REACH / g for g in reached if g)])

    def at_rest(self, progress: float) -> float:
        """Of all learning rates, where layers began at rest and a readout learns through the outputs alone."""
        if self.summed is None or self.summed <= READOUT:
            return 1.0
        return min(MOST, max(LEAST, (progress / SLOW) ** 2))

    def state_dict(self) -> dict[str, Any]:
        return {"reach": {source: dict(found) for source, found in self.reach.items()}, "summed": self.summed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reach = {source: dict(found) for source, found in state["reach"].items()}
        self.summed = state["summed"]


def times_summed(judgement: Judgement) -> float:
    """τ at the start of training, of several losses that of the one which adds up most. Of a loss with a gradient, from
    ∂L/∂outputs: what a cross-entropy asks of all its logits together is about 1, so that a loss that asks less of the
    outputs of a time step averages over them. Of one without, that it adds them up. 1 for outputs without a time axis.
    """
    found = [1.0]
    for i, (error, weight) in enumerate(zip(judgement.errors, judgement.weights, strict=True)):
        if error is not None and error.ndim >= 3 and weight:
            asked = error.abs().flatten(2).sum(2).mean().item() / abs(weight)
            found.append(len(error) * (1.0 if i in judgement.judging.smoothed else min(1.0, asked)))
    return max(found)


def reach(values: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, float]:
    """By how much each parameter's entries, all moved by 1 in the right direction, move the sum of the values."""
    if not parameters:
        return {}
    moved = torch.autograd.grad(values.sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
    return {name: float(q.abs().sum()) for name, q in zip(parameters, moved, strict=True) if q is not None}
