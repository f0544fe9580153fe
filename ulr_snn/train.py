"""`train`, the training loop."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ulr_snn.errors import UsageError
from ulr_snn.estimators.base import Attachment, Estimate, Estimator
from ulr_snn.estimators.ulr import or_default
from ulr_snn.evaluate import evaluate
from ulr_snn.kernels.precision import reduced_precision
from ulr_snn.losses.metrics import Tally
from ulr_snn.losses.named import LossSpec, total
from ulr_snn.model.mode import check_model, mode_of, pick_device, unpack
from ulr_snn.model.neurons import output_mask
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


def train(
    model: nn.Module,
    loader: Iterable[Any],
    epochs: int = 10,
    *,
    val_loader: Iterable[Any] | None = None,
    estimator: Estimator | None = None,
    loss: LossSpec = "ce_count",
    optimizer: Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    lr: float | None = None,
    scheduler: str | Callable[[Optimizer], LRScheduler] | None = "cosine",
    device: str | torch.device = "auto",
    seed: int = 0,
    time_first: bool = True,
    max_steps: int | None = None,
    accumulate: int = 1,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
    callbacks: Iterable[Callable[[dict[str, Any], nn.Module], None]] = (),
    run_dir: str | PathLike[str] | RunDirectory | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Result:
    """Trains the model in place. With `Online()` the optimizer steps at every time step of every batch.

    loader: batches (x, y) or (x, y, lengths); x [T, B, ...] ([B, T, ...] with time_first=False), dense or sparse COO
    (a list of events), y [B]. val_loader: evaluated with deterministic firing after every epoch.
    optimizer: an instance, or a factory parameters -> optimizer. The default is Adam with `lr` (1e-2) times a factor
    for each parameter (see estimators/step_sizes.py): smaller where a step would move membranes by several thresholds,
    larger in a readout, rising over the training if layers begin at rest, and over T for `Online()` with T time steps.
    scheduler: "cosine" (up to lr in the first tenth of the run, then down to 0), None (constant), or a factory
    optimizer -> scheduler; it steps once for `accumulate` batches. max_steps: bound of the optimizer steps (batches
    with `Online()`). accumulate: batches per optimizer step. clip: bound of the gradient norm.
    autocast: torch.bfloat16 or torch.float16 for the model's own layers; weights, membranes, credit and losses keep
    their type. callbacks: called after every epoch with its history entry and the model. run_dir: receives a
    checkpoint after each epoch, and metrics.json and curves.png at the end. resume: continue the run in run_dir.
    progress: a bar and a line for each epoch, on stderr. Raises UsageError for a wrong use, if possible before the
    first step.
    """
    check_model(model)
    check_arguments(loader, epochs, accumulate, max_steps)
    place, estimator = pick_device(device), or_default(estimator)
    model.to(place)
    stepper = make_optimizer(model, optimizer, lr)
    schedule = make_scheduler(stepper, scheduler, loader, epochs, accumulate, max_steps)
    run = RunDirectory(run_dir, resume=resume) if isinstance(run_dir, str | PathLike) else run_dir
    batches = total_steps(loader, epochs, 1, None if max_steps is None else max_steps * accumulate)
    with (
        mode_of(model, training=True),
        estimator.attach(model, loss, seed, time_first, batches, rates=optimizer is None) as attached,
    ):
        session = Session(model, loader, attached, stepper, schedule, place, accumulate, clip, max_steps, autocast)
        options: dict[str, Any] = {"loss": loss, "device": place, "time_first": time_first, "autocast": autocast}
        validate = None if val_loader is None else partial(evaluate, model, val_loader, **options)
        session.run(epochs, validate, callbacks, run, resume, progress)
    metrics = session.metrics(seed, val_loader is not None)
    if run is not None:
        run.finish(metrics, session.history)
    return Result(model, estimator, metrics, session.history)


@dataclass
class Session:
    """The state of a training run between epochs. steps: optimizer steps, or batches with `Online`."""

    model: nn.Module
    loader: Iterable[Any]
    attached: Attachment
    optimizer: Optimizer
    schedule: LRScheduler | None
    device: torch.device
    accumulate: int
    clip: float | None
    max_steps: int | None
    autocast: torch.dtype | None = None
    epoch: int = 0
    steps: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.attached.online and self.accumulate > 1:
            raise UsageError(
                f"train got accumulate={self.accumulate} with an update at every time step; use accumulate=1"
            )

    @property
    def finished(self) -> bool:
        return self.max_steps is not None and self.steps >= self.max_steps

    def run(
        self,
        epochs: int,
        validate: Callable[[], dict[str, Any]] | None,
        callbacks: Iterable[Callable[[dict[str, Any], nn.Module], None]],
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
                entry["val_loss"], entry["val_accuracy"] = measured["loss"], measured["accuracy"]
            if progress:
                report(entry, epochs)
            for callback in callbacks:
                callback(entry, self.model)
            if run is not None:
                run.save_checkpoint(self.model, self.state_dict())

    def run_epoch(self, epoch: int, epochs: int, progress: bool) -> dict[str, Any]:
        """Runs one epoch and returns its history entry."""
        started, passes, tally = perf_counter(), self.attached.forward_passes, Tally()
        self.zero_grad()
        waiting, lr = 0, self.lr
        with progress_bar(self.loader, f"epoch {epoch}/{epochs}", progress) as batches:
            for batch in batches:
                x, targets, lengths = unpack(batch, self.device)
                with reduced_precision(self.device, self.autocast):
                    found = self.estimate(x, targets, lengths)
                if found is None:
                    continue
                waiting += 1
                tally.add(*found, targets)
                batches.set_postfix(tally.means(), refresh=False)
                if waiting == self.accumulate:
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
        self.epoch, seconds, means = epoch, perf_counter() - started, tally.means()
        self.seconds += seconds
        entry = {"epoch": epoch, "train_loss": means["loss"], "train_accuracy": means["accuracy"], "seconds": seconds}
        self.history.append(entry | {"forward_passes": self.attached.forward_passes - passes, "lr": lr})
        return self.history[-1]

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.optimizer.param_groups[0]["lr"]

    def zero_grad(self) -> None:
        """Clears the gradients of all parameters, also of parameters that the optimizer leaves out."""
        self.optimizer.zero_grad()
        self.model.zero_grad()

    def estimate(self, x: Tensor, targets: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Adds the gradient of a batch (or makes all updates of online learning).

        Returns its loss [B] and outputs summed over time [B, C]; None if a step was skipped.
        """
        found, skipped = None, False
        for t, estimate in enumerate(self.attached.steps(x, targets, lengths=lengths)):
            if estimate.skipped:
                skipped = True
                continue
            if self.attached.online:
                self.optimizer_step(1)
            left = None if lengths is None else (lengths - t).clamp(min=0)
            now = estimate.loss, mean_total(estimate, left)
            found = now if found is None else (found[0] + now[0], found[1] + now[1])
        return None if skipped else found

    def end_step(self, batches: int) -> float:
        """Makes a step on the mean gradient of the batches, and a step of the schedule. Returns the learning rate."""
        lr = self.lr
        if not self.attached.online:
            self.optimizer_step(batches)
        if self.schedule is not None:
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
        if self.clip is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip)
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

    def metrics(self, seed: int, validated: bool) -> dict[str, Any]:
        return {
            "test_accuracy": self.history[-1].get("val_accuracy") if validated and self.history else None,
            "epochs": self.epoch,
            "steps": self.steps,
            "seconds": self.seconds,
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "forward_passes": self.attached.forward_passes,
            "seed": seed,
            "device": str(self.device),
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


def mean_total(estimate: Estimate, lengths: Tensor | None) -> Tensor:
    """Returns the outputs [B, C] of an estimate, mean over copies and summed over a sample's own time steps."""
    outputs = estimate.outputs.mean(0)
    return total(outputs, output_mask(lengths, outputs))


def check_arguments(loader: Iterable[Any], epochs: int, accumulate: int, max_steps: int | None) -> None:
    """Raises UsageError for counts that are not positive, and for an empty loader."""
    for name, value in (("epochs", epochs), ("accumulate", accumulate), ("max_steps", max_steps)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UsageError(f"train got {name}={value!r}; it must be a whole number, at least 1")
    if loader_length(loader) == 0:
        raise UsageError("the loader is empty; give it at least one batch")
