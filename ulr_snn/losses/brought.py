"""Losses that users bring: functions of their own, and loss objects of torch, snnTorch and torchmetrics."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import accepts, shown
from ulr_snn.kernels import ranks
from ulr_snn.model.targets import IGNORED, Leaf, Targets, left_out
from ulr_snn.model.view import AS_IS, View

LIBRARIES = ("torch", "snntorch", "torchmetrics")
BY_CLASS = (nn.CrossEntropyLoss, nn.NLLLoss)
FUNCTIONS: dict[Any, Callable[[], Any]] = {  # of torch, with the objects that do the same
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
    F.mse_loss: nn.MSELoss,
    F.l1_loss: nn.L1Loss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.huber_loss: nn.HuberLoss,
    F.kl_div: nn.KLDivLoss,
    F.binary_cross_entropy: nn.BCELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
}


@dataclass(frozen=True)
class Brought:
    """A user's loss as a function (outputs, targets, mask) -> [B]. view: the form of the model's outputs.

    A function of the user's own gets outputs and targets in the user's form, with outputs zero on padding. An object of
    a library gets them with time first. If it has a `reduction`, the mean over the batch is the number that the object
    gives itself.
    """

    loss: Any
    view: View = AS_IS

    @classmethod
    def of(cls, loss: Any) -> "Brought":
        """Takes a loss. Raises UsageError for something that is no loss."""
        if not callable(loss):
            raise UsageError(f"loss={shown(loss)} is no loss; give a name or a callable (outputs, targets) -> [B]")
        if isinstance(loss, type):
            raise UsageError(f"the loss is the class {loss.__name__}; give an object, as in {loss.__name__}()")
        if isinstance(loss, partial) and loss.func in FUNCTIONS and not loss.args:
            loss = FUNCTIONS[loss.func](**loss.keywords)
        loss = FUNCTIONS[loss]() if loss in FUNCTIONS else loss
        if not accepts(loss.forward if isinstance(loss, nn.Module) else loss, 2):
            raise UsageError(
                f"the loss {name_of(loss)} does not take two arguments; give a function (outputs, targets) -> [B], "
                "which may call it with others"
            )
        if of_torchmetrics(loss) and loss.higher_is_better:
            raise UsageError(
                f"{type(loss).__name__} is better when higher, but a loss is minimised; give its negative as a function"
            )
        return cls(loss)

    def seen_by(self, view: View) -> "Brought":
        """Returns the loss for a model whose outputs have this form."""
        if self.reads_one and len(view.slots) > 1:
            raise UsageError(
                f"{type(self.loss).__name__} reads one output, but output= chose several; give a function of your own"
            )
        return replace(self, view=view)

    @property
    def reads_one(self) -> bool:
        """True for a library's object, which reads one tensor."""
        kind = self.loss if hasattr(self.loss, "__qualname__") else type(self.loss)
        return (getattr(kind, "__module__", None) or "").partition(".")[0] in LIBRARIES

    @property
    def number_of_classes(self) -> int | None:
        """The number of classes of a population code (snnTorch's losses); None without one."""
        return getattr(self.loss, "num_classes", None) if getattr(self.loss, "population_code", False) else None

    @property
    def ignored(self) -> int:
        """The label that the loss leaves out."""
        given = getattr(self.loss, "keywords", {}).get("ignore_index", IGNORED)  # of functools.partial
        found = getattr(getattr(self.loss, "loss_fn", self.loss), "ignore_index", given)
        return found if isinstance(found, int) else IGNORED

    @property
    def reduction(self) -> str:
        found = getattr(self.loss, "reduction", "none")
        return found if found in ("mean", "sum", "batchmean") else "none"

    @cached_property
    def unreduced(self) -> Callable[[Any, Any], Any]:
        """The loss without its reduction."""
        if self.reduction == "none":
            return self.loss
        own = copy.copy(self.loss)
        own.reduction = "none"
        if getattr(getattr(own, "loss_fn", None), "reduction", None) == self.reduction:  # snnTorch's temporal losses
            own.loss_fn = copy.copy(own.loss_fn)
            own.loss_fn.reduction = "none"
        return own

    def __call__(self, outputs: Tensor, targets: Targets | Tensor, mask: Tensor | None) -> Tensor:
        targets = Targets.alone(targets, outputs)
        whole = outputs
        outputs = outputs if mask is None or outputs.ndim < 3 else outputs * mask
        if hasattr(self.loss, "spk_time_fn"):
            outputs = outputs.detach()  # the derivative of snnTorch's spike times is a surrogate
        if self.reads_one or of_torchmetrics(self.loss):
            value = self._of_library(outputs, of_single(targets.only, outputs, self.view), mask)
        else:
            value = self._of_user(self.view.external(outputs), targets.external())
            if self.reduction != "none":
                first = len(self.view.slots) == 1 and self.view.slots[0].axes != "TB"
                value = self._reduced(value, whole, None, None, batch_first=first)
        return checked(value, whole)

    def _of_user(self, outputs: Any, targets: Any) -> Any:
        """Calls a function of the user's own. Raises UsageError if it reads what a pass does not leave in the model."""
        try:
            return self.unreduced(outputs, targets)
        except AttributeError as error:
            if not isinstance(error.obj, nn.Module):
                raise
            raise UsageError(
                f"the loss reads {error.name!r} of {type(error.obj).__name__}, which no pass leaves there; let the "
                "model return it, and read it by output='all'"
            ) from error

    def _of_library(self, outputs: Tensor, targets: Leaf, mask: Tensor | None) -> Any:
        """Returns the value of a library's object, which sees time first. Samples of the same length are evaluated
        together, without padding."""
        over_time, labels = outputs.ndim >= 3, targets.tensor
        if isinstance(self.loss, BY_CLASS) and over_time and targets.over_time:
            each = self.unreduced(outputs.flatten(0, 1), labels.flatten(0, 1))
            value = each.view(outputs.shape[:2]) if isinstance(each, Tensor) and each.ndim == 1 else each
            return self._reduced(value, outputs, labels, mask)
        if mask is None or not over_time:
            return self._alike(outputs, targets, labels)
        lengths = mask.flatten(1).sum(0).long()
        rows = [(lengths == length).nonzero()[:, 0] for length in lengths.unique()]
        values = []
        for some in rows:
            own = slice(int(lengths[some[0]]))
            part = labels[own, some] if targets.over_time else labels[some]
            value = self._alike(outputs[own, some], replace(targets, tensor=part), labels)
            values.append(checked(value, outputs[own, some]))
        return torch.cat(values)[torch.cat(rows).argsort()]

    def _alike(self, outputs: Tensor, targets: Leaf, labels: Tensor) -> Any:
        """Returns the value of a library's object for samples of the same length. labels: targets of the batch."""
        seen = self._time_first(outputs)
        if of_torchmetrics(self.loss):
            return by_sample(copy.deepcopy(self.loss), seen, targets, outputs.ndim >= 3)
        value = self._answer(seen, targets.tensor)
        if isinstance(value, Tensor) and value.ndim == 0:  # a number for the whole batch all the same
            return by_sample(self.loss, seen, targets, outputs.ndim >= 3)
        return self._reduced(value, outputs, labels, None, samples=labels.shape[targets.axis])

    def _time_first(self, outputs: Tensor) -> Any:
        """Returns the outputs in the user's form, but with time first."""
        return self.view.time_first.external(outputs)

    def _answer(self, outputs: Any, targets: Tensor) -> Any:
        """Calls the loss. Raises UsageError if a cross-entropy of torch refuses outputs over time."""
        try:
            return self.unreduced(outputs, targets)
        except (RuntimeError, ValueError) as error:
            values = targets.is_floating_point()
            if not isinstance(outputs, Tensor) or (outputs.shape == targets.shape and values):
                raise
            shapes = f"outputs {tuple(outputs.shape)} and targets {targets.dtype} {tuple(targets.shape)}"
            advice = f"give targets{'' if values else ' of floats'} that fit them"
            if isinstance(self.loss, BY_CLASS) and outputs.ndim >= 3 and targets.ndim == 1:
                advice = "use loss='ce_rate' or 'ce_count', or TimeAverage() before the last layer"
            raise UsageError(f"{name_of(self.loss)} got {shapes}, and refused them; {advice}") from error

    def _reduced(
        self,
        value: Any,
        outputs: Tensor,
        targets: Tensor | None,
        mask: Tensor | None,
        batch_first: bool = False,
        samples: int | None = None,
    ) -> Any:
        """Returns one value a sample, whose mean over the batch is what the object gives itself. targets: those of the
        batch; None if their weights are not known; batch_first: the first axis of values over time is that of the
        samples; samples: those of the batch, if the outputs are only some."""
        if self.reduction == "none" or not isinstance(value, Tensor) or value.ndim < 1:
            return value
        batch = int(outputs.ndim >= 3 and value.shape[:2] == outputs.shape[:2] and not batch_first)
        if batch and mask is not None:
            value = value * mask.reshape(*mask.shape[:2], *[1] * (value.ndim - 2))
        sums = value.movedim(batch, 0).flatten(1).sum(1) if value.ndim > 1 else value
        samples = samples or len(sums)
        if self.reduction == "sum":
            return sums * ranks.joined(samples)
        if self.reduction == "batchmean":  # torch takes the first axis for that of the samples
            return sums * (ranks.joined(samples) / len(value)) if batch else sums
        weights = None if targets is None else self._weights(targets, mask if batch else None)
        if weights is not None:
            if ranks.share() is not None:  # once, because all calls of a step see the same targets
                each = weights / samples
                weights = ranks.once(id(self.loss), lambda: ranks.averaged([each])[0]) * samples
            return sums * samples / weights.clamp(min=torch.finfo(sums.dtype).tiny)
        each = value.numel() / len(sums)
        if batch and mask is not None:
            own = mask.reshape(*mask.shape[:2]).sum(0)
            return sums / (own * (each / len(value)))
        return sums / each

    def _weights(self, targets: Tensor, mask: Tensor | None) -> Tensor | None:
        """Returns the sum of the weights by which torch's cross-entropies divide, without padding; None for other
        means."""
        loss = getattr(self.loss, "loss_fn", self.loss)
        if not isinstance(loss, BY_CLASS) or targets.is_floating_point():
            return None
        kept = ~left_out(targets, loss.ignore_index)
        kept = kept if mask is None else kept & (mask.reshape(targets.shape) > 0)
        return kept.sum() if loss.weight is None else loss.weight[targets[kept].long()].sum()


