"""Whether long use grows: 10,000 training steps of many kinds in one process, with all that a process may lose.

    python -m benchmarks.soak [--steps 10000]     # seven minutes on one thread

One half of the steps are long trainings, one of each kind. The other half are short trainings, one kind after
another, each from `train` to its end, with `evaluate` in between. Every training writes a run directory with
checkpoints. Samples are taken after garbage collection: resident memory, open files, threads, child processes, tensors
and other objects that Python's garbage collector knows, and the size of the run directory. Rows go to results/soak.csv.

The exit code is 1 if a figure grows. A phase is one long training, or all short ones. Its first third is warm-up:
kernels are compiled, feedback is created, pools fill. The growth of a phase is the least over its last third, minus
the least over its middle third. BOUNDS has the largest growth of each figure.
"""

import argparse
import gc
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ulr_snn
from benchmarks.speed import HERE, about, write
from ulr_snn import LIF, ULR, Fold, LeakyReadout, Online, RecurrentLIF, TimeAverage, WeightNoise
from ulr_snn.compare import give_back_freed_memory

STEPS, BATCH, CLASSES, SIDE = 16, 32, 4, 12
BATCHES = 10  # training steps of an epoch
SHORT = 2  # epochs of a short training
SAMPLES = 24  # of a long training
# The largest growth of each figure. A third of a long training has 160 steps in the run of 10,000. Files, threads,
# children and tensors must not grow at all. A step that kept an object would add 160 objects; the history has an entry
# for each epoch, 16 in a third, and its checkpoint grows by these. A step that kept its batch (147 kB) would add 23 MB,
# and one that kept the spikes of its smallest layer (131 kB) 20 MB. The allocator alone changed it by 0.2 MB.
BOUNDS = {"memory_mb": 2.0, "files": 0, "threads": 0, "children": 0, "tensors": 0, "objects": 100, "folder_kb": 64}


# -- kinds of training -------------------------------------------------------------------------------------


def dense(width: int = 128) -> nn.Module:
    hidden = nn.Linear(2 * SIDE**2, width), LIF(), nn.Linear(width, 128), LIF()
    return nn.Sequential(nn.Flatten(2), *hidden, TimeAverage(), nn.Linear(128, CLASSES))


def convolutional() -> nn.Module:
    one, two = Fold(nn.Conv2d(2, 8, 5, 2, 2), nn.BatchNorm2d(8)), Fold(nn.Conv2d(8, 16, 3, padding=1), nn.MaxPool2d(2))
    return nn.Sequential(one, LIF(), two, LIF(), nn.Flatten(2), TimeAverage(), nn.Linear(16 * 9, CLASSES))


def recurrent() -> nn.Module:
    hidden = nn.Linear(2 * SIDE**2, 64), RecurrentLIF(64), nn.Dropout(0.1)
    return nn.Sequential(nn.Flatten(2), *hidden, TimeAverage(), nn.Linear(64, CLASSES))


def read_out() -> nn.Module:
    hidden = nn.Linear(2 * SIDE**2, 64), LIF(), nn.Linear(64, CLASSES)
    return nn.Sequential(nn.Flatten(2), *hidden, LeakyReadout(0.9))


def snntorch() -> nn.Module:
    import snntorch

    neurons = [snntorch.Leaky(0.9, init_hidden=True) for _ in range(2)]
    return nn.Sequential(
        nn.Flatten(), nn.Linear(2 * SIDE**2, 64), neurons[0], nn.Linear(64, 64), neurons[1], nn.Linear(64, CLASSES)
    )


class Latch(nn.Module):
    """A neuron that nobody knows: an accumulator of whole numbers that empties when it fires."""

    def forward(self, current: Tensor) -> Tensor:
        level, spikes = torch.zeros_like(current[0]), []
        for now in current:
            level = level + (8 * now).round()
            spikes.append((level > 8).to(now.dtype))
            level = torch.where(level > 8, 0.0, level)
        return torch.stack(spikes)


def black_box() -> nn.Module:
    hidden = nn.Linear(2 * SIDE**2, 64), Latch()
    return nn.Sequential(nn.Flatten(2), *hidden, TimeAverage(), nn.Linear(64, CLASSES))


@dataclass(frozen=True)
class Kind:
    """A kind of training. options: those of `train`; workers: processes that fetch its batches."""

    make: Callable[[], nn.Module]
    options: dict[str, Any] = field(default_factory=dict)
    workers: int = 0

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a library at its import
            return self.make()


KINDS = {
    "dense": Kind(partial(dense, 512)),  # whose sequences are large enough for the pool of arrays
    "convolutional": Kind(convolutional),
    "recurrent": Kind(recurrent),
    "weight noise": Kind(dense, {"estimator": ULR("global", copies=4, noise={"1.weight": WeightNoise()})}),
    "residual": Kind(dense, {"estimator": ULR("residual")}),
    "online": Kind(read_out, {"estimator": Online(), "loss": "ce_rate"}),
    "chunks": Kind(dense, {"estimator": ULR(memory="replay")}),
    "snntorch": Kind(snntorch),
    "black box": Kind(black_box),
    "workers": Kind(dense, workers=1),
}


