"""What one stochastic forward pass leaves for the estimator."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ulr_snn.losses.evaluation import LossEvaluation
from ulr_snn.sites.records import Record


@dataclass
class Pass:
    """One forward pass of `copies` of a batch of B samples, stacked along the batch: row = copy * B + sample."""

    copies: list[int]
    outputs: Tensor  # [T, copies * B, ...] or [copies * B, ...], graph cut at every spike
    records: list[Record]  # of layers of other libraries in a linked pass `LinkedRecord` alone
    activity: dict[str, Tensor]  # what the objective needs of it, [copies * B], graph cut at every spike
    evaluation: LossEvaluation
    pools: bool = True  # whether there is max pooling in it, as far as was looked for
    changes: bool = True  # whether the model changes spikes in place, as far as was looked for
    linked: bool = False  # whether a gradient that arrives at spikes becomes their credit, where else the graph is cut

    @property
    def loss(self) -> Tensor:
        """[copies, B]."""
        return self.evaluation.loss.view(len(self.copies), -1)

    def losses_only(self) -> "Pass":
        """Its outputs and losses alone."""
        return Pass(self.copies, self.outputs.detach(), [], {}, self.evaluation)

    @property
    def gradientless(self) -> Tensor:
        """[copies, B]: the part of the loss that has no gradient in the outputs, nor is a cost of activity."""
        return self.evaluation.gradientless_loss.view(len(self.copies), -1)

    @property
    def loss_in_time(self) -> Tensor:
        """[copies, B, T]: what each time step adds to the loss."""
        return self.evaluation.steps.T.view(*self.loss.shape, -1)

    @property
    def error(self) -> Tensor | None:
        """∂loss/∂outputs in the shape of the outputs; None if the loss has no gradient."""
        return self.evaluation.error

    @property
    def ends(self) -> list[tuple[Tensor, Tensor]]:
        """Where spikes reach the loss differentiably: tensors, and the loss's gradient with respect to them."""
        ends = [] if self.error is None else [(self.outputs, self.error)]
        return ends + [(activity, gradient) for activity, gradient, _ in self.evaluation.costs]


@dataclass
class Group:
    """Passes that are copies of each other: in all their noise (site: None), or in that of one site alone. counted: all
    passes whose losses count, if they are more than these."""

    site: str | None
    passes: list[Pass]
    counted: list[Pass] | None = None

    def joined(self, kind: str) -> Tensor:
        """[K, B, ...] of all copies: their "loss", "gradientless" or "loss_in_time"."""
        return torch.cat([getattr(p, kind) for p in self.counted or self.passes])

    @property
    def losses(self) -> Tensor:
        """[K, B]."""
        return self.joined("loss")
