"""Training steps in chunks of time: when they are possible, how long a chunk is, and the step itself."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ulr_snn.credit.baseline import moving
from ulr_snn.credit.formula import enter_losses
from ulr_snn.errors import UsageError
from ulr_snn.estimators.base import Estimate
from ulr_snn.estimators.step_sizes import times_summed
from ulr_snn.kernels import ranks
from ulr_snn.kernels.weight_cache import weight_cache
from ulr_snn.memory.chunked import ChunkedRun
from ulr_snn.memory.split import Split, neurons_of
from ulr_snn.memory.step import Step
from ulr_snn.memory.whole import WholeSequence
from ulr_snn.model.call import no_side_effects
from ulr_snn.model.passes import Pass
from ulr_snn.model.shape_errors import shape_advice


@dataclass(frozen=True)
class ChunkLimits:
    """When memory "auto" uses chunks, and how long chunks are.

    whole: bytes up to which "auto" keeps the whole sequence; kept: bytes kept of a neuron at a time step, about;
    short: time steps times samples below which "auto" never uses chunks.
    together: least and most spikes of a chunk for "replay"; roomy: least spikes of a chunk for "auto", which makes
    fewer chunks since each has a cost.
    least: least time steps of a chunk; states: time steps at which "replay" keeps layer states.
    """

    whole: int = 1 << 29
    kept: int = 40
    short: int = 1 << 10
    together: tuple[int, int] = (1 << 16, 1 << 18)
    roomy: int = 1 << 21
    least: int = 4
    states: int = 16


@dataclass(frozen=True)
class Chunks:
    """The base of `Memory` classes that do not keep the whole sequence. asked: raise where chunks are impossible."""

    asked: bool = True
    limits: ChunkLimits = field(default_factory=ChunkLimits)

    def first(self, step: Step) -> tuple[slice, slice] | None:
        """Returns slices of time steps and samples for measurements, about as large as a chunk.

        None means the whole sequence. Raises UsageError if chunks are asked for and impossible.
        """
        limits, batch, samples = self.limits, step.batch, ranks.largest(step.batch.samples)
        if not self.asked and batch.steps * samples < limits.short:
            return None
        neurons = self.neurons(step)
        if not self.asked and limits.kept * batch.steps * samples * neurons <= limits.whole:
            return None
        if not self.possible(step):
            return None
        size = self.chunk_steps(step) * samples
        steps = min(batch.steps, max(1, size // 4))
        return slice(0, steps), slice(0, max(2, size // steps))

    def neurons(self, step: Step) -> int:
        """Returns the number of neurons, 0 if the model needs all time steps at once (UsageError if `asked`)."""
        if "neurons" not in step.bound.findings:
            with shape_advice(step.model):
                try:
                    step.bound.findings["neurons"] = neurons_of(step.model, step.batch.frames, step.batch.dtype)
                except UsageError:
                    if self.asked:
                        raise
                    step.bound.findings["neurons"] = 0
        return step.bound.findings["neurons"]

    def chunk_steps(self, step: Step) -> int:
        """Returns the number of time steps of a chunk.

        If `asked`, a chunk has half as many spikes as there are weights, within bounds: weight gradients take as much
        memory. Else its spikes take at least the memory of the weights: adding to weight gradients takes that time.
        """
        limits, batch, samples = self.limits, step.batch, ranks.largest(step.batch.samples)
        least, most = limits.together
        weights = sum(q.numel() for q in step.model.parameters())
        spikes = min(max(least, weights // 2), most) if self.asked else max(limits.roomy, 4 * weights // limits.kept)
        return min(batch.steps, max(limits.least, spikes // (samples * max(1, self.neurons(step)))))

    def possible(self, step: Step) -> bool:
        """True if chunks are possible, as far as is known. Raises UsageError if they are asked for and impossible."""
        why = self.why_not(step)
        if why and self.asked:
            raise UsageError(self.refusal(why))
        return why is None

    def refusal(self, why: str) -> str:
        """Returns the message of an error, from the reason why chunks are impossible."""
        return f"ULR got memory='replay', but {why}; use memory='auto'"

    def why_not(self, step: Step) -> str | None:
        """Returns why chunks are impossible, or None if they are possible as far as is known."""
        config, structure, sampling = step.config, step.learner.structure, step.config.sampling
        several = (sampling.copies or 1) > 1 or sampling.adaptive or sampling.multi_sample
        if config.credit.unbiased or several:
            return "it is for credit 'feedback' with one copy"
        if any(site is not None for site in config.noise.values()):
            return "noise comes elsewhere than on firing"
        if ranks.joined(step.batch.samples) < 2:
            return "the batch has a single sample"
        if not step.bound.call.plain:
            return "the model is not called with one sequence, or not all of its result is read"
        if step.batch.objective.counts:
            return "the objective has costs of activity"
        if structure is not None and (structure.credit.by_losses or structure.treatment.gradientless):
            return "the loss has no gradient in the outputs"
        if structure is not None and (structure.needs_pairs or structure.weights):
            return "there is feedback that only pairs of copies can teach, or noise on parameters"
        return None

    def sample(self, step: Step, first: tuple[slice, slice]) -> Pass | None:
        """Runs a pass over a part of the batch if one is due, to observe the model or to measure it; else None."""
        learner, known = step.learner, step.learner.structure is not None
        if known and not learner.measures:
            return None
        part = Step(step.config, learner, step.bound, step.batch.part(first))
        forward = part.forward() if known else part.plain_forward()
        with no_side_effects(step.model):  # the step itself has the side effects of an ordinary pass
            p = forward.run(part.batch, [0])
        if not known:
            learner.observe(forward, p, part.batch)
        part.count(forward.log.extra + 1)
        return p


@dataclass(frozen=True)
class TimeChunks(Chunks):
    """Keeps only the outputs of all time steps; the whole sequence if chunks are impossible and not asked for."""

    online: ClassVar[bool] = False

    @property
    def lean(self) -> bool:
        return self.asked

    def estimates(self, step: Step) -> list[Estimate]:
        first = self.first(step)
        estimate = None if first is None else self.step(step, first)
        return [WholeSequence().step(step) if estimate is None else estimate]

    def possible(self, step: Step) -> bool:
        if ranks.joined(step.batch.samples) < 2 and step.learner.step:
            return False  # the last batch of an epoch may hold what is left over
        return super().possible(step)

    def why_not(self, step: Step) -> str | None:
        if step.batch.lengths is not None and self.neurons(step) and Split.of(step.model).readouts:
            return "LeakyReadout holds its membranes through the padding"
        return super().why_not(step)

    def describe(self, step: Step) -> str:
        if self.first(step) is None:
            return WholeSequence().describe(step)
        return f"chunks of {self.chunk_steps(step)} time steps, each run twice or more, with the same noise"

    @weight_cache()
    def step(self, step: Step, first: tuple[slice, slice]) -> Estimate | None:
        """Makes a training step; None if its first pass shows that the model needs the whole sequence."""
        learner, batch, unknown = step.learner, step.batch, step.learner.structure is None
        sizes = learner.step_sizes
        at_start = sizes is not None and sizes.summed is None  # False in a resumed training
        remembered = learner.driven, learner.chosen  # from a checkpoint
        with ranks.of_first(first[1].stop):
            p = self.sample(step, first)
            if unknown and not self.possible(step):
                learner.observe_again()  # the whole sequence shows more, such as the noise of less variance
                learner.driven, learner.chosen = remembered
                return None
            if p is not None:
                learner.measure(step.model, p, whole=False)
        del p  # with its graph
        forward = step.forward()
        noise = forward.noise(batch.samples, [0], batch.frames.device)
        states = self.limits.states if self.asked else batch.steps
        run = ChunkedRun(step.bound, learner.level, noise, batch, self.chunk_steps(step), states)
        sites = [name for name, _ in step.bound.layers]
        rows = ranks.all_rows(batch.valid), ranks.joined(batch.samples)
        regressions = list(learner.prediction.maps.regressions(sites, *rows, learner.step))
        seen, learned = run.forward(regressions)
        outputs = run.finished(seen)
        evaluation = forward.evaluate(batch, outputs, {}, [0])
        if sizes is not None and unknown and at_start:
            sizes.summed = times_summed(evaluation)  # the measured pass had fewer time steps
        learner.step += 1
        losses = evaluation.loss[None]
        stats = {"copies": 1, "step": learner.step, "chunks": len(run.chunks)}
        if step.usable(losses):
            for collected in learned:
                collected.learn(learner.prediction.maps)
            if evaluation.error is not None:
                self._backward(step, run, seen, outputs, evaluation.error)
            weight = losses.new_full((batch.samples,), 1 / batch.samples)
            enter_losses([(loss, weight) for loss in evaluation.others], [evaluation], step.model)
            learner.level.store_distances(run.farthest)
            learner.mean_loss = moving(learner.mean_loss, losses)
        else:
            stats["skipped"] = True
        step.count(-(-run.steps_run // batch.steps))
        return Estimate(losses.mean(0), outputs.detach()[None], stats, batch)

    def _backward(self, step: Step, run: ChunkedRun, seen: Tensor, outputs: Tensor, error: Tensor) -> None:
        """Adds the gradient of the batch's mean loss: of the modules after the average, then of the chunks."""
        wanted: list[Tensor] = [q for q in step.model.parameters() if q.requires_grad]
        if run.split.back:
            if wanted and outputs.requires_grad:
                torch.autograd.backward(outputs, error / run.batch.samples, inputs=wanted, retain_graph=True)
            (error,) = torch.autograd.grad(outputs, seen, error)
        run.backward(error, step.learner.prediction, step.formula, wanted)
