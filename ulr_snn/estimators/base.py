"""The protocol of estimators, which `train` uses and peers implement, too."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self

from torch import Tensor, nn

from ulr_snn.losses.named import LossSpec


@dataclass
class Estimate:
    """The losses and outputs of one step.

    loss: [B], mean over copies; outputs: [K, ...model's output...]; stats: plain numbers.
    """

    loss: Tensor
    outputs: Tensor
    stats: dict[str, Any]

    @property
    def skipped(self) -> bool:
        """True if no gradient was added because a loss was not finite."""
        return bool(self.stats.get("skipped"))


class Attachment:
    """An estimator that is attached to a model and adds gradients to `.grad`; the base of all attachments.

    online: `steps` gives an estimate for every time step, each meant for an update;
    forward_passes: number of forward passes of a sample so far.
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
        """Runs forward passes and adds the gradient of the batch's mean expected loss to every trainable `.grad`.

        x: [T, B, ...] ([B, T, ...] with time_first=False), any dtype, dense or sparse COO (a list of events).
        targets: [B, ...]. loss: replaces the loss of `attach`. lengths: [B], steps past them are padding.
        Raises UsageError for wrong shapes, labels, losses or events, and FloatingPointError for a loss not finite.
        """
        raise NotImplementedError

    def steps(
        self, x: Tensor, targets: Tensor, loss: LossSpec | None = None, lengths: Tensor | None = None
    ) -> Iterator[Estimate]:
        """Yields the estimates of a batch: one, or one for each time step if `online`; see `backward`."""
        yield self.backward(x, targets, loss, lengths)

    def learning_rates(self) -> dict[str, float]:
        """Returns learning rate factors by parameter, for the next step of `train`'s default optimizer."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Returns all that a resumed run needs to continue with the same steps."""
        return {"forward_passes": self.forward_passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.forward_passes = state["forward_passes"]

    def close(self) -> None:
        """Frees the memory kept between steps."""


def offers(value: object, method: str) -> bool:
    """Returns whether a value is an object, not a class, with this method."""
    return callable(getattr(value, method, None)) and not isinstance(value, type)


class Estimator(Protocol):
    """A configuration that can be attached to models."""

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
        """Returns an attachment to the model.

        seed: seed of all noise; total_steps: length of the training, over which noise is annealed;
        progress: fixed progress of the training, in place of steps / total_steps; rates: `learning_rates` is used.
        """
        ...
