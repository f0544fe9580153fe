"""One training step: what it works with, and what all ways to keep memory share."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from ulr_snn.credit.formula import Formula
from ulr_snn.credit.kinds import Global
from ulr_snn.credit.linked import Linked
from ulr_snn.credit.structure import Structure
from ulr_snn.estimators.base import Estimate
from ulr_snn.estimators.config import Config
from ulr_snn.estimators.learner import Learner
from ulr_snn.model.batch import Batch
from ulr_snn.model.bound import BoundModel
from ulr_snn.model.forward import Forward, PassLog
from ulr_snn.model.passes import Pass
from ulr_snn.sites.weights import WeightSites


@dataclass(frozen=True)
class Step:
    """One training step of a learner, on a batch."""

    config: Config
    learner: Learner
    bound: BoundModel
    batch: Batch

    @property
    def structure(self) -> Structure:
        """What the first pass has shown."""
        if self.learner.structure is None:
            raise RuntimeError("a step asked for the structure of a model before its first pass")
        return self.learner.structure

    @property
    def model(self) -> nn.Module:
        return self.bound.model

    def begin(self) -> tuple[Forward, list[Pass]]:
        """What makes the step's passes, and those that have run: at the first step of all, one shows the structure."""
        if self.learner.structure is not None:
            return self.forward(), []
        first, p = self.first_pass()
        if self.structure.weights:  # that pass had no noise on them
            first.log.extra += 1
            return self.forward(first.log), []
        return self.forward(first.log), [p]

    def first_pass(self) -> tuple[Forward, Pass]:
        """A pass of one copy, from which the structure is learned."""
        first = self.plain_forward()
        p = first.run(self.batch, [0])
        self.learner.observe(first, p, self.batch)
        return first, p

    def plain_forward(self) -> Forward:
        """What makes the first pass of all, of which nothing is known."""
        learner = self.learner
        learner.level.progress = learner.progress
        return Forward(self.bound, learner.level, learner.seed, learner.step, self.config.sampling)

    def forward(self, log: PassLog | None = None) -> Forward:
        """What makes passes of a model whose structure is known. log: of the passes that the step has made."""
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
        """Whether credit of this step's passes goes through all layers at once (see credit/linked.py). What looks at
        membranes, or at one layer alone, needs records of it."""
        return self.structure.all_exact and not (self.learner.measures or self.config.sampling.multi_sample)

    @property
    def weights(self) -> WeightSites | None:
        """The draws of the parameters with noise of their own; None where there are none."""
        weights = self.structure.weights
        return WeightSites(weights, self.learner.seed, self.config.sampling.mirrored) if weights else None

    @property
    def formula(self) -> Formula:
        structure, learner = self.structure, self.learner
        about = self.config.sampling, frozenset(structure.quiet), bool(structure.treatment.gradientless)
        return Formula(structure.credit, *about, learner.mean_loss, learner.mean_gradientless)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those without noise of their own, by name."""
        noisy = self.structure.weights
        return {name: q for name, q in self.model.named_parameters() if q.requires_grad and name not in noisy}

    @property
    def default_copies(self) -> int:
        """Copies where no number was given."""
        kind = Global if self.structure.treatment.gradientless else self.structure.credit
        return kind.default_copies

    def copies(self, site: str | None = None) -> int:
        """Copies of this step; site: of one alone, where each has copies of its own."""
        structure, learner = self.structure, self.learner
        count = learner.copies.copies(site, self.default_copies)
        pair = structure.weights or structure.credit.wants_pair(learner.prediction, learner.step)
        return max(count, 2) if pair else count

    def usable(self, losses: Tensor) -> bool:
        """Whether the losses are finite. Raises FloatingPointError if they are not, unless such steps are left out."""
        finite = bool(torch.isfinite(losses).all())
        if not finite and self.config.on_nonfinite == "stop":
            raise FloatingPointError(
                f"the loss is not finite at step {self.learner.step}; lower the learning rate, or use "
                "on_nonfinite='skip'"
            )
        return finite

    def count(self, passes: int) -> None:
        """Counts forward passes of the whole batch."""
        self.learner.forward_passes += passes * self.batch.samples

    def finish(self, passes: list[Pass], copies: int, add: Callable[[Formula], None]) -> Estimate:
        """Counts the step, and takes from its passes what there is to learn. add: adds the gradient of what has no
        noise of its own; called where all losses are finite."""
        self.learner.step += 1
        losses = torch.cat([p.loss for p in passes])  # [K, B]
        stats = {"copies": copies, "step": self.learner.step}
        estimate = Estimate(losses.mean(0), stacked_outputs(passes), stats)
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
    """What a training step keeps. online: it gives an estimate for every time step; lean: the memory of large tensors
    is not kept for the next step."""

    online: ClassVar[bool]
    lean: ClassVar[bool]

    def estimates(self, step: Step) -> Iterator[Estimate]:
        """The estimates of a step, each of which has added to `.grad`."""

    def describe(self, step: Step) -> str:
        """What a step keeps, for `plan`."""


def stacked_outputs(passes: list[Pass]) -> Tensor:
    """[K, ...model's output...] of all copies."""
    batch = passes[0].loss.shape[1]
    dim = 1 if passes[0].outputs.ndim >= 3 else 0
    copies = torch.cat([p.outputs.detach().unflatten(dim, (-1, batch)) for p in passes], dim)
    return copies.transpose(0, dim)
