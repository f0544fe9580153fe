"""Online learning: an update at every time step, with memory that does not grow with the number of time steps.

The loss must be a sum over time. The future is not known at time t, so credit is that of the step's own loss l_t:

    a_t = ∂l_t/∂s_t + C g_t        direct credit, and learned feedback from the layer that the spikes feed
    g_t = a_t p'_t                 ∂l_t/∂J_t within the time step

The effect of a spike on later steps (through membranes, resets and recurrent weights) is left out. This truncation, as
in OTTT (arXiv 2210.04195) and e-prop (Bellec et al. 2020), is a bias in addition to that of C. The effect of all
earlier inputs x on a layer's own membrane is exact, by their leaky sum:

    g_W = Σ_t g_t ⊗ trace_t,        trace_t = beta trace_{t-1} + x_t

and for an affine map F between two layers, with n_t = beta n_{t-1} + 1,

    Σ_k beta^(t-k) F(x_k) = F(trace_t) + (n_t - 1) F(0)
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ulr_snn.credit.base import Credit
from ulr_snn.credit.formula import enter, enter_losses
from ulr_snn.credit.pooling import SpikePooling
from ulr_snn.estimators.base import Estimate
from ulr_snn.kernels import ranks
from ulr_snn.kernels.precision import widened
from ulr_snn.kernels.state import State
from ulr_snn.losses.evaluation import LossEvaluation, evaluate_losses
from ulr_snn.memory.chunk import Chunk, ChunkSite, Fired
from ulr_snn.memory.chunked import RegressionRows, see_farthest
from ulr_snn.memory.chunks import Chunks
from ulr_snn.memory.split import in_words, modules_in_order
from ulr_snn.memory.step import Step
from ulr_snn.model.call import check_outputs
from ulr_snn.model.chain import EachStep, Shape
from ulr_snn.model.events import Events
from ulr_snn.model.neurons import LIF, Fold, LeakyReadout, TimeAverage
from ulr_snn.sites.binding import bind_sites
from ulr_snn.sites.records import Record

AFFINE = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Flatten, nn.Unflatten, nn.Identity, Shape),
)


def affine(module: nn.Module) -> bool:
    """True if the module is a known affine map of each time step."""
    if isinstance(module, nn.Sequential) and type(module) in (Fold, EachStep, nn.Sequential):
        return all(affine(part) for part in module)
    return type(module) in AFFINE


def learns(module: nn.Module) -> bool:
    """Returns whether a module has trainable parameters."""
    return any(q.requires_grad for q in module.parameters())


@dataclass(frozen=True)
class Stage:
    """The modules between two layers.

    still: modules before the first trainable one; learning: all later modules; into: the neurons or readout that the
    modules feed, None for the outputs.
    """

    still: list[nn.Module]
    learning: list[nn.Module]
    into: LIF | LeakyReadout | None

    @classmethod
    def of(cls, modules: list[nn.Module], into: LIF | LeakyReadout | None) -> "Stage":
        first = next((i for i, module in enumerate(modules) if learns(module)), len(modules))
        return cls(modules[:first], modules[first:], into)


def stages(model: nn.Module) -> list[Stage]:
    """Splits a model that runs its modules one after another. The last stage ends in the outputs."""
    found: list[Stage] = []
    between: list[nn.Module] = []
    for module in modules_in_order(model):
        if isinstance(module, LIF | LeakyReadout):
            found.append(Stage.of(between, module))
            between = []
        else:
            between.append(module)
    if between or not found or not isinstance(found[-1].into, LeakyReadout):
        found.append(Stage.of(between, None))
    return found


def without_trace(model: nn.Module) -> str | None:
    """Returns why a trace of the inputs is not enough for some layer of the model; None if it is enough."""
    found = stages(model)
    if any(type(module) is TimeAverage for module in modules_in_order(model)):
        return "TimeAverage leaves single time steps without a loss"
    for stage in found:
        into, name = stage.into, type(stage.into).__name__
        if into is None:
            continue
        if into.beta.requires_grad or (isinstance(into, LIF) and into.threshold.requires_grad):
            return f"{name} learns its leak or threshold, for which it keeps no trace"
        if into.beta.numel() > 1 or (isinstance(into, LIF) and into.reset == "zero"):
            return f"{name} with a leak of each neuron's own, or reset 'zero', needs a trace for every weight"
        if isinstance(into, LeakyReadout) and stage is not found[-1]:
            return "LeakyReadout is not the last module"
        if other := next((module for module in stage.learning if not affine(module)), None):
            return f"{in_words(other)}, from the first weights on that lead to {name}, is not known to be affine"
    return None


class Trace:
    """The leaky sum of the inputs of a layer's weights, and n, the leaky sum of ones."""

    def __init__(self, beta: Tensor) -> None:
        self.beta = beta.detach().clamp(0, 1).reshape(())
        self.sum = torch.empty(0)  # [1, B + 1, ...]; the last row stays 0, for F(0)
        self.n = torch.zeros_like(self.beta)

    def add(self, x: Tensor) -> None:
        """Adds the input x [1, B, ...] of a time step."""
        if not self.sum.numel():
            self.sum = widened(x.new_zeros(1, x.shape[1] + 1, *x.shape[2:]))
        self.sum.mul_(self.beta)
        self.sum[:, :-1] += x
        self.n = self.beta * self.n + 1

    def gradients(self, modules: list[nn.Module], g: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (tensor, gradient) pairs that add the parameters' gradients, for g = ∂L/∂output [1, B, ...]."""
        if len(modules) == 1 and type(modules[0]) is nn.Linear:  # saves the forward product
            linear, rows = modules[0], g.flatten(0, -2)
            gradient = rows.to(self.sum.dtype).T @ self.sum[:, :-1].flatten(0, -2)
            yield linear.weight, gradient.to(linear.weight.dtype)
            if linear.bias is not None:
                yield linear.bias, (self.n * rows.sum(0)).to(linear.bias.dtype)
            return
        x = self.sum.to(next(q for module in modules for q in module.parameters()).dtype)
        for module in modules:
            x = module(x)
        yield x, torch.cat([g, (self.n - 1) * g.sum(1, keepdim=True)], 1)


class OnlineRun:
    """A training step on a batch, one time step after another."""

    def __init__(self, step: Step) -> None:
        self.training_step, self.learner, self.batch, self.bound = step, step.learner, step.batch, step.bound
        forward = step.plain_forward()
        self.treatment, self.formula = step.structure.treatment, step.formula
        self.noise = forward.noise(self.batch.samples, [0], self.batch.frames.device)
        self.stages = stages(step.model)
        self.traces = [None if s.into is None else Trace(s.into.beta) for s in self.stages]
        neurons = {name: neuron for name, neuron in step.bound.layers if isinstance(neuron, LIF)}
        weights = {name: neuron.recurrent for name, neuron in neurons.items()}
        self.recurring = {name: module for name, module in weights.items() if isinstance(module, nn.Module)}
        self.recurrent = {name: Trace(neurons[name].beta) for name in self.recurring}
        self.states: dict[str, State] = {}
        self.farthest: dict[str, Tensor] = {}  # `Fired.farthest` so far
        self.membrane: Tensor | None = None  # of the readout
        sites = [name for name, _ in step.bound.layers]
        rows = ranks.all_rows(self.batch.valid), ranks.joined(self.batch.samples)
        regressions = self.learner.prediction.maps.regressions(sites, *rows, self.learner.step)
        self.learned = [RegressionRows(regression) for regression in regressions if not regression.before]
        self.learner.step += 1
        self.usable = True  # False after a loss that is not finite

    def step(self, t: int) -> Estimate:
        """Runs time step t, after all earlier ones, and adds the gradient of the batch's mean loss at t."""
        learner = self.learner
        torch.clear_autocast_cache()  # it holds the weights before the last update
        records: list[Record] = []
        fired: dict[str, Fired] = {}
        sites = [
            ChunkSite(name, i, learner.level, self.noise, t, self.states.get(name), fired, records)
            for i, (name, _) in enumerate(self.bound.layers)
        ]
        lengths = None if self.batch.lengths is None else (self.batch.lengths - t).clamp(0, 1)
        with bind_sites(self.bound.model, sites, lengths, self.bound.layers), SpikePooling():
            outputs = self._forward(Events.of(self.batch.frames[t : t + 1], self.batch.dtype), fired)
        self.states = {name: layer.state for name, layer in fired.items()}
        with torch.no_grad():
            for rows in self.learned:
                rows.see(range(t, t + 1), fired, self.batch.valid)
        found, share = self._evaluate(t, outputs)
        loss = found.loss * share
        stats = {"copies": 1, "step": learner.step, "time": t, "times": self.batch.steps}
        if self.training_step.usable(loss, updated=t > 0):
            assert found.error is not None
            self._backward(outputs, found.error * share.view(1, -1, *[1] * (outputs.ndim - 2)), records)
            weight = share / self.batch.samples
            enter_losses([(other, weight) for other in found.others], [found], self.bound.model)
            see_farthest(self.farthest, fired)
            if t == self.batch.steps - 1:
                learner.level.store_distances(self.farthest)
        else:
            self.usable, stats["skipped"] = False, True
        if t == self.batch.steps - 1 and self.usable:
            for rows in self.learned:
                rows.learn(learner.prediction.maps)
        return Estimate(loss, outputs.detach()[None], stats, self.batch)

    def _forward(self, x: Tensor, fired: dict[str, Fired]) -> Tensor:
        """Returns the outputs [1, B, ...] with graphs from each layer's spikes, and updates the traces."""
        for stage, trace in zip(self.stages, self.traces, strict=True):
            with torch.enable_grad():
                for module in stage.still:
                    x = module(x)
                if trace is not None and stage.learning:
                    trace.add(x.detach())
                for module in stage.learning:
                    x = module(x)
                if isinstance(stage.into, LeakyReadout):
                    x = stage.into(x, self.membrane)
                    self.membrane = x[0].detach()
                elif stage.into is not None:
                    with torch.enable_grad():  # autocast of the spikes belongs to the graph
                        x = stage.into(x)
        for name, trace in self.recurrent.items():
            trace.add(fired[name].before[None])
        check_outputs(x, 1, self.batch.samples)
        return x

    def _evaluate(self, t: int, outputs: Tensor) -> tuple[LossEvaluation, Tensor]:
        """Returns the evaluation of the loss at a time step, and the step's share in the loss of each sample [B]."""
        targets = self.batch.targets.part(slice(t, t + 1), slice(None))
        found = evaluate_losses(self.batch.objective, self.treatment, outputs, {}, targets, None, self.noise)
        if found.error is None:
            raise RuntimeError("an update at every time step was begun for a loss without a gradient")
        return found, self.batch.share[t].to(outputs.dtype)

    def _backward(self, outputs: Tensor, error: Tensor, records: list[Record]) -> None:
        """Adds the gradient of a time step: the formula's ∂L/∂J of each layer, times the traces of its inputs."""
        passed = Chunk([(outputs, error)], records)
        found = self.learner.prediction.credit_at_once(passed)
        credits = [Credit(None, found.get(record.site)) for record in records]
        weight = outputs.new_full((self.batch.samples,), 1 / self.batch.samples)
        given = {part.site: part for part in self.formula.contributions(passed, credits, weight)}
        stages = zip(self.stages, self.traces, [record.site for record in records] + [None], strict=True)
        pairs: list[tuple[Tensor, Tensor]] = []
        for stage, trace, site in stages:  # records are in the order of the stages
            if site in given and stage.learning:
                g = given[site].gradient
                pairs += [(outputs, g)] if trace is None else trace.gradients(stage.learning, g)
        for name, weights in self.recurring.items():
            if name in given:
                pairs += self.recurrent[name].gradients([weights], given[name].gradient)
        wanted: list[Tensor] = [q for q in self.bound.model.parameters() if q.requires_grad]
        enter([pair for pair in pairs if pair[0].requires_grad], wanted)


@dataclass(frozen=True)
class OneTimeStep(Chunks):
    """Keeps one time step. Every time step ends with an update."""

    online: ClassVar[bool] = True
    lean: ClassVar[bool] = True

    def refusal(self, why: str) -> str:
        return f"Online makes an update at every time step, but {why}; use ULR()"

    def estimates(self, step: Step) -> Iterator[Estimate]:
        run = self.start(step)
        return (run.step(t) for t in range(step.batch.steps))

    def start(self, step: Step) -> OnlineRun:
        """Prepares the batch of a step, and returns its run before the first time step."""
        self.possible(step)
        learner, unknown, first = step.learner, step.learner.structure is None, self.first(step)
        with nullcontext() if first is None else ranks.of_first(first[1].stop):
            p = None if first is None else self.sample(step, first)
            if unknown:
                self.possible(step)
                if p is not None and not learner.feedback.layers and step.usable(p.loss):
                    learner.prediction.learn_layers([p], learner.step)
            if p is not None:
                learner.measure(step.model, p, whole=False)
        step.count(1)
        learner.times = step.batch.steps
        return OnlineRun(step)

    def why_not(self, step: Step) -> str | None:
        if step.batch.objective.steps is None:
            return "the loss is not known to be a sum over time, as 'ce_rate' and 'mse' are"
        return without_trace(step.model) or super().why_not(step)

    def describe(self, step: Step) -> str:
        self.possible(step)
        self.first(step)  # raises UsageError if it is impossible
        return "one time step, with an update after each; credit is that of the step's own loss, the future left out"
