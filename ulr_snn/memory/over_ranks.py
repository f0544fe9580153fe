"""Training steps whose copies are spread over the ranks of torch.distributed, for noise on weights alone.

Noise on weights follows from seed, step and copy, so every rank can draw that of all copies. Only losses travel, [K, B]
numbers a step, whatever the number of parameters (evolution strategies, arXiv 1703.03864).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ulr_snn.errors import UsageError
from ulr_snn.estimators.base import Estimate
from ulr_snn.kernels import ranks
from ulr_snn.losses.evaluation import LossEvaluation, LossTreatment
from ulr_snn.memory.step import Step, stacked_outputs
from ulr_snn.model.passes import Pass
from ulr_snn.sites.weights import WeightSites


@dataclass(frozen=True)
class CopiesOverRanks:
    """Runs some of the copies of a step on each rank. All ranks give `backward` the same batch.

    This is for `ULR(credit="global", noise={...})` with `WeightNoise` on all trainable parameters. An estimate has the
    losses of all copies and the outputs of the rank's own ones. Raises UsageError in the first step if another
    parameter learns, or if there are fewer groups of copies than ranks.
    """

    online: ClassVar[bool] = False
    lean: ClassVar[bool] = True

    def estimates(self, step: Step) -> list[Estimate]:
        with ranks.one_batch() as (rank, size), torch.no_grad():
            return [self.step(step, rank, size)]

    def step(self, step: Step, rank: int, size: int) -> Estimate:
        with torch.enable_grad():  # the first pass shows the structure
            forward, seen = step.begin()
        learner, batch, copies, weights = step.learner, step.batch, step.copies(), self.checked(step, size)
        own = [copy for copy in range(copies) if copy // step.config.sampling.group % size == rank]
        passes = [forward.run(batch, [copy]).losses_only() for copy in own]
        losses = torch.zeros(copies, batch.samples, dtype=passes[0].loss.dtype, device=passes[0].loss.device)
        losses[own] = torch.cat([p.loss for p in passes])
        losses = ranks.put_together(losses)
        step.count(copies + len(seen) + forward.log.extra)
        learner.step += 1
        stats = {"copies": copies, "step": learner.step}
        estimate = Estimate(losses.mean(0), stacked_outputs(passes), stats, batch)
        if not step.usable(losses):
            stats["skipped"] = True
            return estimate
        divided = passes[0].evaluation.divided
        evaluations = [
            LossEvaluation([loss], [None], [], LossTreatment(), (1.0,), None, divided=divided) for loss in losses
        ]
        every = [Pass([copy], passes[0].outputs, [], {}, found) for copy, found in enumerate(evaluations)]
        weights.add_gradients(step.model, learner.step - 1, step.formula.of_weights(every, losses))
        learner.learn(every, losses)
        return estimate

    def checked(self, step: Step, size: int) -> WeightSites:
        """Returns the noise on the parameters. Raises UsageError for a step that cannot be spread."""
        weights, sampling = step.weights, step.config.sampling
        others = [name for name, q in step.parameters.items() if q.requires_grad]
        if weights is None or others or not step.structure.credit.by_losses or sampling.adaptive or sampling.by_layer:
            raise UsageError(
                "CopiesOverRanks is for credit 'global' with WeightNoise on all trainable parameters and a number of "
                f"copies{', but another noise trains ' if others else ''}{''.join(others[:1])}"
            )
        if step.copies() < size * sampling.group:
            raise UsageError(
                f"CopiesOverRanks got copies={step.copies()} for {size} ranks; use at least {size * sampling.group}"
            )
        return weights

    def describe(self, step: Step) -> str:
        return "the losses of copies that are spread over the ranks"
