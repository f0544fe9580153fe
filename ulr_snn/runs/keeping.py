"""When a training is saved, and how it ends early: by the clock, at Ctrl-C or SIGTERM, after an error."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from os import PathLike
from signal import Signals
from time import monotonic
from typing import Any, Self

from torch import nn

from ulr_snn.errors import Interrupted, LoaderError, SaveError, Terminated, UsageError
from ulr_snn.kernels import ranks
from ulr_snn.model.mode import not_finite
from ulr_snn.runs.checkpoints import Checkpoint
from ulr_snn.runs.directory import RunDirectory
from ulr_snn.runs.interrupts import SIGNALS, Interrupts, ended_by
from ulr_snn.runs.settings import check_same

EVERY = timedelta(minutes=10)


Place = tuple[int, int, int]  # epochs, batches of the epoch under way, steps


@dataclass
class Keeper:
    """Saves a training, if it has a run directory.

    every: optimizer steps or time between two checkpoints, besides those of every epoch. settings: see `described`.
    changed: whether a run may go on with other settings. saved: the place of the newest checkpoint. ending: the signal
    after which the training ends, to whichever rank it came.
    """

    run: RunDirectory | None
    every: timedelta | int | str
    settings: Mapping[str, Any]
    changed: bool = False
    saved: Place = (0, 0, 0)
    clock: float = field(default_factory=monotonic)
    ending: Signals | None = None

    @classmethod
    def of(
        cls,
        run_dir: str | PathLike[str] | RunDirectory | None,
        resume: bool | str,
        every: timedelta | int | str | None,
        settings: Mapping[str, Any],
    ) -> Self:
        """Returns the keeper by the arguments of `train`. Raises UsageError for a run that cannot begin or go on."""
        if resume and run_dir is None:
            raise UsageError("train got resume without run_dir; name the directory of the run that is to go on")
        if every is not None and run_dir is None:
            raise UsageError("train got save_every without run_dir; name the directory that checkpoints go to")
        run = RunDirectory(run_dir, resume=bool(resume)) if isinstance(run_dir, str | PathLike) else run_dir
        return cls(run, EVERY if every is None else every, settings, changed=resume == "changed")

    @contextmanager
    def in_use(self) -> Iterator[Self]:
        """Holds the run directory, and notes interrupts."""
        lock = nullcontext() if self.written is None else self.written.in_use()
        with lock, Interrupts(watch=self.run is not None) as self.interrupts:
            ranks.barrier()  # the run is not begun by others before the first has the directory
            yield self

    @property
    def written(self) -> RunDirectory | None:
        """The run directory if this process writes it: the first rank does."""
        return self.run if ranks.rank() == 0 else None

    @property
    def resumed(self) -> Checkpoint | None:
        """The checkpoint that the training goes on from; None if it begins. Raises UsageError for other settings."""
        if self.run is None or not self.run.resume:
            return None
        checkpoint = self.run.newest
        if checkpoint is not None and not self.changed:
            check_same(checkpoint.state["settings"], self.settings, self.run.path)
        return checkpoint

    def due(self, steps: int) -> bool:
        """True if a checkpoint is due after so many steps, or an interrupt asks for one, on any rank."""
        if self.run is None:
            return False
        if isinstance(self.every, timedelta):
            late = monotonic() - self.clock >= self.every.total_seconds()
        else:
            late = steps - self.saved[2] >= int(self.every)
        late, *asked = ranks.agree([late, *(self.interrupts.asked == each for each in SIGNALS)])
        self.ending = next((each for each, by in zip(SIGNALS, asked, strict=True) if by), None)
        return late or any(asked)

    def save(self, place: Place, model: nn.Module, state: dict[str, Any]) -> None:
        """Saves the training. Raises FloatingPointError for weights that are not finite, which are not saved."""
        check_weights(model, place)
        if self.written is not None:
            self.written.save_checkpoint(model, state | {"settings": dict(self.settings)})
        self.saved, self.clock = place, monotonic()

    def save_after(
        self, error: BaseException, place: Place, model: nn.Module, state: Callable[[], dict[str, Any]]
    ) -> None:
        """Saves a training that an error ends between two steps, and says so in a note of the error.

        With several ranks, which may not all have the error, it stays as it was saved before.
        """
        over = isinstance(error, SaveError | Interrupted | Terminated)  # which have said it
        if self.run is None or over or place[2] == 0 or ranks.count() > 1:
            return
        if place != self.saved:
            try:
                try:
                    self.save(place, model, state())
                except RuntimeError:  # torch notices only now that a process of the loader has ended
                    self.save(place, model, state())
            except (SaveError, UsageError, FloatingPointError) as second:
                error.add_note(f"the training could not be saved: {second}")
                return
        if isinstance(error, LoaderError):  # Ctrl-C ends the loader's processes, too
            self.ending = self.interrupts.asked
            self.end_if_asked(place)
        error.add_note(f"the training is saved up to step {place[2]}: {self.advice}")

    @property
    def advice(self) -> str:
        """How to go on."""
        return f"go on with resume=True and run_dir='{self.run.path}'" if self.run is not None else ""

    def end_if_asked(self, place: Place) -> None:
        """Raises `Interrupted` or `Terminated` after a signal that `due` has seen."""
        if self.ending is not None:
            where = f"interrupted in epoch {place[0] + 1} after step {place[2]}, which is saved"
            raise ended_by(self.ending, f"{where}: {self.advice}")


def check_weights(model: nn.Module, place: Place) -> None:
    """Raises FloatingPointError for weights that are not finite."""
    lost = not_finite(model)
    if lost is not None:
        raise FloatingPointError(f"{lost} is not finite after step {place[2]}; lower the learning rate")
