"""Step sizes of `train`'s default optimizer, from how far a step moves membranes and outputs.

Adam moves every weight by about the learning rate, whatever its gradient. If n inputs have leaky traces of mean m, such
a step moves a membrane by up to lr n m. A move by many thresholds makes a layer silent or saturated, and few spikes
teach it to return. All parameters move at once, and towards the same loss, so that their moves add up. A readout of
average rates has no thresholds and needs large weights, which small steps reach too slowly. So a parameter's learning
rate is

    lr min(1, C / G)     of parameters that feed a spiking layer
    lr max(READOUT / τ, min(OUTPUTS / H, READOUT, SIZE W))     of parameters of a readout, with exact gradients

    G = sum over a parameter's entries of |m| / threshold, m the mean of ∂u/∂entry over samples, times and neurons
    C = the largest move of one parameter at a site, so that Σ min(G, C) = REACH over all; infinite if Σ G is smaller
    H = the same sum for an output that the loss sees, without a threshold: how far a step of learning rate 1 moves it
    W = root mean square of its weights at the start, infinite of parameters of one dimension
    τ = time steps of the outputs that the loss adds up (1 where it averages over them)

H is small after few neurons, or neurons that hardly fire; a readout then needs large weights. But credit for the layers
below goes through the readout, and layers cannot follow a readout that changes sign. The term SIZE W bounds its steps
for that reason. All this is for readouts that are linear up to a common offset of all outputs. Other readouts, such as
a long short-term memory, have at most NONLINEAR times lr, because larger steps destroy what they have learned.

Where only a readout learns, as behind a reservoir, no layer has to follow it, and its factor is 1 at least.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.kernels import ranks
from ulr_snn.losses.evaluation import LossEvaluation
from ulr_snn.model.passes import Pass

REACH = 200.0  # thresholds by which a step of learning rate 1 may move membranes, in all layers together
READOUT = 6.0  # largest factor of a readout
NONLINEAR = 0.5  # largest factor of a readout that is not linear
OUTPUTS = 50.0  # how far a step of learning rate 1 may move an output
SIZE = 140.0  # multiple of W by which a step of learning rate 1 may move a readout weight
LINEAR = 0.03  # relative error of `linear`
OFTEN, SELDOM = 4, 16  # G is measured at the first OFTEN steps, then at every SELDOM-th


class StepSizes:
    """The measured learning rate factors of a training.

    reach: G of each parameter by site and name, and H under "outputs"; size: W of each matrix or kernel;
    summed: τ, None before it is known; linear: True if the readout is linear.
    """

    def __init__(self) -> None:
        self.reach: dict[str, dict[str, float]] = {}
        self.size: dict[str, float] = {}
        self.summed: float | None = None
        self.linear = True

    def measure(self, model: nn.Module, p: Pass, step: int, whole: bool = True) -> None:
        """Measures τ in the first pass, and G and H where due. whole: the pass has all time steps, as H needs."""
        if self.summed is None and p.error is not None:
            self.summed = times_summed(p.evaluation)
        if not self.due(step):
            return
        parameters = {name: q for name, q in model.named_parameters() if q.requires_grad}
        self.size = self.size or {
            name: float(q.detach().norm()) / q.numel() ** 0.5 for name, q in parameters.items() if q.ndim > 1
        }
        for record in p.records:
            x = record.x
            self.reach.pop(record.site, None)
            if x.requires_grad:
                unit = record.scale / record.neuron.threshold.detach() * (1 if record.mask is None else record.mask)
                self.reach[record.site] = reach(derivatives(x * unit.to(x.dtype) / x.numel(), parameters))
        if whole and p.outputs.requires_grad and self.summed is not None:
            signs = 1.0 - 2.0 * (torch.arange(p.outputs.shape[-1], device=p.outputs.device) % 2)
            values = p.outputs * (signs - signs.mean()) * (self.summed / p.outputs.numel())  # without a common offset
            found = derivatives(values, parameters)
            # With little input any readout looks linear, so one that was once found not to be stays so.
            self.linear = self.linear and bool(found) and linear(values, parameters, found)
            self.reach["outputs"] = reach(found) if self.linear else {}

    def due(self, step: int) -> bool:
        """True if this step measures."""
        return step < OFTEN or step % SELDOM == 0

    def factor(self, parameter: str, sources: list[str], bound: float | None = None, alone: bool = False) -> float:
        """Returns the learning rate factor of a parameter with gradients from these sites or "outputs". bound: that of
        `bound`, if it is known. alone: no parameter has a gradient from a site."""
        if sources == ["outputs"]:
            least = READOUT / (self.summed or 1.0)
            if not self.linear:
                return min(NONLINEAR, least)
            moved = self.reach.get("outputs", {}).get(parameter)
            size = self.size.get(parameter, math.inf)
            return max(least, min(OUTPUTS / moved, READOUT, SIZE * size) if moved else 0.0, float(alone))
        reached = [self.reach.get(source, {}).get(parameter) for source in sources]
        bound = self.bound() if bound is None else bound
        return min([1.0, *(bound / g for g in reached if g)])

    def bound(self) -> float:
        """Returns C, which is the same for all parameters."""
        left, sites = REACH, [found for site, found in self.reach.items() if site != "outputs"]
        ordered = sorted(g for found in sites for g in found.values() if math.isfinite(g))
        for i, g in enumerate(ordered):
            if g * (len(ordered) - i) >= left:
                return left / (len(ordered) - i)
            left -= g
        return math.inf

    def state_dict(self) -> dict[str, Any]:
        reach = {source: dict(found) for source, found in self.reach.items()}
        return {"reach": reach, "size": dict(self.size), "summed": self.summed, "linear": self.linear}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reach = {source: dict(found) for source, found in state["reach"].items()}
        self.size = dict(state.get("size", {}))
        self.summed, self.linear = state["summed"], state.get("linear", True)


def times_summed(evaluation: LossEvaluation) -> float:
    """Returns τ at the start of training: the largest over all losses, and 1 for outputs without a time axis.

    The gradient of a cross-entropy in all its logits sums to about 1 in absolute values. So a loss whose gradient sums
    to less in a time step averages over time. Losses without a gradient are taken to add time steps up.
    """
    found = [1.0]
    for i, (error, weight) in enumerate(zip(evaluation.errors, evaluation.weights, strict=True)):
        if error is not None and error.ndim >= 3 and weight:
            asked = ranks.mean(error.abs().flatten(2).sum(2)).item() / abs(weight)
            found.append(len(error) * (1.0 if i in evaluation.treatment.smoothed else min(1.0, asked)))
    return max(found)


def linear(values: Tensor, parameters: dict[str, nn.Parameter], found: dict[str, Tensor]) -> bool:
    """True if Σ parameter · derivative = Σ values up to LINEAR, as for values of a single linear readout."""
    total = sum(float((parameters[name].detach() * g).sum()) for name, g in found.items())
    given, size = ranks.averaged([values.detach().sum(), values.detach().abs().sum()])
    return abs(total - float(given)) <= LINEAR * float(size)


def reach(found: dict[str, Tensor]) -> dict[str, float]:
    """Returns Σ |derivative| of each parameter: how far a sign step of size 1 moves the sum of the values. In double
    precision, so that the number of threads that add up changes no bit of a step in single precision."""
    return {name: float(g.abs().sum(dtype=torch.float64)) for name, g in found.items()}


def derivatives(values: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Returns the derivatives of the sum of the values in each parameter that they depend on, averaged over ranks."""
    if not parameters:
        return {}
    found = torch.autograd.grad(values.sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
    reached = {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
    return dict(zip(reached, ranks.averaged(list(reached.values())), strict=True))
