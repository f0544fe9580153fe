"""Results of stochastic forward passes, as the estimator needs them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ulr_snn.errors import UsageError
from ulr_snn.losses.evaluation import LossEvaluation
from ulr_snn.sites.records import Record


@dataclass
class Pass:
    """The result of one forward pass of `copies` of a batch of B samples, stacked: row = copy * B + sample."""

    copies: list[int]
    outputs: Tensor  # [T, copies * B, ...] or [copies * B, ...], graph cut at every spike
    records: list[Record]  # a linked pass has `LinkedRecord` for layers of other libraries
    activity: dict[str, Tensor]  # the counts of the objective, [copies * B], graph cut at every spike
    evaluation: LossEvaluation
    pools: bool = True  # whether it has max pooling, as far as was looked for
    changes: bool = True  # whether the model changes spikes in place, as far as was looked for
    linked: bool = False  # whether a gradient at spikes becomes their credit; else the graph is cut there

    @property
    def loss(self) -> Tensor:
        """The loss [copies, B]."""
        return self.evaluation.loss.view(len(self.copies), -1)

    def losses_only(self) -> "Pass":
        """Returns the pass with nothing but its outputs and losses."""
        return Pass(self.copies, self.outputs.detach(), [], {}, self.evaluation)

    @property
    def gradientless(self) -> Tensor:
        """The part of the loss that has no gradient in the outputs and is no cost of activity, [copies, B]."""
        return self.evaluation.gradientless_loss.view(len(self.copies), -1)

    @property
    def loss_in_time(self) -> Tensor:
        """The summands of the loss by time step, [copies, B, T]."""
        steps = self.evaluation.steps
        assert steps is not None  # see `LossTreatment.in_time`
        return steps.T.view(*self.loss.shape, -1)

    @property
    def error(self) -> Tensor | None:
        """∂loss/∂outputs in the shape of the outputs; None if the loss has no gradient."""
        return self.evaluation.error

    def check_times(self, steps: int, asker: str) -> None:
        """Raises UsageError unless all layers ran over so many time steps."""
        if others := [record for record in self.records if len(record.x) != steps]:
            raise UsageError(
                f"{asker} needs layers and outputs with the same time steps, and {others[0].site} has "
                f"{len(others[0].x)} where others have {steps}; leave it out"
            )

    @property
    def ends(self) -> list[tuple[Tensor, Tensor]]:
        """The tensors at which spikes reach the loss differentiably, with the loss's gradient at each."""
        ends = [] if self.error is None else [(self.outputs, self.error)]
        return ends + [(activity, gradient) for activity, gradient, _ in self.evaluation.costs]


@dataclass
class Group:
    """A group of passes that are copies of each other. site: the only site whose noise differs; None: all noise
    differs. counted: all passes whose losses count, if there are more of them than `passes`."""

    site: str | None
    passes: list[Pass]
    counted: list[Pass] | None = None

    def joined(self, kind: str) -> Tensor:
        """Returns the "loss", "gradientless" or "loss_in_time" of all copies, [K, B, ...]."""
        return torch.cat([getattr(p, kind) for p in self.counted or self.passes])

    @property
    def losses(self) -> Tensor:
        """The losses of all copies, [K, B]."""
        return self.joined("loss")
