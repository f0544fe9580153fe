"""The training loop: epochs of steps, each validated and saved."""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import length_hint
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import plain
from ulr_snn.estimators.base import Attachment, Estimate, Estimator, in_sum, offers
from ulr_snn.kernels import ranks
from ulr_snn.kernels.precision import reduced_precision
from ulr_snn.losses.metrics import Tally, scores
from ulr_snn.model.reading import read
from ulr_snn.runs.checkpoints import in_numbers, try_out
from ulr_snn.runs.directory import peak_memory_bytes, versions
from ulr_snn.runs.keeping import Keeper, Place, check_weights
from ulr_snn.runs.optim import loader_length
from ulr_snn.runs.order import State, begun, of_loader, repeats, restore, set_epoch, start_workers, states
from ulr_snn.runs.progress import progress_bar, report
from ulr_snn.runs.quiet import first_not_finite, quiet_layers
from ulr_snn.runs.settings import settings_of
from ulr_snn.runs.steps import Stepper

PLAIN = ("epoch", "steps", "seconds", "history", "best", "stopped")  # what a checkpoint holds as it is


@dataclass(frozen=True)
class Settings:
    """What a training run was asked for, see `train`."""

    device: torch.device
    accumulate: int
    clip: float | None
    max_steps: int | None
    autocast: torch.dtype | None
    metrics: dict[str, Any]
    estimator: Estimator


@dataclass
class Epoch:
    """An epoch under way. order: states of all generators at its start; passes: forward passes before it.

    batches: batches so far; lr: learning rate of the last step; trained: True if no batch is left; quiet: layers that
    never fire or always do at the end of the first epoch, see `quiet_layers`.
    """

    number: int
    tally: Tally
    order: State
    passes: int
    lr: float
    batches: int = 0
    seconds: float = 0.0
    trained: bool = False
    quiet: dict[str, list[str]] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return vars(self) | {"tally": self.tally.state_dict()}


