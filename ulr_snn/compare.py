"""`compare`: trains one model by several estimators, side by side."""

import copy
import ctypes
import gc
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ulr_snn.errors import UsageError, unwritable
from ulr_snn.errors.arguments import Batches, Count, Flag, LearningRates, Rates, Whole, checked
from ulr_snn.estimators.base import Estimator
from ulr_snn.estimators.online import Online
from ulr_snn.estimators.ulr import ULR, or_default
from ulr_snn.losses.named import LossSpec
from ulr_snn.model.mode import Model, pick_device
from ulr_snn.runs import order
from ulr_snn.runs.directory import peak_memory_bytes, versions
from ulr_snn.runs.optim import defaults
from ulr_snn.runs.progress import say
from ulr_snn.train import Result, check_reusable, train

DIVERGED = {"accuracy": 0.0, "loss": None, "seconds_a_step": None, "forward_passes": 0}
COLUMNS = ("method", "lr", "accuracy", "loss", "ms a step", "peak MiB", "forward passes")


@dataclass
class Comparison:
    """The result of `compare`, printed as a table. rows: a dict for each training; versions: library versions."""

    rows: list[dict[str, Any]]
    versions: dict[str, str]

    def best(self, method: str) -> dict[str, Any]:
        """Returns the row of this method with the highest validation accuracy, or lowest loss for regression. Raises
        UsageError for a method that was not compared."""
        rows = [row for row in self.rows if row["method"] == method]
        if not rows:
            names = ", ".join(dict.fromkeys(row["method"] for row in self.rows))
            raise UsageError(f"{method!r} was not compared; the methods are {names}")
        return max(rows, key=lambda row: (row["loss"] is not None, row["accuracy"] or 0.0, -(row["loss"] or 0.0)))

    def __str__(self) -> str:
        cells = [
            (
                row["method"],
                "" if row["lr"] is None else f"{row['lr']:g}",
                "" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f} %",
                "diverged" if row["loss"] is None else f"{row['loss']:.4f}",
                "" if row["loss"] is None else f"{1e3 * row['seconds_a_step']:.1f}",
                "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**20:.1f}",
                f"{row['forward_passes']:,}",
            )
            for row in self.rows
        ]
        lines = [COLUMNS, tuple("---" for _ in COLUMNS), *cells]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes all rows as JSON. Raises UsageError for a path that cannot be written."""
        try:
            Path(path).write_text(json.dumps({"versions": self.versions, "rows": self.rows}, indent=2) + "\n")
        except OSError as error:
            raise unwritable(path, error) from error

    def plot(self, path: str | PathLike[str]) -> None:
        """Draws accuracy (or loss) by epoch, step time and memory into a PNG file."""
        from ulr_snn.runs.plots import save_comparison

        save_comparison(self.rows, path)


@checked
def compare(
    model: Model,
    loader: Batches,
    val_loader: Batches,
    methods: Sequence[str] | Mapping[str, Any] = ("ulr", "surrogate"),
    epochs: Count = 10,
    *,
    lr: LearningRates | None = None,
    loss: LossSpec = "ce_count",
    device: str | torch.device = "auto",
    seed: Whole = 0,
    time_first: bool = True,
    progress: Flag | None = True,
    **options: Any,
) -> Comparison:
    """Trains the same model by each method, from the same weights, on the same batches in the same order.

    Figures are those of the validation data after the last epoch. Peak memory is the memory added by the training
    (CUDA: allocated; Linux: resident in this process; elsewhere unknown). A warm-up step of each method comes first. A
    diverged training has a row without a loss. At the end the model has its first weights and `.grad` again.

    methods: "ulr" (`ULR()`), "surrogate" (surrogate-gradient BPTT; models of other libraries keep their surrogate),
    other names in `ulr_snn.peers.METHODS`, or names with estimators, as in {"ulr": ULR(copies=2)}.
    lr: one or several learning rates, each a training, for all methods or by method (default: that of `train`).
    options: see `train`. Raises UsageError for an unknown method, and as `train` does.
    """
    estimators = chosen(methods)
    if isinstance(lr, Mapping) and (others := [name for name in lr if name not in estimators]):
        raise UsageError(f"compare got lr for {', '.join(map(repr, others))}; the methods are {', '.join(estimators)}")
    if options.keys() & {"run_dir", "resume"} or isinstance(options.get("optimizer"), torch.optim.Optimizer):
        raise UsageError("compare got run_dir, resume or an optimizer of its own; every training starts anew")
    trainings = each_training(estimators, lr, "optimizer" in options)
    check_reusable(len(trainings), loader=loader, val_loader=val_loader)
    device = pick_device(device)
    weights = copy.deepcopy(model.to(device).state_dict())
    gradients = [q.grad for q in model.parameters()]
    rows = []
    options |= {"loss": loss, "device": device, "seed": seed, "time_first": time_first}
    whole = options | {"val_loader": val_loader, "progress": progress}
    a_step = options | {"callbacks": (), "progress": False}
    try:
        # Warm-up: what a process loads once belongs to no method. An iterator has no batch to spare for it.
        for estimator in estimators.values() if not isinstance(loader, Iterator) else ():
            model.load_state_dict(weights)
            with same_draws(loader, seed), suppress(FloatingPointError, UsageError):  # the training raises them again
                train(model, list(itertools.islice(loader, 1)), 1, estimator=estimator, **a_step)
        for method, estimator, rate in trainings:
            model.load_state_dict(weights)
            row: dict[str, Any] = {"method": method, "lr": rate, "seed": seed, **DIVERGED, "history": []}
            rows.append(row)
            if progress:
                say(method if rate is None else f"{method}, lr {rate:g}")
            with same_draws(loader, seed), PeakMemory(device) as memory, suppress(FloatingPointError):
                row |= figures(train(model, loader, epochs, estimator=estimator, lr=rate, **whole))
            row["peak_memory_bytes"] = memory.bytes
    finally:
        model.load_state_dict(weights)
        for q, gradient in zip(model.parameters(), gradients, strict=True):
            q.grad = gradient
    return Comparison(rows, versions())


def figures(result: Result) -> dict[str, Any]:
    """Returns the figures of a training that has not diverged."""
    last, metrics = result.history[-1], result.metrics
    return {
        "accuracy": last["val_accuracy"],
        "loss": last["val_loss"],
        "seconds_a_step": metrics["seconds"] / metrics["steps"],
        "forward_passes": metrics["forward_passes"],
        "history": result.history,
    }


def chosen(methods: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Returns estimators by name."""
    from ulr_snn.peers import METHODS

    if isinstance(methods, Mapping):
        return {name: or_default(estimator) for name, estimator in methods.items()}
    known: dict[str, Callable[[], Estimator]] = {"ulr": ULR, "online": Online, **METHODS}
    if isinstance(methods, str) or not methods or any(name not in known for name in methods):
        raise UsageError(f"compare got methods={methods!r}; give some of {', '.join(known)}, or names with estimators")
    return {name: known[name]() for name in methods}


