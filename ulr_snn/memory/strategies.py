"""Training steps that do not see the whole sequence at once: what they measure by, why some models and objectives have
to be seen whole, and the step in parts of time (parts.py)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ulr_snn.credit.baseline import moving
from ulr_snn.errors import UsageError
from ulr_snn.estimators.base import Batch, Estimate
from ulr_snn.estimators.step_sizes import times_summed
from ulr_snn.kernels.held import weights_held
from ulr_snn.memory import parts
from ulr_snn.model.explained import explained
from ulr_snn.model.forward import Forward, Pass, check_outputs, keep_traces

if TYPE_CHECKING:
    from ulr_snn.estimators.ulr import Attachment

WHOLE = 1 << 29  # bytes that memory "auto" lets a step over the whole sequence keep
SHORT = 1 << 10  # time steps of samples, below which it is not looked whether that is so
KEPT = 40  # bytes that such a step keeps of every neuron at every time step, about


class Piecewise:
    """What such steps of an attachment share. neurons: of a sample, once it is known; 0 where the model has to see all
    time steps at once."""

    def __init__(self, attached: "Attachment") -> None:
        self.attached = attached
        self.asked = attached.estimator.memory != "auto"  # for, so that what cannot be is an error
        self.neurons: int | None = None

    def few(self, batch: Batch) -> tuple[slice, slice] | None:
        """First time steps, and samples, with about as many spikes as a part of time of the batch: what such steps
        measure by; None for steps over the whole sequence. Raises UsageError where others are asked for and cannot be.
        """
        if not self.asked and batch.steps * batch.samples < SHORT:
            return None
        with explained(self.attached.model):
            try:
                if self.neurons is None:
                    self.neurons = 0
                    self.neurons = parts.neurons(self.attached.model, batch.frames, batch.dtype)
            except UsageError:
                if self.asked:
                    raise
        if not self.asked and KEPT * batch.steps * batch.samples * self.neurons <= WHOLE:
            return None
        if not self.possible(batch):
            return None
        size = self.part_steps(batch) * batch.samples
        steps = min(batch.steps, max(1, size // 4))
        return slice(0, steps), slice(0, max(2, size // steps))

    def part_steps(self, batch: Batch) -> int:
        """Time steps of a part. Where little is to be kept, it has half as many spikes as there are weights, within
        bounds, since the gradients of these take as much anyway; else as many as take the memory of the weights, if
        these are large, since what each part adds to their gradients takes the time of so many."""
        least, most = parts.TOGETHER
        weights = sum(q.numel() for q in self.attached.model.parameters())
        spikes = min(max(least, weights // 2), most) if self.asked else max(parts.ROOMY, 4 * weights // KEPT)
        return min(batch.steps, max(parts.LEAST, spikes // (batch.samples * max(1, self.neurons))))

    def possible(self, batch: Batch) -> bool:
        """Whether steps need not see the whole sequence at once, as far as is known. Raises UsageError where they must
        and should not."""
        why = self.why_whole(batch)
        if why and self.asked:
            raise UsageError(f"ULR got memory={self.attached.estimator.memory!r}, but {why}; use memory='auto'")
        return why is None

    def why_whole(self, batch: Batch) -> str | None:
        """Why steps have to see the whole sequence at once; None if they need not, as far as is known."""
        ulr, structure = self.attached.estimator, self.attached.structure
        if ulr.credit not in ("auto", "feedback") or (ulr.copies or 1) > 1 or ulr.multi_sample:
            return "it is for credit 'feedback' with one copy"
        if any(site is not None for site in ulr.noise.values()):
            return "noise comes elsewhere than on firing"
        if batch.samples < 2:
            return "the batch has a single sample"
        if batch.objective.counts:
            return "the objective has costs of activity"
        if structure is not None and (structure.credit != "feedback" or structure.judging.blind):
            return "the loss has no gradient in the outputs"
        if structure is not None and (structure.needs_pairs or structure.weights):
            return "there is feedback that only pairs of copies can teach, or noise on parameters"
        return None

    def sample(self, forward: Forward, batch: Batch, few: tuple[slice, slice]) -> Pass | None:
        """A pass over a sample, where one is due: the first shows what the model is, others are to be measured."""
        attached, first = self.attached, self.attached.structure is None
        if not first and not attached.measures:
            return None
        part = batch.part(few)
        given = part.x, part.targets, part.lengths, part.objective
        with keep_traces(attached.model):  # the step itself leaves those of an ordinary pass
            p = forward.run(*given, [0])
        if first:
            attached.observe(forward, p, *given)
        attached.forward_passes += (forward.extra_passes + 1) * part.samples
        forward.extra_passes = 0
        return p


class InParts(Piecewise):
    """The step that keeps nothing of all time steps but the outputs (see parts.py)."""

    def possible(self, batch: Batch) -> bool:
        if batch.samples < 2 and self.attached.step:
            return False  # the last batch of an epoch may hold what is left over
        return super().possible(batch)

    def kept(self, batch: Batch) -> str:
        """What a step keeps, for `plan`."""
        return f"parts of {self.part_steps(batch)} time steps, each run twice or more, with the same noise"

    def why_whole(self, batch: Batch) -> str | None:
        if batch.lengths is not None and self.neurons and parts.Split.of(self.attached.model).readouts:
            return "LeakyReadout holds its membranes through the padding"
        return super().why_whole(batch)

    @weights_held()
    def step(self, forward: Forward, batch: Batch, few: tuple[slice, slice]) -> Estimate | None:
        """None where the first step shows that it has to see the whole sequence."""
        attached, first = self.attached, self.attached.structure is None
        sizes = attached.step_sizes
        at_start = sizes is not None and sizes.summed is None  # not so in a training that goes on
        known = attached.driven, attached.chosen  # what a checkpoint says
        p = self.sample(forward, batch, few)
        if first and not self.possible(batch):
            attached.structure = None  # the whole shows more: which noise is the lesser, for one
            attached.driven, attached.chosen = known
            return None
        if p is not None:
            attached.measure(p, whole=False)
        del p  # with its graph
        forward.judging = attached.structure.judging
        run = self._parts(forward, batch)
        sites = [name for name, _ in attached.layers]
        lessons = list(attached.prediction.lessons(sites, batch.valid, batch.samples, attached.step))
        seen, learned = run.forward(lessons)
        if run.split.average is not None:
            seen = seen.requires_grad_()
        outputs = seen.clone() if run.split.back else seen  # what comes after may change it in place
        for module in run.split.back:
            outputs = module(outputs)
        check_outputs(outputs, batch.steps, batch.samples)
        judgement = forward.judge(outputs, {}, batch.targets, batch.lengths, batch.objective, [0])
        if first and at_start:
            sizes.summed = times_summed(judgement)  # all have more time steps than were measured
        attached.step += 1
        losses = judgement.loss[None]
        stats = {"copies": 1, "step": attached.step, "parts": len(run.parts)}
        if attached.usable(losses):
            for lesson in lessons:
                attached.prediction.learn(lesson, *learned.pop(0))  # what it is learned from is not kept any longer
            self._backward(run, seen, outputs, judgement.error)
            attached.level.take(run.farthest)
            attached.mean_loss = moving(attached.mean_loss, losses)
        else:
            stats["skipped"] = True
        attached.forward_passes += -(-run.steps_run // batch.steps) * batch.samples
        return Estimate(losses.mean(0), outputs.detach()[None], stats)

    def _parts(self, forward: Forward, batch: Batch) -> parts.Parts:
        attached = self.attached
        about = attached.level, forward.noise(batch.samples, [0], batch.frames.device), batch
        standings = parts.STANDINGS if self.asked else batch.steps
        return parts.Parts(attached.model, attached.layers, *about, self.part_steps(batch), standings)

    def _backward(self, run: parts.Parts, seen: Tensor, outputs: Tensor, error: Tensor | None) -> None:
        """Adds the gradient of the batch's mean loss, by way of what comes after the average, and of the parts."""
        attached = self.attached
        wanted = [q for q in attached.model.parameters() if q.requires_grad]
        if run.split.back and error is not None:
            if wanted and outputs.requires_grad:
                torch.autograd.backward(outputs, error / run.batch.samples, inputs=wanted, retain_graph=True)
            (error,) = torch.autograd.grad(outputs, seen, error)
        run.backward(error, attached.prediction, wanted)
