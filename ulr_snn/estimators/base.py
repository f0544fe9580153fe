"""The protocol of estimators, which `train` uses and peers implement, too."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ulr_snn.errors import NotFiniteError, UsageError
from ulr_snn.kernels import ranks
from ulr_snn.losses.named import LossSpec
from ulr_snn.model.batch import Batch
from ulr_snn.model.interface import Interface
from ulr_snn.model.trees import mapped, tensors


@dataclass
class Estimate:
    """The losses and outputs of one step.

    loss: [B], mean over copies; packed: the outputs of all K copies in the form inside the library, [K, T, B, ...] or
    [K, B, F]; stats: plain numbers; batch: the batch as the model saw it.
    """

    loss: Tensor
    packed: Tensor
    stats: dict[str, Any]
    batch: Batch

    @property
    def outputs(self) -> Any:
        """What the loss reads of the model's result, with the copies in front: [K, ...model's output...]."""
        copies = [self.batch.view.external(outputs) for outputs in self.packed]
        if isinstance(copies[0], Tensor):
            return torch.stack(copies)
        columns = iter(zip(*map(tensors, copies), strict=True))
        return mapped(copies[0], lambda _: torch.stack(next(columns)))

    @property
    def skipped(self) -> bool:
        """True if no gradient was added because a loss was not finite."""
        return bool(self.stats.get("skipped"))


class Attachment:
    """An estimator that is attached to a model and adds gradients to `.grad`; the base of all attachments.

    online: `steps` gives an estimate for every time step, each meant for an update; over_ranks: `.grad` is the gradient
    of the joined batch of all ranks of torch.distributed;
    on_nonfinite: what a loss or gradient that is not finite does to a training, as in `ULR`;
    forward_passes: number of forward passes of a sample so far.
    Raises UsageError under torch.distributed without `over_ranks`.
    """

    online = False
    over_ranks = False
    on_nonfinite = "stop"

    def __init__(self, model: nn.Module, loss: LossSpec, interface: Interface) -> None:
        if ranks.count() > 1 and not self.over_ranks:
            raise UsageError(
                f"{type(self).__name__} does not average its gradients over the {ranks.count()} ranks of this run; use "
                "one process, or set over_ranks = True in a class that does"
            )
        self.model, self.loss, self.interface = model, loss, Interface.of(interface)
        self.forward_passes = 0
        self.wrapper: DistributedDataParallel | None = None  # of the model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def backward(self, x: Any, targets: Any, loss: LossSpec | None = None, lengths: Tensor | None = None) -> Estimate:
        """Runs forward passes and adds the gradient of the batch's mean expected loss to every trainable `.grad`.

        x: events in the batch's layout, of any dtype, dense or sparse COO (a list of events); a list of sequences, or a
        tuple or dict of several inputs. targets: [B, ...] or over time in the same layout, or a tuple, list or dict.
        loss: replaces the loss of `attach`. lengths: [B], steps past them are padding.
        Raises UsageError for wrong shapes, labels, losses or events, and FloatingPointError for a loss not finite.
        """
        raise NotImplementedError

    def steps(
        self, x: Any, targets: Any, loss: LossSpec | None = None, lengths: Tensor | None = None
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

    def averages_for(self, wrapper: nn.Module) -> None:
        """Keeps a DistributedDataParallel from averaging gradients by itself, until `close`."""
        wrapper = getattr(wrapper, "_orig_mod", wrapper)  # of torch.compile
        if isinstance(wrapper, DistributedDataParallel):
            self.wrapper, wrapper.require_backward_grad_sync = wrapper, False

    def close(self) -> None:
        """Frees the memory kept between steps."""
        if self.wrapper is not None:
            self.wrapper.require_backward_grad_sync = True


def in_sum(estimates: list[Estimate]) -> Estimate:
    """Returns the estimate of a whole sequence from the estimates of its time steps."""
    if len(estimates) == 1:
        return estimates[0]
    loss = torch.stack([estimate.loss for estimate in estimates]).sum(0)
    packed = torch.cat([estimate.packed for estimate in estimates], 1)
    stats = {name: value for name, value in estimates[-1].stats.items() if name != "time"}
    skipped = any(estimate.skipped for estimate in estimates)
    return Estimate(loss, packed, stats | ({"skipped": True} if skipped else {}), estimates[0].batch)


def refuse(losses: Tensor, step: int, unchanged: bool, advice: str) -> NoReturn:
    """Raises FloatingPointError for losses [K, B] or [B] that are not finite. unchanged: no weight has changed yet."""
    bad = (~torch.isfinite(losses)).reshape(-1, losses.shape[-1]).any(0).nonzero()
    whose = f"sample {int(bad[0])}" if len(bad) else "a sample of another process"
    if unchanged:
        raise NotFiniteError(
            f"the loss of {whose} is not finite at step {step}, before a weight has changed; look for NaN or infinite "
            "values in the model's outputs, and in the loss"
        )
    raise FloatingPointError(f"the loss of {whose} is not finite at step {step}; {advice}")


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
        interface: Interface,
        total_steps: int | None = None,
        *,
        progress: float | None = None,
        rates: bool = False,
    ) -> Attachment:
        """Returns an attachment to the model.

        interface: axes of batches, and the outputs that the loss reads; seed: seed of all noise; total_steps: length of
        the training, over which noise is annealed; progress: fixed progress of the training, in place of steps /
        total_steps; rates: `learning_rates` is used.
        """
        ...
