"""Training that updates at every time step, with memory that does not grow with their number.

At time t nothing of the future is known, so credit is that of the step's own loss l_t, where the loss is a sum over
time:

    a_t = ∂l_t/∂s_t + C g_t        direct credit, and learned feedback from the layer that the spikes feed
    g_t = a_t p'_t                 ∂l_t/∂J_t within the time step

Left out is what a spike does to later steps, through membranes, resets and recurrent weights of its own layer and of
those after it: a truncation, as in OTTT (arXiv 2210.04195) and e-prop (Bellec et al. 2020), and a bias besides that of
C. Nothing is left out of what a membrane keeps of its layer's own inputs x, whose leaky sum stands for them all:

    g_W = Σ_t g_t ⊗ trace_t,        trace_t = beta trace_{t-1} + x_t

and for an affine map F between two layers, with n_t = beta n_{t-1} + 1,

    Σ_k beta^(t-k) F(x_k) = F(trace_t) + (n_t - 1) F(0)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ulr_snn.credit.base import Credit
from ulr_snn.credit.formula import enter
from ulr_snn.credit.pooling import SpikePooling
from ulr_snn.estimators.base import Estimate
from ulr_snn.kernels.precision import widened
from ulr_snn.kernels.state import State
from ulr_snn.losses.evaluation import evaluate_losses
from ulr_snn.losses.named import LOSSES
from ulr_snn.memory.chunk import Chunk, ChunkSite
from ulr_snn.memory.chunked import RegressionRows
from ulr_snn.memory.chunks import Chunks
from ulr_snn.memory.split import chain
from ulr_snn.memory.step import Step
from ulr_snn.model.call import check_outputs
from ulr_snn.model.events import Events
from ulr_snn.model.neurons import LIF, Fold, LeakyReadout, TimeAverage
from ulr_snn.sites.binding import bind_sites
from ulr_snn.sites.records import Record

AFFINE = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Flatten, nn.Unflatten, nn.Identity),
)


def affine(module: nn.Module) -> bool:
    """Whether it is known to be, of each time step by itself."""
    return type(module) in AFFINE or (type(module) in (Fold, nn.Sequential) and all(map(affine, module)))


def learns(module: nn.Module) -> bool:
    return any(q.requires_grad for q in module.parameters())


@dataclass(frozen=True)
class Stage:
    """What lies between two layers. still: the modules before the first one with something to learn; learning: those
    from there on; into: the neurons or the readout that they feed, None where they end in the outputs."""

    still: list[nn.Module]
    learning: list[nn.Module]
    into: LIF | LeakyReadout | None

    @classmethod
    def of(cls, modules: list[nn.Module], into: LIF | LeakyReadout | None) -> "Stage":
        first = next((i for i, module in enumerate(modules) if learns(module)), len(modules))
        return cls(modules[:first], modules[first:], into)


def stages(model: nn.Module) -> list[Stage]:
    """Of a model that runs its modules one after another; the last one ends in the outputs."""
    found, between = [], []
    for module in chain(model):
        if isinstance(module, LIF | LeakyReadout):
            found.append(Stage.of(between, module))
            between = []
        else:
            between.append(module)
    if between or not found or not isinstance(found[-1].into, LeakyReadout):
        found.append(Stage.of(between, None))
    return found


def without_trace(model: nn.Module) -> str | None:
    """Why one trace of its inputs does not do for a layer of the model; None where it does for all."""
    found = stages(model)
    if any(type(module) is TimeAverage for module in chain(model)):
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
        if bad := next((module for module in stage.learning if not affine(module)), None):
            return f"{type(bad).__name__}, from the first weights on that lead to {name}, is not known to be affine"
    return None


class Trace:
    """The leaky sum of what a layer's weights read, [1, B, ...], and n, that of ones."""

    def __init__(self, beta: Tensor) -> None:
        self.beta = beta.detach().clamp(0, 1).reshape(())
        self.sum: Tensor | None = None  # [1, B + 1, ...]; the last row, of no input, is where F(0) is found
        self.n = torch.zeros_like(self.beta)

    def add(self, x: Tensor) -> None:
        """x [1, B, ...]."""
        if self.sum is None:
            self.sum = widened(x.new_zeros(1, x.shape[1] + 1, *x.shape[2:]))
        self.sum.mul_(self.beta)
        self.sum[:, :-1] += x
        self.n = self.beta * self.n + 1

    def entries(self, modules: list[nn.Module], g: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Tensors in the graph of the modules' parameters, and the gradients that enter there, for ∂L/∂J g
        [1, B, ...] of what the modules give."""
        if len(modules) == 1 and type(modules[0]) is nn.Linear:  # without a forward product that nobody reads
            linear, rows = modules[0], g.flatten(0, -2)
            found = rows.to(self.sum.dtype).T @ self.sum[:, :-1].flatten(0, -2)
            yield linear.weight, found.to(linear.weight.dtype)
            if linear.bias is not None:
                yield linear.bias, (self.n * rows.sum(0)).to(linear.bias.dtype)
            return
        x = self.sum.to(next(q for m in modules for q in m.parameters()).dtype)
        for module in modules:
            x = module(x)
        yield x, torch.cat([g, (self.n - 1) * g.sum(1, keepdim=True)], 1)


class OnlineRun:
    """A batch that goes by, one time step after another."""

    def __init__(self, step: Step) -> None:
        self.training_step, self.learner, self.batch, self.bound = step, step.learner, step.batch, step.bound
        forward = step.plain_forward()
        self.treatment, self.formula = step.structure.treatment, step.formula
        self.noise = forward.noise(self.batch.samples, [0], self.batch.frames.device)
        self.stages = stages(step.model)
        self.traces = [None if s.into is None else Trace(s.into.beta) for s in self.stages]
        self.recurrent = {
            name: Trace(neuron.beta) for name, neuron in step.bound.layers if neuron.recurrent is not None
        }
        self.states: dict[str, State] = {}
        self.farthest: dict[str, Tensor] = {}  # see `ChunkSite`, so far
        self.membrane: Tensor | None = None  # of the readout
        sites = [name for name, _ in step.bound.layers]
        regressions = self.learner.prediction.regressions(
            sites, self.batch.valid, self.batch.samples, self.learner.step
        )
        self.learned = [RegressionRows(regression) for regression in regressions if not regression.before]
        self.learner.step += 1
        self.usable = True  # so far

    def step(self, t: int) -> Estimate:
        """Time step t, those before it being done: adds the gradient of the batch's mean of its loss."""
        learner = self.learner
        torch.clear_autocast_cache()  # which has the weights of before the last update
        records: list[Record] = []
        about = learner.level, self.noise, t
        sites = {
            name: ChunkSite(name, i, *about, self.states.get(name), records, watched=True)
            for i, (name, _) in enumerate(self.bound.layers)
        }
        lengths = None if self.batch.lengths is None else (self.batch.lengths - t).clamp(0, 1)
        with bind_sites(self.bound.model, list(sites.values()), lengths, self.bound.layers), SpikePooling():
            outputs = self._forward(Events.of(self.batch.frames[t : t + 1], self.batch.dtype), sites)
        self.states = {name: site.state for name, site in sites.items()}
        with torch.no_grad():
            for rows in self.learned:
                rows.see(range(t, t + 1), sites, self.batch.valid)
        loss, error = self._judge(t, outputs)
        stats = {"copies": 1, "step": learner.step, "time": t, "times": self.batch.steps}
        if self.training_step.usable(loss):
            self._backward(outputs, error, records)
            for name, site in sites.items():
                self.farthest[name] = torch.maximum(self.farthest.get(name, site.farthest), site.farthest)
            if t == self.batch.steps - 1:
                learner.level.take(self.farthest)
        else:
            self.usable, stats["skipped"] = False, True
        if t == self.batch.steps - 1 and self.usable:
            for rows in self.learned:
                learner.prediction.learn(rows.regression, rows.spikes, rows.current)
        return Estimate(loss, outputs.detach()[None], stats)

    def _forward(self, x: Tensor, sites: dict[str, ChunkSite]) -> Tensor:
        """Outputs [1, B, ...], in the graph from each layer's spikes to what they reach. Traces go on."""
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
                    with torch.enable_grad():  # what spikes are cast to belongs to the graph
                        x = stage.into(x)
        for name, trace in self.recurrent.items():
            trace.add(sites[name].before[None])
        check_outputs(x, 1, self.batch.samples)
        return x

    def _judge(self, t: int, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """What the time step adds to the loss [B], and the gradient of that in the shape of the outputs."""
        found = evaluate_losses(self.batch.objective, self.treatment, outputs, {}, self.batch.targets, None, self.noise)
        share = self.batch.share[t].to(outputs.dtype)
        return found.loss * share, found.error * share.view(1, -1, *[1] * (outputs.ndim - 2))

    def _backward(self, outputs: Tensor, error: Tensor, records: list[Record]) -> None:
        """Adds the gradient of a time step. What the formula gives for the currents of a layer meets the traces of what
        its weights have read."""
        passed = Chunk([(outputs, error)], records)
        found = self.learner.prediction.credit_at_once(passed)
        credits = [Credit(None, found.get(record.site)) for record in records]
        weight = outputs.new_full((self.batch.samples,), 1 / self.batch.samples)
        given = {entry.site: entry for entry in self.formula.entries(passed, credits, weight)}
        stages = zip(self.stages, self.traces, [record.site for record in records] + [None], strict=True)
        entries: list[tuple[Tensor, Tensor]] = []
        for stage, trace, site in stages:  # records are in the order of the stages
            if site in given and stage.learning:
                g = given[site].gradient
                entries += [(outputs, g)] if trace is None else trace.entries(stage.learning, g)
        for name, neuron in self.bound.layers:
            if name in self.recurrent and name in given:
                entries += self.recurrent[name].entries([neuron.recurrent], given[name].gradient)
        wanted = [q for q in self.bound.model.parameters() if q.requires_grad]
        enter([entry for entry in entries if entry[0].requires_grad], list(wanted))


class OneTimeStep(Chunks):
    """Keeps one time step, for an update after each."""

    online: ClassVar[bool] = True
    lean: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "Online, an update at every time step"

    def estimates(self, step: Step) -> Iterator[Estimate]:
        run = self.start(step)
        return (run.step(t) for t in range(step.batch.steps))

    def start(self, step: Step) -> OnlineRun:
        """The batch of a step, before its first time step."""
        self.possible(step)
        learner, unknown, first = step.learner, step.learner.structure is None, self.first(step)
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
            sums = " and ".join(repr(name) for name, loss in LOSSES.items() if loss.steps is not None)
            return f"the loss is not known to be a sum over time, as {sums} are"
        return without_trace(step.model) or super().why_not(step)

    def describe(self, step: Step) -> str:
        self.possible(step)
        self.first(step)  # raises UsageError, as `possible` does, where it cannot be
        return "one time step, with an update after each; credit is that of the step's own loss, the future left out"
