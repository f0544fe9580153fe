"""compare: one model, trained by likelihood ratios and by what they are compared with, side by side."""

import copy
import ctypes
import gc
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ulr_snn.errors import UsageError
from ulr_snn.estimators.online import Online
from ulr_snn.estimators.ulr import ULR
from ulr_snn.losses.named import LossSpec
from ulr_snn.model.mode import pick_device
from ulr_snn.runs.directory import peak_memory_bytes, versions
from ulr_snn.runs.optim import DEFAULT_LR
from ulr_snn.train import Result, train

DIVERGED = {"accuracy": 0.0, "loss": None, "seconds_a_step": None, "forward_passes": 0}
Rates = float | Sequence[float]
COLUMNS = ("method", "lr", "accuracy", "loss", "ms a step", "peak MiB", "forward passes")


@dataclass
class Comparison:
    """What `compare` found; print it. rows: a dict a training, its history in it; versions: of what it ran on."""

    rows: list[dict[str, Any]]
    versions: dict[str, str]

    def best(self, method: str) -> dict[str, Any]:
        """The row of this method with the highest accuracy on the validation data; of a regression, the lowest loss."""
        rows = [row for row in self.rows if row["method"] == method]
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
        """Writes all rows as JSON."""
        Path(path).write_text(json.dumps({"versions": self.versions, "rows": self.rows}, indent=2) + "\n")

    def plot(self, path: str | PathLike[str]) -> None:
        """Draws accuracy by epoch (of a regression, the loss), seconds a step and memory into a PNG file."""
        from ulr_snn.runs.plots import save_comparison

        save_comparison(self.rows, path)


def compare(
    model: nn.Module,
    loader: Iterable,
    val_loader: Iterable,
    methods: Sequence[str] | Mapping[str, Any] = ("ulr", "surrogate"),
    epochs: int = 10,
    *,
    lr: Rates | Mapping[str, Rates] | None = None,
    loss: LossSpec = "ce_count",
    device: str | torch.device = "auto",
    seed: int = 0,
    time_first: bool = True,
    progress: bool = True,
    **options: Any,
) -> Comparison:
    """Trains the same model by each method, from the same weights, on the same batches in the same order.

    methods: "ulr" (likelihood ratios, `ULR()`), "surrogate" (surrogate-gradient BPTT, of a model of another library
    with the surrogate that it has), other names in `ulr_snn.peers.METHODS`, or names with estimators, as in {"ulr":
    ULR(copies=2)}. lr: one or several, each a training of its own, for all methods or by method (default 1e-2).
    options: see `train`.
    Afterwards the model has the weights that it began with. Figures are those of the validation data after the last
    epoch; peak memory is what training took on top of what there was before (CUDA: allocated; Linux: resident in this
    process; elsewhere unknown). A step of each method comes before, so that what a process loads once to train belongs
    to none. Raises UsageError for a method that is not known, and as `train` does; a training whose loss becomes
    infinite has a row without a loss.
    """
    estimators = chosen(methods)
    if options.keys() & {"run_dir", "resume"} or isinstance(options.get("optimizer"), torch.optim.Optimizer):
        raise UsageError("compare got run_dir, resume or an optimizer of its own; every training starts anew")
    device = pick_device(device)
    weights = copy.deepcopy(model.to(device).state_dict())
    rows = []
    options |= {"loss": loss, "device": device, "seed": seed, "time_first": time_first}
    whole = options | {"val_loader": val_loader, "progress": progress}
    a_step = options | {"callbacks": (), "progress": False}
    default = None if "optimizer" in options else DEFAULT_LR
    try:
        for estimator in estimators.values() if not isinstance(loader, Iterator) else ():  # which gives a batch once
            model.load_state_dict(weights)
            with same_draws(loader, seed), suppress(FloatingPointError, UsageError):  # the training itself will tell
                train(model, list(itertools.islice(loader, 1)), 1, estimator=estimator, lr=default, **a_step)
        for method, estimator in estimators.items():
            for rate in rates(method, lr, default):
                model.load_state_dict(weights)
                row = {"method": method, "lr": rate, "seed": seed, **DIVERGED, "history": []}
                rows.append(row)
                with same_draws(loader, seed), PeakMemory(device) as memory, suppress(FloatingPointError):
                    row |= figures(train(model, loader, epochs, estimator=estimator, lr=rate, **whole))
                row["peak_memory_bytes"] = memory.bytes
    finally:
        model.load_state_dict(weights)
    return Comparison(rows, versions())


def figures(result: Result) -> dict[str, Any]:
    """What a row says of a training that has not diverged."""
    last, metrics = result.history[-1], result.metrics
    return {
        "accuracy": last["val_accuracy"],
        "loss": last["val_loss"],
        "seconds_a_step": metrics["seconds"] / metrics["steps"],
        "forward_passes": metrics["forward_passes"],
        "history": result.history,
    }


def chosen(methods: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Estimators by name."""
    from ulr_snn.peers import METHODS

    if isinstance(methods, Mapping):
        return dict(methods)
    known = {"ulr": ULR, "online": Online, **METHODS}
    if isinstance(methods, str) or not methods or any(name not in known for name in methods):
        raise UsageError(f"compare got methods={methods!r}; give some of {', '.join(known)}, or names with estimators")
    return {name: known[name]() for name in methods}


def rates(method: str, lr: Rates | Mapping[str, Rates] | None, default: float | None) -> list[float | None]:
    """The learning rates of a method."""
    found = lr.get(method) if isinstance(lr, Mapping) else lr
    if found is None:
        return [default]
    return list(found) if isinstance(found, Sequence) else [found]


@contextmanager
def same_draws(loader: Iterable, seed: int) -> Iterator[None]:
    """Seeds torch's global generators for a training. Afterwards they, and those of the loader, are as they were, so
    that the next training draws alike and the caller goes on as before."""
    on_cuda = torch.cuda.is_initialized()
    before = torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_cuda else []
    torch.default_generator.manual_seed(seed)
    if on_cuda:  # else torch.manual_seed would keep the seed for later
        torch.cuda.manual_seed_all(seed)
    holders = [loader, getattr(loader, "sampler", None)]
    generators = [g for g in (getattr(holder, "generator", None) for holder in holders) if g is not None]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        torch.set_rng_state(before[0])
        if on_cuda:
            torch.cuda.set_rng_state_all(before[1])


class PeakMemory:
    """bytes: the most memory inside, on top of what there was at the start; None where the system does not tell."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif sys.platform == "linux":
            give_back_freed_memory()
            try:
                Path("/proc/self/clear_refs").write_text("5")  # sets the peak of this process to what it has now
            except OSError:
                self._before = None
            else:
                self._before = resident("VmRSS")
        else:
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            now = peak_memory_bytes(self.device) if self.device.type == "cuda" else resident("VmHWM")
            self.bytes = max(0, now - self._before)


def give_back_freed_memory() -> None:
    """What earlier trainings freed goes back to the system, or this one would take it without a trace."""
    gc.collect()
    with suppress(OSError, AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)


def resident(key: str) -> int:
    """VmRSS, resident memory of this process, or VmHWM, its peak, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
