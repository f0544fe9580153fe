"""Training steps over the whole sequence at once: all copies together, or one after another."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ulr_snn.credit.formula import Contribution, Formula, enter, enter_losses
from ulr_snn.estimators.base import Estimate
from ulr_snn.kernels import ranks
from ulr_snn.memory.step import Step
from ulr_snn.model.passes import Group, Pass
from ulr_snn.sites.weights import SOURCE


@dataclass(frozen=True)
class WholeSequence:
    """Keeps the graph of the whole sequence for all copies of a step."""

    online: ClassVar[bool] = False
    lean: ClassVar[bool] = False

    def estimates(self, step: Step) -> list[Estimate]:
        return [self.step(step)]

    def step(self, step: Step) -> Estimate:
        forward, passes = step.begin()
        copies = step.copies()

        def run(copies: range, varied: str | None = None) -> list[Pass]:
            return forward.all(step.batch, copies, varied)

        groups = step.config.sampling.groups(run, passes, step.copies)
        step.measure(forward, passes)
        step.count(sum(len(p.copies) for p in passes) + forward.log.extra)
        return step.finish(passes, copies, lambda formula: add_gradients(step, formula, passes, groups))

    def describe(self, step: Step) -> str:
        return "the whole sequence at once"


@dataclass(frozen=True)
class CopiesInTurn:
    """Keeps the graph of one copy at a time. Every copy runs twice: once for its loss, once for its gradient.

    This is for credit "global", where the gradient of a copy needs only the losses of the others.
    """

    online: ClassVar[bool] = False
    lean: ClassVar[bool] = True

    def estimates(self, step: Step) -> list[Estimate]:
        return [self.step(step)]

    def step(self, step: Step) -> Estimate:
        forward, seen = step.begin()
        copies = step.copies()
        with torch.no_grad():
            counted = [forward.run(step.batch, [copy]).losses_only() for copy in range(copies)]
        step.count(2 * copies + len(seen) + forward.log.extra)
        del seen  # frees its graph

        def again() -> Iterator[Pass]:
            for copy in reversed(range(copies)):  # the first copy is last: measuring it may change the noise
                p = forward.run(step.batch, [copy])
                if copy == 0:
                    step.learner.measure(step.model, p)
                yield p

        return step.finish(counted, copies, lambda formula: add_by_pass(step, formula, again(), counted))

    def describe(self, step: Step) -> str:
        return "the whole sequence at once, of one copy after another, each run twice"


def add_gradients(step: Step, formula: Formula, passes: list[Pass], groups: list[Group]) -> None:
    """Adds the gradient of parameters without weight noise, and fits the prediction to the passes."""
    learner, credit, sampling = step.learner, formula.credit, step.config.sampling
    if credit.by_losses and not (sampling.adaptive or sampling.by_layer):
        add_by_pass(step, formula, passes, passes)
        return
    now = learner.step - 1
    credit.learn_before(learner.prediction, passes, now)
    contributions: list[Contribution] = []
    for group in groups:
        predictions = credit.predict(learner.prediction, group.passes, sampling.group)
        found = list(formula.of_group(group, predictions, 1 / len(groups)))
        if learner.copies.due(now):
            learner.copies.see(group.site, halves(step, formula, group, found), len(group.losses))
        contributions += found
    credit.learn_after(learner.prediction, groups, now)
    contributions.sort(key=lambda part: part.by_score)
    enter_all(step, contributions, passes)


def add_by_pass(step: Step, formula: Formula, passes: Iterator[Pass] | list[Pass], counted: list[Pass]) -> None:
    """Adds the same gradient pass by pass, where a pass needs only the losses of all passes, `counted`."""
    for p in passes:
        predictions = formula.credit.predict(step.learner.prediction, [p], step.config.sampling.group)
        enter_all(step, list(formula.of_group(Group(None, [p], counted), predictions, 1.0)), [p])


def enter_all(step: Step, contributions: list[Contribution], passes: list[Pass]) -> None:
    """Adds the gradients of the contributions. Losses that depend on parameters besides the outputs give their gradient
    also to parameters with weight noise, and to their own."""
    pairs = [(part.tensor, part.gradient) for part in contributions if not part.of_loss]
    enter(pairs, list(step.parameters.values()))
    of_losses = [(part.tensor, part.gradient) for part in contributions if part.of_loss]
    enter_losses(of_losses, [p.evaluation for p in passes], step.model)


def halves(
    step: Step, formula: Formula, group: Group, contributions: list[Contribution]
) -> list[tuple[Tensor, Tensor]]:
    """Returns the gradients by each half of a group's copies, for every parameter that the noise reaches."""
    noisy = [part for part in contributions if part.copies is not None]
    reached = {name for name, sources in step.structure.parameters.items() if set(sources) - {"outputs", SOURCE}}
    named = step.model.named_parameters()
    parameters = [q for name, q in named if q.requires_grad and name in reached]
    found = [half_of(step, formula, group, noisy, parameters, half) for half in (0, 1)]
    both = ranks.averaged([*found[0], *found[1]])
    return list(zip(both[: len(found[0])], both[len(found[0]) :], strict=True))


def half_of(
    step: Step,
    formula: Formula,
    group: Group,
    contributions: list[Contribution],
    parameters: list[nn.Parameter],
    half: int,
) -> list[Tensor]:
    """Returns the gradients by the even (half=0) or odd (half=1) sets of dependent copies."""
    size, found = step.config.sampling.group, []
    if contributions and parameters:
        tensors, gradients = [], []
        for part in contributions:
            copies = part.copies or []
            own = torch.tensor([copy // size % 2 == half for copy in copies])
            rows = own.repeat_interleave(part.gradient.shape[1] // len(copies)).to(part.gradient)
            tensors.append(part.tensor)
            gradients.append(part.gradient * rows.view(-1, *[1] * (part.gradient.ndim - 2)))
        given = torch.autograd.grad(tensors, parameters, gradients, retain_graph=True, allow_unused=True)
        found = [torch.zeros_like(q) if g is None else g for q, g in zip(parameters, given, strict=True)]
    if (weights := step.weights) is not None:
        signals = formula.of_weights(group.passes, group.losses)
        own = torch.arange(len(signals), device=signals.device) // size % 2 == half
        found += weights.gradients(step.model, step.learner.step - 1, signals * own[:, None]).values()
    return found
