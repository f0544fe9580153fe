"""What the attachments of all peers share: how they are entered and left, what a step begins with, and their state."""

from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.losses.named import LossSpec, Objective, resolve
from ulr_snn.model.forward import as_sequence

Step = tuple[Tensor, Tensor, Tensor | None, Objective]


class PeerAttachment:
    """Adds a peer's gradients to `.grad` in `backward`, which each peer brings. `forward_passes` counts one a sample,
    copy and step."""

    def __init__(self, model: nn.Module, peer: Any, loss: LossSpec, time_first: bool) -> None:
        self.model, self.peer, self.loss, self.time_first = model, peer, loss, time_first
        self.step = 0
        self.forward_passes = 0

    def __enter__(self) -> "PeerAttachment":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begun(self, x: Tensor, targets: Tensor, loss: LossSpec | None, lengths: Tensor | None) -> Step:
        """x [T, B, ...], targets and lengths on the model's device, and the objective of this step."""
        x = as_sequence(x, targets, lengths, self.time_first, self.model)
        lengths = None if lengths is None else lengths.to(x.device)
        return x, targets.to(x.device), lengths, resolve(loss if loss is not None else self.loss)

    def counted(self, losses: Tensor, passes: int) -> None:
        """Counts the step. Raises FloatingPointError unless all its losses are finite."""
        self.step += 1
        self.forward_passes += passes
        if not torch.isfinite(losses).all():
            raise FloatingPointError(f"the loss is not finite at step {self.step}; lower the rate, or clip")

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "forward_passes": self.forward_passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.forward_passes = state["step"], state["forward_passes"]