def each_training(
    estimators: Mapping[str, Estimator], lr: Rates | Mapping[str, Rates] | None, own_rate: bool
) -> list[tuple[str, Estimator, float | None]]:
    """Returns method, estimator and learning rate of each training. own_rate: the optimizer has one of its own."""
    return [
        (method, estimator, rate)
        for method, estimator in estimators.items()
        for rate in rates(method, lr, None if own_rate else defaults(estimator).lr)
    ]


def rates(method: str, lr: Rates | Mapping[str, Rates] | None, default: float | None) -> list[float | None]:
    """Returns the learning rates of a method."""
    found = lr.get(method) if isinstance(lr, Mapping) else lr
    if found is None:
        return [default]
    return list(found) if isinstance(found, Sequence) else [found]


@contextmanager
def same_draws(loader: Iterable[Any], seed: int) -> Iterator[None]:
    """Seeds torch's global generators inside the context, and restores all generators after it."""
    before = order.states(loader)
    torch.default_generator.manual_seed(seed % 2**64)
    if torch.cuda.is_initialized():  # else torch.manual_seed would keep the seed for later
        torch.cuda.manual_seed_all(seed % 2**64)
    try:
        yield
    finally:
        order.restore(before, loader)


class PeakMemory:
    """Measures the peak of the memory added inside the context, `bytes`; None on unsupported systems."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif sys.platform == "linux":
            give_back_freed_memory()
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # resets the peak of this process
                self._before = resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        now = peak_memory_bytes(self.device) if self.device.type == "cuda" else None
        if self._before is not None:
            self.bytes = max(0, (resident("VmHWM") if now is None else now) - self._before)


def give_back_freed_memory() -> None:
    """Returns freed memory to the system; memory reused by the next training would not be measured."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not every C library has it
        ctypes.CDLL(None).malloc_trim(0)


def resident(key: str) -> int:
    """Returns the resident memory of this process (VmRSS), or its peak (VmHWM), in bytes, on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
