"""`train`, the training loop."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import (
    Batches,
    Callbacks,
    Count,
    FilePath,
    Flag,
    Interval,
    Positive,
    Resume,
    Whole,
    checked,
)
from ulr_snn.estimators.base import Estimator
from ulr_snn.estimators.ulr import or_default
from ulr_snn.evaluate import evaluate
from ulr_snn.kernels import ranks
from ulr_snn.kernels.precision import Autocast
from ulr_snn.losses.metrics import check_metrics
from ulr_snn.losses.named import LossSpec
from ulr_snn.model.interface import Interface
from ulr_snn.model.mode import Model, mode_of, move, pick_device
from ulr_snn.runs.directory import RunDirectory
from ulr_snn.runs.keeping import Keeper
from ulr_snn.runs.optim import USUAL, defaults, length, loader_length, make_optimizer, make_scheduler, same_rates
from ulr_snn.runs.session import Session, Settings
from ulr_snn.runs.settings import described
from ulr_snn.runs.steps import Stepper


@dataclass
class Result:
    """The result of `train`. history: one dict for each epoch; metrics: figures of the whole run."""

    model: nn.Module = field(repr=False)
    estimator: Estimator = field(repr=False)
    metrics: dict[str, Any]
    history: list[dict[str, Any]] = field(repr=False)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draws loss and accuracy by epoch into a PNG file."""
        from ulr_snn.runs.plots import save_curves

        save_curves(self.history, path)


@checked
def train(
    model: Model,
    loader: Batches,
    epochs: Count = 10,
    *,
    val_loader: Batches | None = None,
    estimator: Estimator | None = None,
    loss: LossSpec = "ce_count",
    optimizer: Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    lr: Positive | None = None,
    scheduler: str | Callable[[Optimizer], LRScheduler] | None = "auto",
    device: str | torch.device = "auto",
    seed: Whole = 0,
    time_first: bool = True,
    max_steps: Count | None = None,
    accumulate: Count = 1,
    clip: Positive | None = None,
    autocast: Autocast | None = None,
    callbacks: Callbacks = (),
    run_dir: FilePath | RunDirectory | None = None,
    resume: Resume = False,
    save_every: Interval | None = None,
    progress: Flag | None = True,
    layout: str | None = None,
    output: Any = None,
    metrics: Mapping[str, Any] | None = None,
) -> Result:
    """Trains the model in place. With `Online()` the optimizer steps at every time step of every batch.

    loader: batches (x, y), (x, y, lengths), dicts or x alone, of all the forms in docs/data.md. layout: "TB" for events
    [T, B, ...], "BT" (or time_first=False), "B" for static inputs that the model repeats. output: what is read of the
    model's result, an index, key, function or "all" (default: its first tensor). metrics: {name: (outputs, targets) ->
    number or [B], or a torchmetrics object}. optimizer: an instance, or a factory parameters -> optimizer (default: see
    `make_optimizer`). lr: the highest rate (default: 1.5e-2 for `ULR` and `Online`, else 1e-2). scheduler: "one-cycle",
    "cosine", None, or a factory (default: see `make_scheduler`); it steps once for `accumulate` batches. max_steps:
    most optimizer steps. clip: bound of the gradient norm. autocast: torch.bfloat16 or torch.float16 for layers.
    callbacks: called with history entry and model after every epoch; one that returns True ends the training. run_dir:
    receives checkpoints, metrics.json and curves.png. resume: continue the run in run_dir; "changed": with other
    settings than at its start. save_every: steps or time ("30s", "10m", "2h") between checkpoints within an epoch
    (default: 10m). Ctrl-C and SIGTERM then end it after a step, saved. Raises UsageError for a wrong use, before the
    first step if it can, FloatingPointError for losses, gradients or weights that are not finite, and SaveError.
    """
    given = locals().copy()
    check_loaders(loader, val_loader, epochs if max_steps is None and not callbacks else 1)
    interface, estimator = Interface.of(time_first, layout, output), or_default(estimator)
    settings = Settings(pick_device(device), accumulate, clip, max_steps, autocast, check_metrics(metrics), estimator)
    move(model, settings.device)
    moving = make_optimizer(model, optimizer, lr, estimator)
    started = described(model, loader, moving, given | {"estimator": estimator, "layout": interface.layout})
    steps, batches = length(loader, epochs, accumulate, max_steps)
    with same_rates(moving, scheduler):
        schedule = make_scheduler(moving, scheduler, steps, defaults(estimator) if optimizer is None else USUAL)
        attached = estimator.attach(model, loss, seed, interface, batches, rates=optimizer is None)
        keeper = Keeper.of(run_dir, resume, save_every, started)
        with mode_of(model, training=True), attached, keeper.in_use():
            stepper, first = Stepper(model, attached, moving, schedule, clip), ranks.rank() == 0
            session = Session(model, loader, attached, stepper, settings, keeper, callbacks if first else ())
            session.run(epochs, validation(model, val_loader, loss, interface, settings), bool(progress) and first)
            figures = session.finish(seed, val_loader is not None)
    return Result(model, estimator, figures, session.history)


def validation(
    model: nn.Module, loader: Iterable[Any] | None, loss: LossSpec, interface: Interface, settings: Settings
) -> Callable[[], dict[str, Any]] | None:
    """Returns a function that evaluates the model with deterministic firing; None without validation data."""
    if loader is None:
        return None
    options: dict[str, Any] = {"layout": interface.layout, "output": interface.output, "metrics": settings.metrics}
    return partial(evaluate, model, loader, loss=loss, device=settings.device, autocast=settings.autocast, **options)


def check_reusable(times: int, **loaders: Iterable[Any] | None) -> None:
    """Raises UsageError for a loader that cannot be used so many times."""
    for name, given in loaders.items():
        if isinstance(given, Iterator) and times > 1:
            raise UsageError(
                f"the {name} is a {type(given).__name__}, which can be used only once; give a list or a DataLoader"
            )


def check_loaders(loader: Iterable[Any], val_loader: Iterable[Any] | None, epochs: int) -> None:
    """Raises UsageError for an empty loader, and for validation data that are used up after the first epoch."""
    for name, given in (("loader", loader), ("val_loader", val_loader)):
        if given is not None and loader_length(given) == 0:
            raise UsageError(f"the {name} is empty; give it at least one batch")
    check_reusable(epochs, val_loader=val_loader)
