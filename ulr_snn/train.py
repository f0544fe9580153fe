"""`train`, the training loop."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import Batches, Callbacks, Count, FilePath, Flag, Positive, Whole, checked
from ulr_snn.estimators.base import Attachment, Estimate, Estimator, in_sum
from ulr_snn.estimators.ulr import or_default
from ulr_snn.evaluate import evaluate
from ulr_snn.kernels.precision import Autocast, reduced_precision
from ulr_snn.losses.metrics import Tally, check_metrics, scores
from ulr_snn.losses.named import LossSpec
from ulr_snn.model.interface import Interface
from ulr_snn.model.mode import Model, all_finite, mode_of, pick_device
from ulr_snn.model.reading import read
from ulr_snn.runs.directory import RunDirectory, peak_memory_bytes, versions
from ulr_snn.runs.optim import loader_length, make_optimizer, make_scheduler, total_steps
from ulr_snn.runs.progress import progress_bar, report


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
    scheduler: str | Callable[[Optimizer], LRScheduler] | None = "cosine",
    device: str | torch.device = "auto",
    seed: Whole = 0,
    time_first: bool = True,
    max_steps: Count | None = None,
    accumulate: Count = 1,
    clip: Positive | None = None,
    autocast: Autocast | None = None,
    callbacks: Callbacks = (),
    run_dir: FilePath | RunDirectory | None = None,
    resume: Flag = False,
    progress: Flag | None = True,
    layout: str | None = None,
    output: Any = None,
    metrics: Mapping[str, Any] | None = None,
) -> Result:
    """Trains the model in place. With `Online()` the optimizer steps at every time step of every batch.

    loader: batches (x, y), (x, y, lengths), dicts or x alone, of all the forms in docs/data.md. layout: "TB" for events
    [T, B, ...], "BT" (or time_first=False), "B" for static inputs that the model repeats. output: what is read of the
    model's result, an index, key, function or "all" (default: its first tensor). metrics: {name: (outputs, targets) ->
    number or [B], or a torchmetrics object}. optimizer: an instance, or a factory parameters -> optimizer (default:
    Adam with lr 1e-2 and a factor for each parameter, see `make_optimizer`). scheduler: "cosine", None, or a factory;
    it steps once for `accumulate` batches. max_steps: most optimizer steps. clip: bound of the gradient norm. autocast:
    torch.bfloat16 or torch.float16 for the model's layers. callbacks: called after every epoch with its history entry
    and the model; one that returns True ends the training. run_dir: receives checkpoints, metrics.json and curves.png.
    resume: continue the run in run_dir. Raises UsageError for a wrong use, before the first step if it can.
    """
    check_loaders(loader, val_loader, epochs if max_steps is None and not callbacks else 1)
    if resume and run_dir is None:
        raise UsageError("train got resume=True without run_dir; name the directory of the run that is to go on")
    interface, estimator = Interface.of(time_first, layout, output), or_default(estimator)
    settings = Settings(pick_device(device), accumulate, clip, max_steps, autocast, check_metrics(metrics))
    model.to(settings.device)
    stepper = make_optimizer(model, optimizer, lr)
    schedule = make_scheduler(stepper, scheduler, loader, epochs, accumulate, max_steps)
    batches = total_steps(loader, epochs, 1, None if max_steps is None else max_steps * accumulate)
    attached = estimator.attach(model, loss, seed, interface, batches, rates=optimizer is None)
    run = RunDirectory(run_dir, resume=resume) if isinstance(run_dir, str | PathLike) else run_dir
    with mode_of(model, training=True), attached:
        session = Session(model, loader, attached, stepper, schedule, settings)
        validate = settings.validation(model, val_loader, loss, interface)
        session.run(epochs, validate, callbacks, run, resume, bool(progress))
    figures = session.figures(seed, val_loader is not None)
    if run is not None:
        run.finish(figures, session.history)
    return Result(model, estimator, figures, session.history)


@dataclass(frozen=True)
class Settings:
    """What a training run was asked for, see `train`."""

    device: torch.device
    accumulate: int
    clip: float | None
    max_steps: int | None
    autocast: torch.dtype | None
    metrics: dict[str, Any]

    def validation(
        self, model: nn.Module, loader: Iterable[Any] | None, loss: LossSpec, interface: Interface
    ) -> Callable[[], dict[str, Any]] | None:
        """Returns a function that evaluates the model with deterministic firing; None without validation data."""
        if loader is None:
            return None
        options: dict[str, Any] = {"layout": interface.layout, "output": interface.output, "metrics": self.metrics}
        return partial(evaluate, model, loader, loss=loss, device=self.device, autocast=self.autocast, **options)


@dataclass
class Session:
    """The state of a training run between epochs. steps: optimizer steps, or batches with `Online`."""

    model: nn.Module
    loader: Iterable[Any]
    attached: Attachment
    optimizer: Optimizer
    schedule: LRScheduler | None
    settings: Settings
    epoch: int = 0
    steps: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.attached.online and self.settings.accumulate > 1:
            raise UsageError(
                f"train got accumulate={self.settings.accumulate} with an update at every time step; use accumulate=1"
            )

    @property
    def finished(self) -> bool:
        return self.settings.max_steps is not None and self.steps >= self.settings.max_steps

    def run(
        self,
        epochs: int,
        validate: Callable[[], dict[str, Any]] | None,
        callbacks: Iterable[Callable[[dict[str, Any], nn.Module], Any]],
        run: RunDirectory | None,
        resume: bool,
        progress: bool,
    ) -> None:
        """Runs the remaining epochs."""
        if run is not None and resume:
            self.load_state_dict(run.load_checkpoint(self.model))
        for epoch in range(self.epoch + 1, epochs + 1):
            if self.finished:
                return
            entry = self.run_epoch(epoch, epochs, progress)
            if validate is not None:
                measured = validate()
                entry |= {f"val_{name}": measured[name] for name in ("loss", "accuracy", *self.settings.metrics)}
            if isinstance(self.schedule, ReduceLROnPlateau):
                self.schedule.step(entry.get("val_loss", entry["train_loss"]))
            if progress:
                report(entry, epochs, self.settings.metrics)
            stops = [callback(entry, self.model) is True for callback in callbacks]
            if run is not None:
                run.save_checkpoint(self.model, self.state_dict())
            if any(stops):
                return

    def run_epoch(self, epoch: int, epochs: int, progress: bool) -> dict[str, Any]:
        """Runs one epoch and returns its history entry."""
        started, passes, tally = perf_counter(), self.attached.forward_passes, Tally(self.settings.metrics)
        self.zero_grad()
        waiting, lr = 0, self.lr
        with progress_bar(self.loader, f"epoch {epoch}/{epochs}", progress) as batches:
            for batch in batches:
                with reduced_precision(self.settings.device, self.settings.autocast):
                    estimate = self.estimate(*read(batch, self.model, self.settings.device))
                if estimate.skipped:
                    continue
                waiting += 1
                outputs = estimate.packed.mean(0)
                tally.add(estimate.loss, outputs, estimate.batch, scores(outputs, estimate.batch))
                batches.set_postfix(tally.running(), refresh=False)
                if waiting == self.settings.accumulate:
                    lr, waiting = self.end_step(waiting), 0
                    if self.finished:
                        break
            if waiting:
                lr = self.end_step(waiting)
        if not tally.samples:
            raise UsageError(
                f"epoch {epoch} made no step: the loader gave no batch (a generator can be used only once), or no loss "
                "was finite and on_nonfinite='skip' left every batch out"
            )
        lost = next((name for name, q in self.model.named_parameters() if not all_finite(q)), None)
        if lost is not None:
            raise FloatingPointError(f"{lost} is not finite after epoch {epoch}; lower the learning rate")
        self.epoch, seconds, means = epoch, perf_counter() - started, tally.means()
        self.seconds += seconds
        entry: dict[str, Any] = {"epoch": epoch} | {f"train_{name}": value for name, value in means.items()}
        self.history.append(
            entry | {"seconds": seconds, "forward_passes": self.attached.forward_passes - passes, "lr": lr}
        )
        return self.history[-1]

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.optimizer.param_groups[0]["lr"]

    def zero_grad(self) -> None:
        """Clears the gradients of all parameters, also of parameters that the optimizer leaves out."""
        self.optimizer.zero_grad()
        self.model.zero_grad()

    def estimate(self, x: Any, targets: Any, lengths: Tensor | None) -> Estimate:
        """Adds the gradient of a batch (or makes all updates of online learning), and returns its estimate."""
        estimates = []
        for estimate in self.attached.steps(x, targets, lengths=lengths):
            if self.attached.online and not estimate.skipped:
                self.optimizer_step(1)
            estimates.append(estimate)
        return in_sum(estimates)

    def end_step(self, batches: int) -> float:
        """Makes a step on the mean gradient of the batches, and a step of the schedule. Returns the learning rate."""
        lr = self.lr
        if not self.attached.online:
            self.optimizer_step(batches)
        if self.schedule is not None and not isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step()
        self.steps += 1
        return lr

    def optimizer_step(self, batches: int) -> None:
        """Makes an optimizer step on the mean gradient of the batches."""
        groups = self.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        if batches > 1:
            for p in parameters:
                p.grad /= batches
        if self.settings.clip is not None:
            nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        with self.learning_rates():
            self.optimizer.step()
        self.zero_grad()

    @contextmanager
    def learning_rates(self) -> Iterator[None]:
        """Multiplies the learning rates of the default optimizer by the attachment's factors, inside the context."""
        factors = self.attached.learning_rates()
        if not factors:
            yield
            return
        names = {id(q): name for name, q in self.model.named_parameters()}
        groups, rates = self.optimizer.param_groups, [group["lr"] for group in self.optimizer.param_groups]
        try:
            for group in groups:  # each group has one parameter
                group["lr"] *= factors.get(names[id(group["params"][0])], 1.0)
            yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def figures(self, seed: int, validated: bool) -> dict[str, Any]:
        """Returns the figures of the whole run, as metrics.json holds them."""
        last = self.history[-1] if validated and self.history else {}
        return {
            **{f"test_{name}": last.get(f"val_{name}") for name in ("accuracy", *self.settings.metrics)},
            "epochs": self.epoch,
            "steps": self.steps,
            "seconds": self.seconds,
            "peak_memory_bytes": peak_memory_bytes(self.settings.device),
            "forward_passes": self.attached.forward_passes,
            "seed": seed,
            "device": str(self.settings.device),
            "versions": versions(),
        }

    def state_dict(self) -> dict[str, Any]:
        generator = getattr(self.loader, "generator", None)
        return {
            "epoch": self.epoch,
            "steps": self.steps,
            "seconds": self.seconds,
            "history": self.history,
            "attached": self.attached.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "torch_generator": torch.get_rng_state(),
            "loader_generator": None if generator is None else generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        self.epoch, self.steps, self.seconds = state["epoch"], state["steps"], state["seconds"]
        self.history = state["history"]
        self.attached.load_state_dict(state["attached"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None and state["schedule"] is not None:
            self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["torch_generator"])
        generator = getattr(self.loader, "generator", None)
        if state["loader_generator"] is not None and generator is not None:
            generator.set_state(state["loader_generator"])


def check_loaders(loader: Iterable[Any], val_loader: Iterable[Any] | None, epochs: int) -> None:
    """Raises UsageError for an empty loader, and for validation data that are used up after the first epoch."""
    for name, given in (("loader", loader), ("val_loader", val_loader)):
        if given is not None and loader_length(given) == 0:
            raise UsageError(f"the {name} is empty; give it at least one batch")
    if isinstance(val_loader, Generator) and epochs > 1:
        raise UsageError("the val_loader is a generator, which can be used only once; give a list or a DataLoader")