@dataclass
class Session:
    """The state of a training run. steps: optimizer steps, or batches with `Online`.

    epoch: epochs so far, without the one that is under way; best: the epoch with the best validation; stopped: a
    callback has ended the training; batch: the last one of an epoch under way; told: states of the callbacks before
    they saw it; generators: their states after the last step, where later code may draw from them; cut: states before
    the end of the last epoch if `max_steps` has ended it, since a resumed run may make more steps of it.
    """

    model: nn.Module
    loader: Iterable[Any]
    attached: Attachment
    stepper: Stepper
    settings: Settings
    keeper: Keeper
    callbacks: Iterable[Any] = ()
    epoch: int = 0
    steps: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    stopped: int | None = None
    under_way: Epoch | None = None
    between: bool = True
    generators: State | None = None
    batch: Any = None
    told: list[Any] | None = None
    cut: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.attached.online and self.settings.accumulate > 1:
            raise UsageError(
                f"train got accumulate={self.settings.accumulate} with an update at every time step; use accumulate=1"
            )

    @property
    def finished(self) -> bool:
        return self.settings.max_steps is not None and self.steps >= self.settings.max_steps

    @property
    def place(self) -> Place:
        """Where the training is."""
        return self.epoch, self.under_way.batches if self.under_way is not None else 0, self.steps

    def run(self, epochs: int, validate: Callable[[], dict[str, Any]] | None, progress: bool) -> None:
        """Runs the remaining epochs. What has been trained is saved if an error ends the training between two steps."""
        if (run := self.keeper.written) is not None:
            try_out(run.path, self.model)
        if (checkpoint := self.keeper.resumed) is not None:
            checkpoint.load_weights(self.model)
            self.load_state_dict(checkpoint.state)
            self.keeper.saved = self.place
        try:
            while self.epoch < epochs and not self.finished and self.stopped != epochs:
                self.run_epoch(epochs, validate, progress)
        except FloatingPointError as lost:
            if self.batch is not None:
                parts = self.batch, self.settings.estimator, self.attached.interface
                if place := first_not_finite(self.model, *parts):
                    lost.add_note(place)
            raise
        except BaseException as raised:
            error = of_loader(raised)
            if self.between:
                self.keeper.save_after(error, self.place, self.model, self.state_dict)
            if error is raised:
                raise
            raise error from raised
        finally:
            if not self.between:  # a step was not finished
                self.stepper.zero_grad()
            for callback in self.callbacks:
                if offers(callback, "close"):
                    callback.close()

    def run_epoch(self, epochs: int, validate: Callable[[], dict[str, Any]] | None, progress: bool) -> None:
        """Runs an epoch or its rest, validates and saves the model, and calls the callbacks."""
        if self.under_way is None:
            passes, tally = self.attached.forward_passes, Tally(self.settings.metrics)
            self.under_way = Epoch(self.epoch + 1, tally, states(self.loader), passes, self.stepper.lr)
        epoch = self.under_way
        if not epoch.trained:
            self.stepper.check_held()
            self.train_epoch(epoch, epochs, progress)
            check_weights(self.model, self.place)
            if epoch.number == 1:
                epoch.quiet = quiet_layers(self.model, self.batch, self.settings.estimator, self.attached.interface)
            epoch.trained, self.batch = True, None
        entry = self.entry(epoch)
        self.generators = states(self.loader)
        if validate is not None:
            measured = validate()
            entry |= {f"val_{name}": measured[name] for name in ("loss", "accuracy", *self.settings.metrics)}
        if progress:
            report(entry, epochs, self.settings.metrics)
        self.told = self.remembered()  # before they see this epoch, which a resumed run shows again
        stops = [plain(callback(entry, self.model)) is True for callback in self.callbacks]
        entry |= in_numbers(entry)  # what they have put into it
        self.stepper.end_epoch(entry.get("val_loss", entry["train_loss"]))
        (stop,) = ranks.agree([any(stops)])
        self.see_best(entry)
        self.epoch, self.seconds, self.stopped = epoch.number, self.seconds + epoch.seconds, epochs if stop else None
        self.history.append(entry)
        self.under_way = self.generators = self.told = None
        self.end_between_steps(save=True)

    def train_epoch(self, epoch: Epoch, epochs: int, progress: bool) -> None:
        """Makes the steps of an epoch that are left."""
        self.stepper.zero_grad()
        waiting, before, self.cut = 0, epoch.seconds, None
        started = perf_counter()
        set_epoch(self.loader, epoch.number)
        with progress_bar(self.loader, f"epoch {epoch.number}/{epochs}", progress) as shown:
            rest, self.batch = begun(self.loader, shown, epoch.order, epoch.batches)
            for batch in ranks.together(rest):
                self.between, self.batch = False, batch
                with reduced_precision(self.settings.device, self.settings.autocast):
                    estimate = self.estimate(*read(batch, self.model, self.settings.device))
                epoch.batches += 1
                if not estimate.skipped:
                    waiting += 1
                    outputs = estimate.packed.mean(0)
                    epoch.tally.add(estimate.loss, outputs, estimate.batch, scores(outputs, estimate.batch))
                    shown.set_postfix(epoch.tally.running(), refresh=False)
                if waiting == self.settings.accumulate:
                    self.end_step(epoch, waiting)
                    waiting = 0
                epoch.seconds = before + perf_counter() - started
                if waiting == 0:
                    self.end_between_steps()
                if self.finished:
                    (unfinished,) = ranks.agree([epoch.batches != length_hint(self.loader, -1)])
                    self.cut = {"epoch": epoch.state_dict(), **self.before_end()} if unfinished else None
                    break
            if waiting:
                self.end_step(epoch, waiting)
                self.between = True
        promised = loader_length(self.loader)
        if promised not in (None, epoch.batches) and ranks.count() == 1 and not self.finished:
            warnings.warn(
                f"the loader has the length {promised}, but gave {epoch.batches} batches in an epoch; schedule and "
                "firing noise follow its length, so give it the right one",
                stacklevel=6,
            )
        if not epoch.tally.samples:
            raise UsageError(
                f"epoch {epoch.number} made no step: the loader gave no batch (a generator can be used only once), or "
                "no loss was finite and on_nonfinite left every batch out"
            )

    def end_between_steps(self, save: bool = False) -> None:
        """Saves the training if it is time or asked for, and ends it if a signal asks for it."""
        self.between = True
        if self.keeper.due(self.steps) or save:
            self.keeper.save(self.place, self.model, self.state_dict())
            self.keeper.end_if_asked(self.place)

    def entry(self, epoch: Epoch) -> dict[str, Any]:
        """Returns the history entry of an epoch."""
        means = {f"train_{name}": value for name, value in epoch.tally.joined().means().items()}
        passes = self.attached.forward_passes - epoch.passes
        counts = {"seconds": epoch.seconds, "forward_passes": passes, "lr": epoch.lr}
        return {"epoch": epoch.number, **means, **counts, **epoch.quiet}

    def see_best(self, entry: dict[str, Any]) -> None:
        """Saves the weights if no epoch before has validated better: by accuracy where it is known, else by loss."""
        name = "val_loss" if entry.get("val_accuracy") is None else "val_accuracy"
        value = entry.get(name)
        if value is None or math.isnan(value):
            return
        before = self.best["value"] if self.best is not None and self.best["metric"] == name else None
        if before is None or (value > before if name == "val_accuracy" else value < before):
            self.best = {"epoch": entry["epoch"], "metric": name, "value": value}
            if (run := self.keeper.written) is not None:
                run.save_best(self.model)

    def estimate(self, x: Any, targets: Any, lengths: Tensor | None) -> Estimate:
        """Adds the gradient of a batch (or makes all updates of online learning), and returns its estimate."""
        estimates = []
        for estimate in self.attached.steps(x, targets, lengths=lengths):
            if estimate.skipped:
                self.stepper.shrink()
            elif self.attached.online:
                self.stepper.step(1, self.steps + 1)
            estimates.append(estimate)
        return in_sum(estimates)

    def end_step(self, epoch: Epoch, batches: int) -> None:
        """Makes a step on the mean gradient of the batches, and a step of the schedule."""
        epoch.lr = self.stepper.lr
        if self.steps == 0:
            self.stepper.check_held()  # parameters that the first call of the model makes
            self.stepper.warn_of_loss()
        if self.attached.online or self.stepper.step(batches, self.steps + 1):
            self.stepper.advance()
            self.steps += 1

    def finish(self, seed: int, validated: bool) -> dict[str, Any]:
        """Returns the figures of the whole run, and writes them to the run directory."""
        last = self.history[-1] if validated and self.history else {}
        figures = {
            **{f"test_{name}": last.get(f"val_{name}") for name in ("accuracy", *self.settings.metrics)},
            "best": self.best,
            "epochs": self.epoch,
            "steps": self.steps,
            "seconds": self.seconds,
            "peak_memory_bytes": peak_memory_bytes(self.settings.device),
            "forward_passes": self.attached.forward_passes,
            "seed": seed,
            "device": str(self.settings.device),
            "versions": versions(),
        }
        if (run := self.keeper.written) is not None:
            run.finish(figures, self.history)
        return figures

    def state_dict(self) -> dict[str, Any]:
        own = {
            "under_way": None if self.under_way is None else self.under_way.state_dict(),
            "generators": self.generators or states(self.loader),
            "cut": self.cut,
        }
        return {name: getattr(self, name) for name in PLAIN} | {
            "attached": self.attached.state_dict(),
            "stepper": self.stepper.state_dict(),
            "callbacks": self.remembered() if self.told is None else self.told,
            "ranks": ranks.gathered(own),
            "versions": versions(),
            "frozen": [name for name, q in self.model.named_parameters() if not q.requires_grad],
        }

    def before_end(self) -> dict[str, Any]:
        """Returns the state of what sees the end of an epoch, and may see it again in a resumed run."""
        schedule = self.stepper.schedule
        return {"callbacks": self.remembered(), "schedule": None if schedule is None else schedule.state_dict()}

    def remembered(self) -> list[Any]:
        """Returns the states of the callbacks that have one, each with what it was made with."""
        return [[settings_of(each), each.state_dict()] for each in self.callbacks if offers(each, "state_dict")]

    def load_callbacks(self, kept: list[Any]) -> None:
        """Gives each callback the state of one that was made in the same way."""
        kept = list(kept)
        for each in self.callbacks:
            found = next((pair for pair in kept if pair[0] == settings_of(each)), None)
            if found is not None and offers(each, "load_state_dict"):
                each.load_state_dict(found[1])
                kept.remove(found)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in PLAIN:
            setattr(self, name, state[name])
        self.attached.load_state_dict(state["attached"])
        if "frozen" in state and not self.keeper.changed:  # callbacks may have thawed some
            for name, q in self.model.named_parameters():
                q.requires_grad_(name not in state["frozen"])
        settings = self.keeper.settings
        anew = any(state["settings"][name] != settings[name] for name in ("optimizer", "scheduler"))
        own = state["ranks"][ranks.rank() % len(state["ranks"])]
        under_way, cut, callbacks = own["under_way"], own.get("cut"), state["callbacks"]
        if cut is not None and under_way is None and self.stopped is None and not self.finished:
            under_way, callbacks, self.epoch = cut["epoch"], cut["callbacks"], self.epoch - 1
            self.seconds -= self.history.pop()["seconds"]
            state["stepper"] = state["stepper"] | {"schedule": cut["schedule"]}
        self.stepper.load_state_dict(state["stepper"], anew, self.keeper.changed)
        self.load_callbacks(callbacks)
        if self.epoch:
            start_workers(self.loader)
        restore(own["generators"], self.loader)
        cut_alike = repeats(self.loader) and len(state["ranks"]) == ranks.count()
        if under_way is None:
            return
        if not (cut_alike or under_way["trained"]):
            warnings.warn(
                f"{type(self.loader).__name__} cannot be begun in the midst of epoch {self.epoch + 1}: it goes on from "
                f"the epoch's first batch, with the weights after step {self.steps}",
                stacklevel=5,
            )
            return
        tally = Tally(self.settings.metrics)
        tally.load_state_dict(under_way["tally"])
        self.under_way = Epoch(**under_way | {"tally": tally})
