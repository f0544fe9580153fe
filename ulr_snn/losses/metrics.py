"""Metrics of predictions, as means over samples."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import accepts, shown
from ulr_snn.kernels import ranks
from ulr_snn.losses.brought import of_single, of_torchmetrics
from ulr_snn.losses.named import total
from ulr_snn.model.batch import Batch
from ulr_snn.model.neurons import output_mask
from ulr_snn.model.targets import IGNORED, left_out
from ulr_snn.model.trees import mapped

BINS = 15  # number of confidence bins in the calibration error
COUNTS = ("samples", "weight", "loss", "correct", "labelled", "classes")  # of a `Tally`
TAKEN = ("loss", "accuracy", "samples", "seconds", "bound", "spikes", "operations")


def scores(outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor] | None:
    """Returns scores [N, C] and class indices [N] of all samples that have one, or of all their time steps if these
    have labels of their own; None if the targets are no class indices of the outputs.

    Scores of samples are outputs summed over time, without padding. Neurons of a population code are summed by class.
    """
    labels, slots = batch.targets.labels, batch.view.slots
    if labels is None or outputs.ndim not in (2, 3) or len(slots) > 1:
        return None
    if slots and len(slots[0].shape) != 1:
        return None  # an image, or a single number
    mask = output_mask(batch.lengths, outputs)
    kept = torch.ones_like(labels, dtype=torch.bool)
    for index in {IGNORED, *(loss.ignored for loss in batch.objective.brought)}:
        kept &= ~left_out(labels, index)
    if labels.ndim == 1:
        found = total(outputs, mask)
    elif outputs.ndim == 3:
        found = outputs
        kept = kept if mask is None else kept & (mask.reshape(labels.shape) > 0)
    else:
        return None
    populations = [loss.number_of_classes for loss in batch.objective.brought if loss.number_of_classes]
    if populations:
        found = found.unflatten(-1, (populations[0], -1)).sum(-1)
    found, labels = found[kept], labels[kept].long()
    if found.shape[-1] < 2 or not bool(((labels >= 0) & (labels < found.shape[-1])).all()):
        return None
    return found, labels


def share_counted(batch: Batch) -> float:
    """Returns the share of a batch's samples that a mean of the objective is over: those with a label, if all its
    losses leave out the others."""
    share = batch.targets.labelled() if batch.objective.of_labelled else None
    return 1.0 if share is None else share.item()


@dataclass
class Tally:
    """Running means of loss, accuracy and metrics over samples. metrics: see `OwnMetric`. classes: the targets of all
    batches so far are class indices of the outputs; weight: number of samples whose losses are averaged."""

    metrics: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 0
    weight: float = 0.0
    loss: float = 0.0
    correct: int = 0
    labelled: int = 0
    classes: bool = True

    def __post_init__(self) -> None:
        self.own = {name: OwnMetric(metric) for name, metric in self.metrics.items()}

    def add(self, loss: Tensor, outputs: Tensor, batch: Batch, scored: tuple[Tensor, Tensor] | None) -> None:
        """Adds a batch. loss: [B]; outputs: in the form inside the library; scored: see `scores`."""
        self.samples += len(loss)
        weight = share_counted(batch)
        self.weight += len(loss) * weight
        self.loss += loss.sum().item() * weight
        self.classes &= scored is not None
        if scored is not None:
            self.correct += int((scored[0].argmax(-1) == scored[1]).sum())
            self.labelled += len(scored[1])
        for name, metric in self.own.items():
            metric.add(name, outputs, batch)

    def joined(self) -> "Tally":
        """Returns the tally over the batches of all ranks, for metrics that are functions. All ranks must call it; an
        object of torchmetrics does so by itself."""
        if ranks.count() == 1:
            return self
        found = copy.copy(self)
        own = [number for metric in self.own.values() for number in (metric.sum, metric.samples)]
        counts = self.samples, self.weight, self.loss, self.correct, self.labelled, not self.classes, *own
        totals = ranks.totals([float(count) for count in counts])
        samples, found.weight, found.loss, correct, labelled, others, *of_metrics = totals
        found.samples, found.correct, found.labelled = int(samples), int(correct), int(labelled)
        found.classes = not others
        found.own = {name: copy.copy(metric) for name, metric in self.own.items()}
        for i, metric in enumerate(found.own.values()):
            metric.sum, metric.samples = of_metrics[2 * i], int(of_metrics[2 * i + 1])
        return found

    def running(self) -> dict[str, float]:
        """Returns the means of the loss and, if targets are class indices, of the accuracy so far."""
        found = {"loss": self.loss / self.weight if self.weight else 0.0}
        if self.classes and self.labelled:
            found["accuracy"] = self.correct / self.labelled
        return found

    def state_dict(self) -> dict[str, Any]:
        own = {name: metric.state_dict() for name, metric in self.own.items()}
        return {name: getattr(self, name) for name in COUNTS} | {"own": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        older = {"weight": float(state["samples"]), "classes": state["correct"] is not None}
        for name in COUNTS:
            setattr(self, name, older[name] if name not in state else state[name] or 0)
        for name, found in state["own"].items():
            if name in self.own:
                self.own[name].load_state_dict(found)

    def means(self) -> dict[str, Any]:
        """Returns the means of loss, accuracy (None if targets are no class indices) and metrics."""
        found = self.running()
        own = {name: metric.value() for name, metric in self.own.items()}
        return {"loss": found["loss"], "accuracy": found.get("accuracy")} | own


class OwnMetric:
    """A metric of the user's: a function (outputs, targets) -> [B] or a number, or an object of torchmetrics.

    A function gets outputs and targets in the user's form, and its values are averaged over samples. An object of
    torchmetrics gets time steps as so many samples, without padding; outputs over time are summed where the targets
    have no time axis.
    """

    def __init__(self, metric: Any) -> None:
        self.collects = of_torchmetrics(metric)
        self.metric = copy.deepcopy(metric) if self.collects else metric
        self.sum, self.samples = 0.0, 0
        if self.collects:
            self.metric.reset()
            self.metric.persistent(True)  # its state is part of `state_dict`

    def state_dict(self) -> dict[str, Any]:
        collected = self.metric.state_dict() if self.collects else {}
        return {"sum": self.sum, "samples": self.samples, "collected": dict(collected)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sum, self.samples = state["sum"], state["samples"]
        if self.collects:
            self.metric.load_state_dict(state["collected"])

    @torch.no_grad()
    def add(self, name: str, outputs: Tensor, batch: Batch) -> None:
        """Adds a batch; see `Tally.add`."""
        mask = output_mask(batch.lengths, outputs)
        outputs = outputs if mask is None else outputs * mask
        if self.collects:
            self.metric.to(outputs.device).update(*seen_by_torchmetrics(outputs, batch))
            return
        value = self.metric(batch.view.external(outputs), batch.targets.external())
        try:
            value = torch.as_tensor(value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise UsageError(
                f"the metric {name!r} returned {type(value).__name__}; return one number, or [B]"
            ) from None
        if value.numel() != 1 and value.shape != (batch.samples,):
            raise UsageError(
                f"the metric {name!r} returned shape {tuple(value.shape)}; return one number, or one for each sample"
            )
        self.sum += float(value.mean()) * batch.samples
        self.samples += batch.samples

    def value(self) -> Any:
        """Returns the mean over all samples, or what the object computes: a number, or nested lists of them."""
        if not self.collects:
            return self.sum / max(1, self.samples)
        found = self.metric.compute()
        return found.tolist() if isinstance(found, Tensor) else found


def seen_by_torchmetrics(outputs: Tensor, batch: Batch) -> tuple[Any, Tensor]:
    """Returns the outputs, zero on padding, and the targets of a batch as an object of torchmetrics gets them."""
    leaf = of_single(batch.targets.only, outputs, batch.view)
    if outputs.ndim < 3:
        return batch.view.external(outputs), leaf.tensor
    if not leaf.over_time:
        return outputs.sum(0), leaf.tensor
    mask = output_mask(batch.lengths, outputs)
    own = outputs.new_ones(outputs.shape[:2], dtype=torch.bool) if mask is None else mask.flatten(1).bool()
    seen = mapped(batch.view.time_first.external(outputs), lambda part: part[own])
    return seen, leaf.tensor[own]


def check_metrics(metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the metrics by name, empty for None. Raises UsageError for anything but callables by free names."""
    found = dict(metrics) if isinstance(metrics, Mapping) else {}
    for name in [name for name, metric in found.items() if hasattr(metric, "compute_groups")]:
        parts = found.pop(name)  # a MetricCollection
        found |= {f"{name}_{part}": metric for part, metric in parts.items()}
    if taken := [name for name in found if name in TAKEN or not isinstance(name, str)]:
        raise UsageError(f"metrics got the name {taken[0]!r}, which has a meaning of its own; choose another")
    if not isinstance(metrics, Mapping | None) or not all(accepts(metric, 2) for metric in found.values()):
        raise UsageError(
            f"metrics={shown(metrics)} must be {{name: function or torchmetrics object}}, of (outputs, targets)"
        )
    return found


