"""Trainings that tests kill, in processes of their own."""

import os
import random
import resource
import signal
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import ulr_snn
from tests.helpers import samples
from ulr_snn.errors import SaveError
from ulr_snn.runs import checkpoints

EPOCHS, BATCHES = 3, 6


class Noisy(Dataset):
    """Samples [T, pixels] with random numbers of torch, NumPy and Python on top, and of a generator of its own."""

    def __init__(self) -> None:
        self.x, self.y = samples(96)
        self.own = numpy.random.default_rng(3)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        level = torch.rand(()) + numpy.random.rand() + random.random() + self.own.random()
        return self.x[:, i] * level.float(), self.y[i]


def plain() -> TensorDataset:
    x, y = samples(96)
    return TensorDataset(x.transpose(0, 1), y)


def stacked(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])


class OverTime(nn.Module):
    """A net with a norm and with dropout, which draws from torch's generator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm, self.drop = nn.Linear(8, 24), nn.BatchNorm1d(24), nn.Dropout(0.2)
        self.fire, self.last = ulr_snn.LIF(), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        drive = self.norm(self.first(x).flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.last(self.drop(self.fire(drive)))


def train_one(folder: str | Path | None, resume: bool | str = False, **options: object) -> ulr_snn.Result:
    torch.manual_seed(7)
    numpy.random.seed(7)
    random.seed(7)
    generator = torch.Generator().manual_seed(4)
    loader = DataLoader(Noisy(), 16, shuffle=True, generator=generator, collate_fn=stacked)
    given = {
        "val_loader": DataLoader(plain(), 48, collate_fn=stacked),
        "save_every": None if folder is None else 2,
        "device": "cpu",
        **options,
    }
    return ulr_snn.train(
        OverTime(), loader, EPOCHS, time_first=False, run_dir=folder, resume=resume, progress=False, **given
    )


def figures(result: ulr_snn.Result) -> tuple[list[dict], list[Tensor]]:
    """History and weights, without times."""
    history = [{k: v for k, v in entry.items() if k != "seconds"} for entry in result.history]
    return history, [value.clone() for value in result.model.state_dict().values()]


def killed(folder: str, resume: bool, after: int | None, in_save: bool, done: str) -> None:
    """Trains, and kills itself before some operation: a step, or a write of a file in a checkpoint."""
    torch.set_num_threads(1)
    if after is not None:
        count = iter(range(10**6))

        def step(*_: object) -> None:
            if next(count) == after:
                os.kill(os.getpid(), signal.SIGKILL)

        if in_save:
            flush = checkpoints._flush
            checkpoints._flush = lambda file: (step(), flush(file))
        else:
            forward = OverTime.forward
            OverTime.forward = lambda self, x: (step(), forward(self, x))[1]
    torch.save(figures(train_one(folder, resume)), done)


def without_room(folder: str, done: str) -> None:
    """Resumes a run with no room for its next checkpoint."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        train_one(folder, "changed", estimator=ulr_snn.ULR(copies=4))
        text = "trained"
    except SaveError as error:
        text = str(error)
    Path(done).write_text(text)
