"""The protocol of estimators: what `train` steps with. Peers implement it too."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self

from torch import Tensor, nn

from ulr_snn.losses.named import LossSpec


@dataclass
class Estimate:
    """What one step gave. loss: [B], mean over copies; outputs: [K, ...model's output...]; stats: plain numbers."""

    loss: Tensor
    outputs: Tensor
    stats: dict[str, Any]

    @property
    def skipped(self) -> bool:
        """Whether no gradient was added, since a loss was not finite."""
        return bool(self.stats.get("skipped"))


class Attachment:
    """An estimator that is attached to a model: adds gradients to `.grad`. The base of all attachments.

    online: `steps` gives an estimate for every time step, and is meant for an update after each. forward_passes: of a
    sample, so far.
    """

    online = False

    def __init__(self, model: nn.Module, loss: LossSpec, time_first: bool) -> None:
        self.model, self.loss, self.time_first = model, loss, time_first
        self.forward_passes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def backward(
        self, x: Tensor, targets: Tensor, loss: LossSpec | None = None, lengths: Tensor | None = None
    ) -> Estimate:
        """Forward passes, then adds the gradient of the batch's mean expected loss to every trainable `.grad`.

        x: [T, B, ...] ([B, T, ...] with time_first=False), any dtype, dense or a sparse COO tensor, which lists the
        events; targets [B, ...]; loss: another one than that of `attach`; lengths: [B], steps past them are padding.
        Raises UsageError on wrong shapes, labels, losses, or events that are not finite, FloatingPointError on a loss
        that is not finite.
        """
        raise NotImplementedError

    def steps(
        self, x: Tensor, targets: Tensor, loss: LossSpec | None = None, lengths: Tensor | None = None
    ) -> Iterator[Estimate]:
        """The estimates of a batch, each of which has added to `.grad`: one, or one for each time step (`online`).
        Takes and raises what `backward` does."""
        yield self.backward(x, targets, loss, lengths)

    def learning_rates(self) -> dict[str, float]:
        """Factors of the learning rate by parameter, for the next step of `train`'s own optimizer; 1 where not
        named."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on with the same steps."""
        return {"forward_passes": self.forward_passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.forward_passes = state["forward_passes"]

    def close(self) -> None:
        """Gives back what is kept from one step to the next."""


class Estimator(Protocol):
    """Makes attachments."""

    def attach(
        self,
        model: nn.Module,
        loss: LossSpec,
        seed: int,
        time_first: bool,
        total_steps: int | None = None,
        *,
        progress: float | None = None,
        rates: bool = False,
    ) -> Attachment:
        """An attachment to a model, not bound yet.

        seed: of all noise; total_steps: length of the training, over which noise is annealed; progress: of the
        training, where it is not to follow from the steps; rates: `learning_rates` will be asked for.
        """
        ...
