"""The tasks of the accuracy benchmark: for each its recordings, its net and its epochs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ulr_snn import LIF, Fold, RecurrentLIF, TimeAverage
from ulr_snn.data import EventDataset, load
from ulr_snn.runs.models import default_model

CLASSES = 10


@dataclass(frozen=True)
class Task:
    """epochs: of a full training. view: what the net sees of a part of the recordings."""

    epochs: int
    recordings: Callable[[str], tuple[EventDataset, EventDataset]]
    net: Callable[[], nn.Module]
    view: Callable[[EventDataset], Dataset] = lambda part: part


# -- recordings: read once a process -----------------------------------------------------------------------


@lru_cache
def digits(root: str) -> tuple[EventDataset, EventDataset]:
    return load("digits")


@lru_cache
def saccade_mnist(root: str) -> tuple[EventDataset, EventDataset]:
    return load("nmnist", f"{root}/saccade-mnist", time_bins=20, bin_us=15_000, binary=True)


@lru_cache
def saccade_mnist_totals(root: str) -> tuple[EventDataset, EventDataset]:
    """The same with one bin: the number of events at each pixel in the 20 bins of 15 ms together."""
    return load("nmnist", f"{root}/saccade-mnist", time_bins=1, bin_us=300_000)


@lru_cache
def spoken_digits(root: str) -> tuple[EventDataset, EventDataset]:
    return load("shd", f"{root}/spoken-digits", time_bins=50, bin_us=20_000)


def totals(part: EventDataset) -> tuple[Tensor, Tensor]:
    """Events of each recording summed over time, [n, *sample_shape] float, and labels [n]."""
    x, y, _ = part.dense(range(len(part)))
    return x.sum(0, dtype=torch.float32), y


class Rows(Dataset):
    """The rows of the pictures that recordings sum up to, one a step: [34, 68], two polarities by 34 columns.

    Counts as they are: where there was an event, there were 1.7 on average and 7 at most, and the current of
    a freshly initialised neuron is then of the order of the threshold.
    """

    def __init__(self, part: EventDataset) -> None:
        counts, self.targets = totals(part)  # [n, 2, 34, 34]
        self.rows = counts.transpose(1, 2).flatten(2)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.rows[index], int(self.targets[index])


# -- nets --------------------------------------------------------------------------------------------------


class LastSteps(nn.Module):
    """Mean over the last steps, [T, B, ...] -> [B, ...]."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, sequence: Tensor) -> Tensor:
        return sequence[-self.steps :].mean(0)


def dense() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(2),
        nn.Linear(2 * 34 * 34, 256),
        LIF(),
        nn.Linear(256, 256),
        LIF(),
        TimeAverage(),
        nn.Linear(256, CLASSES),
    )


def convolutional() -> nn.Module:
    return nn.Sequential(
        Fold(nn.Conv2d(2, 12, 5, stride=2, padding=2)),
        LIF(),
        Fold(nn.Conv2d(12, 24, 3, stride=2, padding=1)),
        LIF(),
        nn.Flatten(2),
        nn.Linear(24 * 9 * 9, 128),
        LIF(),
        TimeAverage(),
        nn.Linear(128, CLASSES),
    )


def one_hidden(inputs: int, neurons: nn.Module, features: int, average: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, features), neurons, average, nn.Linear(features, CLASSES))


TASKS = {
    "saccade-mnist-dense": Task(5, saccade_mnist, dense),
    "saccade-mnist-conv": Task(5, saccade_mnist, convolutional),
    "spoken-digits-ff": Task(10, spoken_digits, lambda: one_hidden(128, LIF(), 256, TimeAverage())),
    "spoken-digits-recurrent": Task(10, spoken_digits, lambda: one_hidden(128, RecurrentLIF(256), 256, TimeAverage())),
    "memory": Task(8, saccade_mnist_totals, lambda: one_hidden(68, RecurrentLIF(128), 128, LastSteps(5)), Rows),
    "digits": Task(10, digits, lambda: default_model((2, 16, 16), CLASSES)),
}


def logistic_regression(train: EventDataset, test: EventDataset) -> float:
    """Test accuracy of logistic regression on events summed over time, standardised; what needs no spikes."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (x, y), (x_test, y_test) = ((a.flatten(1).numpy(), b.numpy()) for a, b in map(totals, (train, test)))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2_000))
    return float(classifier.fit(x, y).score(x_test, y_test))