def name_of(loss: Any) -> str:
    """Returns the name of a user's loss."""
    return getattr(loss, "__name__", type(loss).__name__)


def of_torchmetrics(loss: Any) -> bool:
    """Returns whether an object is a metric of torchmetrics."""
    return any(kind.__module__ == "torchmetrics.metric" for kind in type(loss).__mro__)


def of_single(targets: Leaf, outputs: Tensor, view: View) -> Leaf:
    """Returns targets with an axis for a single feature, which values [B] or [T, B] need not have. Torch would compare
    each sample with the targets of all. view: that of the model, whose own outputs may have no such axis."""
    seen = view.time_first.external(outputs)
    if not isinstance(seen, Tensor) or seen.ndim != outputs.ndim:
        return targets
    values, shape = targets.tensor.is_floating_point(), outputs.shape[1 - targets.axis if outputs.ndim > 2 else 0 : -1]
    if values and outputs.shape[-1] == 1 and targets.tensor.shape == shape:
        return replace(targets, tensor=targets.tensor[..., None])
    return targets


def by_sample(loss: Any, outputs: Tensor, targets: Leaf, over_time: bool) -> Tensor:
    """Returns the value of a loss, or of a metric of torchmetrics, for each sample alone, [B]. over_time: outputs are
    [T, B, ...]."""
    axis = int(over_time)
    values = []
    for sample in range(outputs.shape[axis]):
        one = outputs.narrow(axis, sample, 1).contiguous()
        target = targets.tensor.narrow(targets.axis, sample, 1).contiguous()
        if of_torchmetrics(loss):
            loss.reset()
            if over_time and targets.over_time:
                one, target = one.flatten(0, 1), target.flatten(0, 1)
        values.append(loss(one, target))
    return torch.stack(values)


def checked(value: Any, outputs: Tensor) -> Tensor:
    """Returns a loss in the type of the outputs. Raises UsageError unless it has one value for each sample."""
    batch = outputs.shape[1] if outputs.ndim >= 3 else outputs.shape[0]
    if isinstance(value, list | tuple | numpy.ndarray):  # the function does not use torch
        try:
            value = torch.as_tensor(value)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UsageError(f"the loss returned {shown(value)}; return one number a sample") from error
    shape = tuple(getattr(value, "shape", ()))
    if shape != (batch,):
        raise UsageError(
            f"the loss returned shape {shape}; a likelihood ratio needs one value a sample, [{batch}] "
            "(use reduction='none' and sum over everything but the batch)"
        )
    if value.is_complex():
        raise UsageError("the loss returned complex numbers; return real ones, such as their absolute values")
    return value.to(outputs.device, outputs.dtype)