@dataclass
class Several:
    """Metrics of several predictions for each sample, as means over samples; empty if no batch was added."""

    bound: list[Tensor] = field(default_factory=list)
    confidence: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)
    differ: list[Tensor] = field(default_factory=list)
    weight: float = 0.0  # number of samples that the bound is a mean over

    def add(self, losses: Tensor, totals: Tensor | None, targets: Tensor | None, share: float = 1.0) -> None:
        """Adds a batch. losses: [K, B]; totals: scores [K, N, C] of class indices [N], if there are any; share: see
        `share_counted`."""
        self.bound.append(multi_sample(losses * share))
        self.weight += losses.shape[1] * share
        if totals is None or targets is None:
            return
        confidence, predicted = totals.softmax(-1).mean(0).max(-1)
        self.confidence.append(confidence)
        self.right.append((predicted == targets).to(confidence.dtype))
        runs, classes = len(totals), totals.shape[-1]
        votes = torch.nn.functional.one_hot(totals.argmax(-1), classes).sum(0).to(confidence.dtype)  # [B, C]
        pairs = runs * (runs - 1)
        self.differ.append(1 - (votes * (votes - 1)).sum(-1) / pairs if pairs else torch.zeros_like(confidence))

    def means(self) -> dict[str, float]:
        if not self.bound:
            return {}
        found = {"bound": torch.cat(self.bound).sum().item() / self.weight if self.weight else 0.0}
        if len(self.differ) == len(self.bound):  # all batches have class indices
            error = calibration_error(torch.cat(self.confidence), torch.cat(self.right))
            found |= {"calibration_error": error, "disagreement": torch.cat(self.differ).mean().item()}
        return found


def multi_sample(losses: Tensor) -> Tensor:
    """Returns -log mean over copies of exp(-loss), [B], for losses [K, B]. For cross-entropies it is the cross-entropy
    of the mean probability."""
    return -(torch.logsumexp(-losses, 0) - torch.tensor(float(len(losses))).log())


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Returns the expected calibration error: |mean confidence - accuracy| in equal bins of confidence, weighted by
    the number of samples."""
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=confidence.dtype, device=confidence.device).index_add_(0, bins, confidence - right)
    return gaps.abs().sum().item() / len(confidence)


@dataclass
class Activities:
    """Mean activity of a sample, by name."""

    found: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, activity: Mapping[str, Tensor]) -> None:
        for name, counted in activity.items():
            self.found.setdefault(name, []).append(counted)

    def means(self) -> dict[str, float]:
        return {name: torch.cat(counted).mean().item() for name, counted in self.found.items()}
