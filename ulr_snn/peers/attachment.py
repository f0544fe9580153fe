"""The base of the attachments of all peers."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.estimators.base import Attachment, Estimate, refuse
from ulr_snn.kernels import ranks
from ulr_snn.losses.named import LossSpec, resolve
from ulr_snn.model.batch import Batch
from ulr_snn.model.bound import Binder, BoundModel
from ulr_snn.model.interface import Interface


def averaged(backward: Callable[..., Estimate]) -> Callable[..., Estimate]:
    """Makes a peer's `backward` average the gradients of all ranks, from `PeerAttachment.begun` on."""

    @wraps(backward)
    def call(self: "PeerAttachment", *batch: Any, **options: Any) -> Estimate:
        with ranks.joint(self.model):
            return backward(self, *batch, **options)

    return call


class PeerAttachment(Attachment):
    """Adds a peer's gradients to `.grad` in `backward`, which subclasses define.

    forward_passes: number of forward passes, one for each sample, copy and step; binder: binds the model, anew after it
    has changed; seed: seed of the noise. A class whose `backward` is `averaged` sets over_ranks = True.
    """

    seed = 0

    def __init__(self, model: nn.Module, peer: Any, loss: LossSpec, interface: Interface) -> None:
        super().__init__(model, loss, interface)
        self.peer = peer
        self.step = 0
        self.binder = Binder(model, {}, own_code=True)
        self._begun = False  # the ranks of a distributed run have one model and one seed

    def begun(self, x: Any, targets: Any, loss: LossSpec | None, lengths: Tensor | None) -> tuple[BoundModel, Batch]:
        """Returns the bound model, and the batch of this step as the model sees it."""
        objective = resolve(loss if loss is not None else self.loss)
        if not self._begun:
            self.seed, self._begun = ranks.same_start(self.model, self.seed), True
        bound, batch = self.binder.bound(Batch.of(self.model, x, targets, lengths, objective, self.interface))
        ranks.meet(batch.samples, batch.steps, batch.lengths is not None, self.step, batch.targets.share)
        return bound, batch.joined()

    def counted(self, losses: Tensor, passes: int) -> None:
        """Counts the step. Raises FloatingPointError for a loss that is not finite."""
        self.step += 1
        self.forward_passes += ranks.joined(passes)
        if not ranks.everywhere(bool(torch.isfinite(losses).all()))[0]:
            refuse(losses, self.step, self.step == 1, "lower the rate, or clip")

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.step = state["step"]
