"""Callbacks of `train`: early stopping, and records of the history for TensorBoard and as a CSV file.

`train` calls a callback after every epoch with the epoch's history entry and the model. One that returns True ends the
training. Each callback belongs to one training at a time; a training that begins at epoch 1 begins it anew.
"""

import csv
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import count
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

from torch import nn

from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import Count, FilePath, NotNegative, check_fields, one_of, plain, where

Entry = Mapping[str, Any]  # an entry of the history
Name = Annotated[str, where("a key of the history's entries", lambda value: isinstance(value, str) and value)]
Mode = Annotated[str, one_of("auto", "min", "max")]
DIRECTIONS = {"loss": "min", "accuracy": "max"}


def numbers(entry: Entry) -> dict[str, float]:
    """Returns the figures of an entry that are single numbers, such as no accuracy of a regression."""
    found = {name: plain(value) for name, value in entry.items()}
    return {
        name: value for name, value in found.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }


@dataclass
class EarlyStopping:
    """Ends the training once a metric has not improved by more than min_delta for `patience` epochs in a row.

    metric: a key of the history's entries, such as "val_loss", or "val_NAME" for a metric of your own. mode: whether
    smaller ("min") or larger values ("max") are better; "auto" knows losses and accuracies. NaN and infinity are no
    improvement. Raises UsageError for wrong arguments, and in the first epoch for a metric that the history lacks.
    """

    metric: Name = "val_loss"
    patience: Count = 5
    min_delta: NotNegative = 0.0
    mode: Mode = "auto"
    best: float | None = field(default=None, init=False)
    waited: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.mode == "auto":
            kind = self.metric.rpartition("_")[2]
            if kind not in DIRECTIONS:
                raise UsageError(
                    f"EarlyStopping got metric={self.metric!r} with mode='auto'; give mode='min' or mode='max'"
                )
            self.mode = DIRECTIONS[kind]

    def __call__(self, entry: Entry, model: nn.Module) -> bool:
        known = numbers(entry)
        if self.metric not in known:
            raise UsageError(
                f"EarlyStopping got metric={self.metric!r}, which is no number in this history; give one of "
                f"{', '.join(name for name in known if name != 'epoch')}"
            )
        if entry["epoch"] == 1:
            self.best, self.waited = None, 0
        value, sign = known[self.metric], 1 if self.mode == "min" else -1
        if isfinite(value) and (self.best is None or sign * (self.best - value) > self.min_delta):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]


@dataclass
class TensorBoard:
    """Writes the numbers of every epoch into a folder for TensorBoard, by epoch: losses, metrics, learning rate, times.

    Training and validation of a metric share a chart ("loss/train", "loss/val"). Epochs that a resumed run repeats
    hide the first ones. `close` ends the file; it is also closed with the callback, and opened again when needed.
    Raises UsageError without tensorboard, and for a folder that cannot be made.
    """

    log_dir: FilePath
    _writer: Any = field(default=None, init=False, repr=False)
    _epoch: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        check_fields(self)
        if find_spec("tensorboard") is None:
            raise UsageError("TensorBoard needs tensorboard: pip install tensorboard")
        make_folder("TensorBoard", "log_dir", Path(self.log_dir))

    def __call__(self, entry: Entry, model: nn.Module) -> None:
        if entry["epoch"] <= self._epoch:
            self.close()
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(os.fspath(self.log_dir), purge_step=entry["epoch"])
            self._end = weakref.finalize(self, self._writer.close)
        self._epoch = entry["epoch"]
        for name, value in numbers(entry).items():
            part, _, metric = name.partition("_")
            tag = f"{metric}/{part}" if part in ("train", "val") else name
            if name != "epoch":
                self._writer.add_scalar(tag, value, self._epoch)
        self._writer.flush()

    def close(self) -> None:
        """Ends the file, and the thread that writes it."""
        if self._writer is not None:
            self._end()
            self._writer = None


@dataclass
class CSVLog:
    """Writes one row an epoch into a CSV file, of the entry's numbers; a figure that is None is empty.

    The first epoch decides about the columns. A resumed run goes on in the file of its start, where its epochs replace
    rows of the same epochs. A new training moves an older file to `PATH.1`, `PATH.2` and so on. The file is complete at
    any moment, also after a kill. Raises UsageError for a path that cannot be written or holds something else.
    """

    path: FilePath

    def __post_init__(self) -> None:
        check_fields(self)
        self.path = Path(self.path)
        make_folder("CSVLog", "path", self.path.parent)
        self.rows()

    def __call__(self, entry: Entry, model: nn.Module) -> None:
        path, new = Path(self.path), entry["epoch"] == 1
        if new and path.exists():
            names = (path.with_name(f"{path.name}.{number}") for number in count(1))
            os.replace(path, next(name for name in names if not name.exists()))
        kept = [row for row in self.rows() if int(row["epoch"]) < entry["epoch"]]
        row = numbers(entry) | {name: None for name, value in entry.items() if value is None}
        columns = list(kept[0]) if kept else [name for name in entry if name in row]
        temporary = path.with_name(f".tmp-{path.name}")
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows([*kept, row])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def rows(self) -> list[dict[str, Any]]:
        """Returns the rows of the file, as text by column."""
        try:
            with open(self.path, newline="") as file:
                rows = list(csv.DictReader(file, strict=True))
            if any(int(row["epoch"]) < 1 for row in rows):
                raise ValueError
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UsageError(f"CSVLog got path='{self.path}', which cannot be read: {error.strerror}") from error
        except (KeyError, TypeError, ValueError, csv.Error):
            raise UsageError(f"CSVLog got path='{self.path}', which holds something else; name another file") from None
        return rows


def make_folder(owner: str, name: str, folder: Path) -> None:
    """Makes a folder of an argument. Raises UsageError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{owner} got {name}='{folder}', which is no folder: {error.strerror}") from error
