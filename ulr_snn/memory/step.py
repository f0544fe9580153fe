"""One training step: its inputs, its passes, and the code that all `Memory` classes share."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ulr_snn.credit.formula import Formula
from ulr_snn.credit.kinds import Global
from ulr_snn.credit.linked import Linked
from ulr_snn.credit.structure import Structure
from ulr_snn.estimators.base import Estimate, refuse
from ulr_snn.estimators.config import Config
from ulr_snn.estimators.learner import Learner
from ulr_snn.kernels import ranks
from ulr_snn.kernels.walk import named_parameters_in
from ulr_snn.model.batch import Batch
from ulr_snn.model.bound import BoundModel
from ulr_snn.model.call import no_side_effects
from ulr_snn.model.forward import Forward, PassLog
from ulr_snn.model.passes import Pass
from ulr_snn.sites.weights import WeightSites


@dataclass(frozen=True)
class Step:
    """One training step of a learner on a batch."""

    config: Config
    learner: Learner
    bound: BoundModel
    batch: Batch

    @property
    def structure(self) -> Structure:
        """The structure observed in the first pass. Raises RuntimeError before that pass."""
        if self.learner.structure is None:
            raise RuntimeError("a step asked for the structure of a model before its first pass")
        return self.learner.structure

    @property
    def model(self) -> nn.Module:
        return self.bound.model

    def begin(self) -> tuple[Forward, list[Pass]]:
        """Returns what runs the step's passes, and the passes that have run: one in the first step, to observe."""
        if self.learner.structure is not None:
            return self.forward(), []
        if self.learner.resumed:  # the uninterrupted training took this step without observing
            self.learner.resumed = False
            with no_side_effects(self.bound.model):
                self.first_pass()
            return self.forward(), []
        first, p = self.first_pass()
        p.records[:] = [record for record in p.records if record.site not in self.structure.noiseless]
        if not (self.structure.weights or self.structure.joint):
            return self.forward(first.log), [p]
        if self.structure.joint:
            self.learner.measure(self.model, p)
            first.log.measured = True
        first.log.extra += 1  # the first pass had no weight noise, or no links, so the step cannot use it
        return self.forward(first.log), []

    def first_pass(self) -> tuple[Forward, Pass]:
        """Runs a pass of one copy, and observes the structure in it."""
        self.learner.level.noiseless = set()  # this pass shows which sites have no effect
        first = self.plain_forward()
        p = first.run(self.batch, [0])
        self.learner.observe(first, p, self.batch)
        return first, p

    def plain_forward(self) -> Forward:
        """Returns what runs passes of a model whose structure is not known."""
        learner = self.learner
        return Forward(self.bound, learner.level, learner.seed, learner.step, self.config.sampling)

    def forward(self, log: PassLog | None = None) -> Forward:
        """Returns what runs passes of a model whose structure is known. log: the log of earlier passes of the step."""
        structure, links = self.structure, Linked() if self.links else None
        return replace(
            self.plain_forward(),
            weights=self.weights,
            treatment=structure.treatment,
            links=links,
            changes=structure.changes,
            pools=structure.pools or links is None,
            log=log or PassLog(),
        )

    @property
    def links(self) -> bool:
        """True if credit goes through all layers at once (credit/linked.py), which leaves no records to measure."""
        measured = self.learner.measures and not self.structure.joint
        return self.structure.all_exact and not (measured or self.config.sampling.multi_sample)

    def measure(self, forward: Forward, passes: list[Pass]) -> None:
        """Measures step sizes and noise, where that is due. Linked passes have nothing to measure, so if all passes
        must be linked, this takes one more."""
        if forward.log.measured:
            return
        p = passes[0]
        if self.structure.joint and self.learner.measures:
            p = replace(forward, links=None, pools=True).run(self.batch, [0])
            forward.log.extra += 1
        self.learner.measure(self.model, p)

    @property
    def weights(self) -> WeightSites | None:
        """The noise draws on parameters; None if no parameter has noise."""
        weights = self.structure.weights
        return WeightSites(weights, self.learner.seed, self.config.sampling.mirrored) if weights else None

    @property
    def formula(self) -> Formula:
        structure, learner = self.structure, self.learner
        options = self.config.sampling, frozenset(structure.noiseless), bool(structure.treatment.gradientless)
        return Formula(structure.credit, *options, learner.mean_loss, learner.mean_gradientless)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters without weight noise, by name."""
        noisy = self.structure.weights
        return {name: q for name, q in named_parameters_in(self.model).items() if q.requires_grad and name not in noisy}

    @property
    def default_copies(self) -> int:
        """The number of copies if none was given."""
        kind = Global if self.structure.treatment.gradientless else self.structure.credit
        return kind.default_copies

    def copies(self, site: str | None = None) -> int:
        """Returns the number of copies of this step. site: the only site at which these copies differ."""
        structure, learner = self.structure, self.learner
        count = learner.copies.copies(site, self.default_copies)
        pair = structure.weights or structure.credit.wants_pair(learner.prediction, learner.step)
        return max(count, 2) if pair else count

    def usable(self, losses: Tensor, updated: bool = False) -> bool:
        """True if the losses are finite. Raises FloatingPointError if not, if on_nonfinite is "stop". updated:
        weights may have changed since the step began."""
        (finite,) = ranks.everywhere(bool(torch.isfinite(losses).all()))
        if not finite and self.config.on_nonfinite == "stop":
            unchanged = self.learner.step <= 1 and not updated
            refuse(losses, self.learner.step, unchanged, "lower the learning rate, or use on_nonfinite='skip'")
        return finite

    def count(self, passes: int) -> None:
        """Counts forward passes of the whole batch, on all ranks."""
        self.learner.forward_passes += passes * ranks.joined(self.batch.samples)

    def finish(self, passes: list[Pass], copies: int, add: Callable[[Formula], None]) -> Estimate:
        """Counts the step, adds its gradient, and updates the learner.

        add: adds the gradient of parameters without weight noise; called if all losses are finite.
        """
        self.learner.step += 1
        losses = torch.cat([p.loss for p in passes])  # [K, B]
        stats = {"copies": copies, "step": self.learner.step}
        estimate = Estimate(losses.mean(0), stacked_outputs(passes), stats, self.batch)
        if not self.usable(losses):
            stats["skipped"] = True
            return estimate
        formula = self.formula
        add(formula)
        if (weights := self.weights) is not None:
            weights.add_gradients(self.model, self.learner.step - 1, formula.of_weights(passes, losses))
        self.learner.learn(passes, losses)
        return estimate


class Memory(Protocol):
    """What a training step keeps. online: every time step has an estimate; lean: no memory stays for the next step."""

    @property
    def online(self) -> bool: ...
    @property
    def lean(self) -> bool: ...

    def estimates(self, step: Step) -> Iterable[Estimate]:
        """Gives the estimates of a step. Each has added to `.grad`. Without `online` the step is over at once."""
        ...

    def describe(self, step: Step) -> str:
        """Says what a step keeps, for `plan`."""
        ...


def stacked_outputs(passes: list[Pass]) -> Tensor:
    """Returns the outputs [K, ...model's output...] of all copies."""
    batch = passes[0].loss.shape[1]
    dim = 1 if passes[0].outputs.ndim >= 3 else 0
    copies = torch.cat([p.outputs.detach().unflatten(dim, (-1, batch)) for p in passes], dim)
    return copies.transpose(0, dim)
