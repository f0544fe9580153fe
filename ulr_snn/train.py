"""train: the one loop."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ulr_snn.errors import UsageError
from ulr_snn.estimators.ulr import ULR, Estimate, or_default
from ulr_snn.evaluate import Tally, evaluate, mode_of, pick_device, unpack
from ulr_snn.kernels.precision import reduced_precision
from ulr_snn.losses.named import LossSpec, total
from ulr_snn.model.neurons import output_mask
from ulr_snn.runs.directory import RunDirectory, peak_memory_bytes, versions

DEFAULT_LR = 1e-2
LR_WARM_UP = 0.1  # of the steps, in the cosine schedule


@dataclass
class Result:
    """What `train` gives back. history: one dict an epoch; metrics: the figures of the whole run."""

    model: nn.Module
    estimator: ULR
    metrics: dict[str, Any]
    history: list[dict[str, Any]]

    def plot(self, path: str | PathLike[str]) -> None:
        """Draws loss and accuracy by epoch into a PNG file."""
        from ulr_snn.runs.plots import save_curves

        save_curves(self.history, path)


def train(
    model: nn.Module,
    loader: Iterable,
    epochs: int = 10,
    *,
    val_loader: Iterable | None = None,
    estimator: ULR | None = None,
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
    """Trains the model in place, in training mode. Modules that are in evaluation mode while the model as a whole is in
    training mode stay as they are.

    loader: batches (x, y) or (x, y, lengths); x [T, B, ...] ([B, T, ...] with time_first=False), dense or a sparse COO
    tensor, which lists the events, y [B].
    val_loader: evaluated with deterministic firing after every epoch.
    optimizer: an instance, or a factory parameters -> optimizer. The default is Adam with `lr` (1e-2), multiplied
    for each parameter by a factor (see estimators/step_sizes.py): smaller where a step would move membranes by several
    thresholds, larger in a readout, and rising over the training where layers begin at rest.
    With ULR(memory="stream") the optimizer steps at every time step, the default one by `lr` over their number;
    schedule and max_steps go on counting batches.
    scheduler: "cosine" (over the run: up to lr in its first tenth, and down to 0), None (constant), or a factory
    optimizer -> scheduler; stepped once per optimizer step. accumulate: batches per optimizer step. clip: bound of
    the gradient's norm. autocast: torch.bfloat16 or torch.float16, the type in which the model's own layers run
    (weights, membranes, credit and losses stay as they are; no scaling of losses is needed).
    callbacks: called after every epoch with its history entry and the model.
    run_dir: receives a checkpoint an epoch, and metrics.json and curves.png at the end; resume goes on from there.
    Raises UsageError for a wrong use, before the first step where it can be seen there.
    """
    check_arguments(loader, epochs, accumulate, max_steps)
    device = pick_device(device)
    model.to(device)
    estimator = or_default(estimator)
    own = optimizer is None
    optimizer = make_optimizer(model, optimizer, lr)
    schedule = make_scheduler(optimizer, scheduler, loader, epochs, accumulate, max_steps)
    run = RunDirectory(run_dir, resume=resume) if isinstance(run_dir, str | PathLike) else run_dir
    total = total_steps(loader, epochs, accumulate=1, max_steps=None if max_steps is None else max_steps * accumulate)
    with mode_of(model, training=True), estimator.attach(model, loss, seed, time_first, total) as attached:
        session = Session(
            model, loader, attached, optimizer, schedule, device, accumulate, clip, max_steps, own, autocast
        )
        if run is not None and resume:
            session.load_state_dict(run.load_checkpoint(model))
        for epoch in range(session.epoch + 1, epochs + 1):
            if session.finished:
                break
            entry = session.run_epoch(epoch, epochs, progress)
            if val_loader is not None:
                measured = evaluate(
                    model, val_loader, loss=loss, device=device, time_first=time_first, autocast=autocast
                )
                entry["val_loss"], entry["val_accuracy"] = measured["loss"], measured["accuracy"]
            for callback in callbacks:
                callback(entry, model)
            if run is not None:
                run.save_checkpoint(model, session.state_dict())
        metrics = session.metrics(seed, val_loader is not None)
    if run is not None:
        run.finish(metrics, session.history)
    return Result(model, estimator, metrics, session.history)


@dataclass
class Session:
    """The state of a training run between epochs."""

    model: nn.Module
    loader: Iterable
    attached: Any
    optimizer: Optimizer
    schedule: LRScheduler | None
    device: torch.device
    accumulate: int
    clip: float | None
    max_steps: int | None
    own_optimizer: bool  # which takes steps of the sizes that the attachment advises, if it does
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.advised = self.own_optimizer and hasattr(self.attached, "advise_step_sizes")
        if self.advised:
            self.attached.advise_step_sizes()
        self.streams = getattr(self.attached, "streams", False)
        if self.streams and self.accumulate > 1:
            raise UsageError(
                f"train got accumulate={self.accumulate} with memory='stream', which updates at every time step; use 1"
            )
        self.epoch, self.steps, self.seconds = 0, 0, 0.0
        self.history: list[dict[str, Any]] = []
        self.lr = self.optimizer.param_groups[0]["lr"]  # of the last step

    @property
    def finished(self) -> bool:
        return self.max_steps is not None and self.steps >= self.max_steps

    def run_epoch(self, epoch: int, epochs: int, progress: bool) -> dict[str, Any]:
        """One pass over the loader; returns the history entry."""
        started, passes = time.perf_counter(), self.attached.forward_passes
        tally = Tally()
        self.zero_grad()
        waiting = 0
        with progress_bar(self.loader, f"epoch {epoch}/{epochs}", progress) as batches:
            for batch in batches:
                x, targets, lengths = unpack(batch, self.device)
                with reduced_precision(self.device, self.autocast):
                    found = (self.stream if self.streams else self.backward)(x, targets, lengths)
                if found is None:
                    continue
                waiting += 1
                tally.add(*found, targets)
                batches.set_postfix(tally.means(), refresh=False)
                if waiting == self.accumulate:
                    self.update(waiting)
                    waiting = 0
                    if self.finished:
                        break
            if waiting:
                self.update(waiting)
        if not tally.samples:
            raise UsageError(
                f"epoch {epoch} made no step: the loader gave no batch (a generator can be used only once), or no loss "
                "was finite and on_nonfinite='skip' left every batch out"
            )
        self.epoch = epoch
        self.seconds += time.perf_counter() - started
        means = tally.means()
        entry = {
            "epoch": epoch,
            "train_loss": means["loss"],
            "train_accuracy": means["accuracy"],
            "seconds": time.perf_counter() - started,
            "forward_passes": self.attached.forward_passes - passes,
            "lr": self.lr,
        }
        self.history.append(entry)
        return entry

    def zero_grad(self) -> None:
        """Of all parameters: those that the optimizer leaves out must not pile gradients up."""
        self.optimizer.zero_grad()
        self.model.zero_grad()

    def backward(self, x: Tensor, targets: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Loss [B] and outputs in total [B, C] of a batch whose gradient is added; None if it was left out."""
        estimate = self.attached.backward(x, targets, lengths=lengths)
        return None if estimate.stats.get("skipped") else (estimate.loss, mean_total(estimate, lengths))

    def stream(self, x: Tensor, targets: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The same of a batch with an optimizer step at every time step; None if some time steps were left out."""
        found, skipped = None, False
        for t, estimate in enumerate(self.attached.stream(x, targets, lengths=lengths)):
            if estimate.stats.get("skipped"):
                skipped = True
                continue
            self.move(1, estimate.stats["times"])
            left = None if lengths is None else (lengths - t).clamp(min=0)
            now = estimate.loss, mean_total(estimate, left)
            found = now if found is None else (found[0] + now[0], found[1] + now[1])
        return None if skipped else found

    def update(self, batches: int) -> None:
        """One step on the mean gradient of some batches; the schedule counts it."""
        if not self.streams:
            self.move(batches)
        self.lr = self.optimizer.param_groups[0]["lr"]  # before the schedule sets that of the next step
        if self.schedule is not None:
            self.schedule.step()
        self.steps += 1

    def move(self, batches: int, times: int = 1) -> None:
        """One optimizer step on the mean gradient of some batches, or of one of so many time steps of a batch."""
        groups = self.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        if batches > 1:
            for p in parameters:
                p.grad /= batches
        if self.clip is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip)
        with self.step_sizes(times):
            self.optimizer.step()
        self.zero_grad()

    @contextmanager
    def step_sizes(self, times: int) -> Iterator[None]:
        """While the own optimizer steps, the learning rate of each parameter is what the attachment advises. times: of
        a batch, if each has a step of its own: Adam's are as long as the rate says, whatever the gradient."""
        if not self.advised:
            yield
            return
        names = {id(q): name for name, q in self.model.named_parameters()}
        factors = self.attached.rate_factors()
        groups, rates = self.optimizer.param_groups, [group["lr"] for group in self.optimizer.param_groups]
        try:
            for group in groups:  # of one parameter each
                group["lr"] *= factors.get(names[id(group["params"][0])], 1.0) / times
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
        if state["loader_generator"] is not None and getattr(self.loader, "generator", None) is not None:
            self.loader.generator.set_state(state["loader_generator"])


def mean_total(estimate: Estimate, lengths: Tensor | None) -> Tensor:
    """Outputs of a training step, mean over copies and summed over a sample's own time steps, [B, C]."""
    outputs = estimate.outputs.mean(0)
    return total(outputs, output_mask(lengths, outputs))


def check_arguments(loader: Iterable, epochs: int, accumulate: int, max_steps: int | None) -> None:
    for name, value in (("epochs", epochs), ("accumulate", accumulate), ("max_steps", max_steps)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UsageError(f"train got {name}={value!r}; it must be a whole number, at least 1")
    if loader_length(loader) == 0:
        raise UsageError("the loader is empty; give it at least one batch")


def make_optimizer(model: nn.Module, optimizer: Any, lr: float | None) -> Optimizer:
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise UsageError(f"{type(model).__name__} has no trainable parameter; unfreeze some (requires_grad_(True))")
    if lr is not None and (optimizer is not None or not lr > 0):
        raise UsageError(f"train got lr={lr}; give a positive lr, or an optimizer, not both")
    if optimizer is None:
        fused = all(q.device.type in ("cpu", "cuda") and q.is_floating_point() for q in trainable)  # else there is none
        return torch.optim.Adam([{"params": [q]} for q in trainable], DEFAULT_LR if lr is None else lr, fused=fused)
    if isinstance(optimizer, Optimizer):
        return optimizer
    if not callable(optimizer):
        raise UsageError(f"train got optimizer={optimizer!r}; it is an optimizer or a factory parameters -> optimizer")
    return optimizer(trainable)


def make_scheduler(
    optimizer: Optimizer,
    scheduler: Any,
    loader: Iterable,
    epochs: int,
    accumulate: int,
    max_steps: int | None,
) -> LRScheduler | None:
    if scheduler is None:
        return None
    if scheduler != "cosine":
        if not callable(scheduler):
            raise UsageError(
                f"train got scheduler={scheduler!r}; it is 'cosine', None or a factory optimizer -> scheduler"
            )
        return scheduler(optimizer)
    steps = total_steps(loader, epochs, accumulate, max_steps)
    if steps is None:
        raise UsageError(
            "the cosine schedule needs the number of steps: give a loader with a length, or scheduler=None"
        )
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))


def learning_rate_factor(step: int, steps: int) -> float:
    """Of the cosine schedule: a half cosine from 1 to 0, under a linear warm-up.

    A freshly made net fires little, so that its first gradients are mostly noise; an adaptive optimizer would make
    full-size steps of them, which silence whole layers of a deep net for good.
    """
    warm = min(1.0, (step + 1) / (LR_WARM_UP * steps))
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def loader_length(loader: Iterable) -> int | None:
    """Batches an epoch; None where the loader cannot tell (a generator, an iterable data set)."""
    try:
        return len(loader)
    except TypeError:
        return None


def total_steps(loader: Iterable, epochs: int, accumulate: int, max_steps: int | None) -> int | None:
    """Optimizer steps of the run; None where the loader has no length and no bound is given."""
    batches = loader_length(loader)
    if batches is None:
        return max_steps
    steps = epochs * -(-batches // accumulate)
    return steps if max_steps is None else min(steps, max_steps)


def progress_bar(items: Iterable, label: str, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(items, label, leave=False, disable=None if shown else True)