def batches(count: int = BATCHES) -> list[tuple[Tensor, Tensor]]:
    """Events [T, B, 2, SIDE, SIDE] that are more frequent in the quarter of the pixels that belongs to the class."""
    draw, found = torch.Generator().manual_seed(0), []
    for _ in range(count):
        y = torch.arange(BATCH) % CLASSES
        rate = torch.full((BATCH, 2, SIDE, SIDE), 0.05)
        for c in range(CLASSES):
            rate[y == c, :, c * SIDE // CLASSES : (c + 1) * SIDE // CLASSES] = 0.2
        found.append(((torch.rand(STEPS, *rate.shape, generator=draw) < rate).to(torch.uint8), y))
    return found


def loader(kind: Kind) -> Iterable[Any]:
    """Returns the batches of a kind, fetched by other processes if it asks for them."""
    made = batches()
    if not kind.workers:
        return made
    x, y = torch.cat([x for x, _ in made], 1), torch.cat([y for _, y in made])
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(x.transpose(0, 1), y), BATCH, num_workers=kind.workers, generator=generator)


def train(kind: Kind, model: nn.Module, epochs: int, run_dir: Path, **options: Any) -> ulr_snn.Result:
    """Trains a model of a kind, with a validation after each epoch."""
    layout = "BT" if kind.workers else None
    given = {"val_loader": loader(kind), "layout": layout, "device": "cpu", "progress": False, "run_dir": run_dir}
    return ulr_snn.train(model, loader(kind), epochs, **given, **kind.options, **options)


# -- samples -----------------------------------------------------------------------------------------------


def sampled(phase: str, step: int, run_dir: Path) -> dict[str, Any]:
    """Returns what the process holds now."""
    give_back_freed_memory()
    process = psutil.Process()
    memory = process.memory_info().rss  # before the list of objects, which takes some
    objects = gc.get_objects()
    return {
        "phase": phase,
        "step": step,
        "memory_mb": round(memory / 2**20, 2),
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "children": len(process.children()),
        "tensors": sum(issubclass(type(item), Tensor) for item in objects),
        "objects": len(objects),
        "folder_kb": sum(file.stat().st_size for file in run_dir.rglob("*") if file.is_file()) // 1024,
    }


def soak(steps: int, kinds: Iterable[str] = KINDS, leak: Callable[[], Any] | None = None) -> Iterator[dict[str, Any]]:
    """Trains for about so many steps and yields samples. leak: called after every epoch, for tests."""
    kinds = list(kinds)
    epochs = max(6, steps // (2 * len(kinds) * BATCHES))
    rounds = max(6, steps // (2 * len(kinds) * BATCHES * SHORT))
    gc.collect()
    gc.freeze()  # what is there now is counted no more
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in kinds:
                yield from long_training(name, epochs, Path(folder) / name, leak)
            models = {name: KINDS[name].model() for name in kinds}  # snnTorch never lets go of a model
            for number in range(rounds):
                for name in kinds:
                    short_training(name, models[name], number, Path(folder))
                    if leak is not None:
                        leak()
                yield sampled("short trainings", (number + 1) * len(kinds) * SHORT * BATCHES, Path(folder))
    finally:
        gc.unfreeze()


def long_training(name: str, epochs: int, run_dir: Path, leak: Callable[[], Any] | None) -> list[dict[str, Any]]:
    """Makes one training of a kind and returns its samples."""
    found: list[dict[str, Any]] = []

    def after(entry: dict[str, Any], _: nn.Module) -> None:
        if leak is not None:
            leak()
        if entry["epoch"] % max(1, epochs // SAMPLES) == 0:
            found.append(sampled(name, entry["epoch"] * BATCHES, run_dir))

    train(KINDS[name], KINDS[name].model(), epochs, run_dir, callbacks=[after])
    return found


def short_training(name: str, model: nn.Module, seed: int, folder: Path) -> None:
    """Makes one short training of a kind, and an evaluation."""
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        train(KINDS[name], model, SHORT, Path(run_dir) / "run", seed=seed)
    ulr_snn.evaluate(model, batches(2), "stochastic", loss=loss_of(name), device="cpu")


def loss_of(name: str) -> str:
    return KINDS[name].options.get("loss", "ce_count")


def growth(rows: list[dict[str, Any]], figure: str) -> float:
    """Returns the growth of a figure in a phase: the least of its last third minus the least of its middle third.

    What loaders with processes hold rises and falls, by 160 objects in three epochs.
    """
    values, third = [row[figure] for row in rows], len(rows) // 3
    return min(values[-third:]) - min(values[-2 * third : -third])


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the growth of each figure in each phase, with its bound."""
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    return [
        {"phase": phase, "figure": figure, "growth": growth([row for row in rows if row["phase"] == phase], figure),
         "bound": bound}
        for phase in phases for figure, bound in BOUNDS.items()
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for row in soak(options.steps, options.kinds):
        rows.append(row)
        print(*row.values(), flush=True)
    write(options.results / "soak.csv", [row | about("ulr", "cpu") for row in rows])
    grown = [found for found in verdicts(rows) if found["growth"] > found["bound"]]
    for found in grown:
        print(f"{found['phase']}: {found['figure']} grew by {found['growth']:g}, more than {found['bound']:g}")
    return int(bool(grown))


if __name__ == "__main__":
    sys.exit(main())
