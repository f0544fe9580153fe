"""Metrics of predictions, as means over samples."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

BINS = 15  # number of confidence bins in the calibration error


@dataclass
class Tally:
    """Running means of loss and accuracy over samples."""

    samples: int = 0
    loss: float = 0.0
    correct: int | None = None

    def add(self, loss: Tensor, totals: Tensor, targets: Tensor) -> None:
        """Adds a batch. loss: [B]; totals: outputs summed over time [B, C]."""
        self.samples += len(targets)
        self.loss += loss.sum().item()
        if not targets.is_floating_point() and targets.ndim == 1 and totals.ndim == 2:
            self.correct = (self.correct or 0) + int((totals.argmax(1) == targets).sum())

    def means(self) -> dict[str, float | None]:
        count = max(1, self.samples)
        return {"loss": self.loss / count, "accuracy": None if self.correct is None else self.correct / count}


@dataclass
class Several:
    """Metrics of several predictions for each sample, as means over samples; empty if no batch was added."""

    bound: list[Tensor] = field(default_factory=list)
    confidence: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)
    differ: list[Tensor] = field(default_factory=list)

    def add(self, losses: Tensor, totals: Tensor, targets: Tensor) -> None:
        """Adds a batch. losses: [K, B]; totals: outputs summed over time [K, B, C]."""
        self.bound.append(multi_sample(losses))
        if targets.is_floating_point() or targets.ndim != 1:
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
        found = {"bound": torch.cat(self.bound).mean().item()}
        if self.differ:
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
