"""Recordings in files: finding a data set's folder, reading it chunk by chunk, and the errors of both."""

import hashlib
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from ulr_snn.data.binning import Recordings
from ulr_snn.data.entry import Raw, Recorded, Root
from ulr_snn.data.splits import stratified
from ulr_snn.errors import UsageError

CHUNK = 2_000  # number of recordings whose raw events are in memory at a time
CHUNK_EVENTS = 2**22  # a chunk ends once it has so many events
LONGEST_US = 2**31  # no recording lasts as long: half an hour
MOST_CLASSES = 10_000
ENVIRONMENT = "ULR_SNN_DATA"

File = tuple[Path, int]  # a recording and its label
ReadFile = Callable[[Path], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]


class Missing(UsageError):
    """Recordings are not where they were looked for."""


def base_folder(root: Root, name: str) -> Path:
    """Returns the root folder, by default that of the environment variable ULR_SNN_DATA."""
    root = root or os.environ.get(ENVIRONMENT)
    if not root:
        raise UsageError(f"the recordings have no folder; give root=, the folder of {name}, or set {ENVIRONMENT} to it")
    return Path(root).expanduser().absolute()


def find_folder(root: Root, names: Sequence[str], pattern: str) -> Path:
    """Returns the first of the folders `names` in the root, or else the root, that holds `pattern`."""
    base = base_folder(root, names[0])
    for folder in (*(base / name for name in names), base):
        if folder.is_dir() and next(folder.glob(pattern), None) is not None:
            return folder
    raise missing(base / names[0] / pattern)


def missing(path: Path) -> Missing:
    """Returns the error that `path` is not there."""
    return Missing(
        f"there is no {path}; unpack the recordings there, give another root=, or let tonic fetch them (download=True)"
    )


def fingerprint(files: Sequence[Path]) -> str:
    """Returns a hash of the paths, sizes and modification times of `files`, without reading the files."""
    state = hashlib.blake2b(digest_size=16)
    for file in files:
        status = os.stat(file)
        state.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
    return state.hexdigest()


def damaged(file: Path, what: str) -> UsageError:
    """Returns the error that a file is not what its name says."""
    words = " ".join(what.split())  # libraries write several lines
    return UsageError(f"{file} {words[:300]}: it is damaged or of another format; copy it anew")


def needs(module: str, what: str) -> ModuleType:
    """Imports a library of the extra `tonic`. Raises UsageError, which says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"reading {what} needs {error.name or module}; install it with `pip install ulr_snn[tonic]`"
        ) from error


def offsets(sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns where each of some arrays of these sizes begins in their concatenation, and its length at the end."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def held_out(files: Sequence[File], fraction: float) -> dict[str, list[File]]:
    """Returns the splits of a data set that has none: `fraction` of every class is the test set, drawn with seed 0."""
    train, test = stratified(np.array([label for _, label in files]), fraction, seed=0)
    if len(train) == 0 or len(test) == 0:
        raise UsageError(
            f"{len(files)} recordings are too few for a test set of {fraction:.0%} of every class; add recordings"
        )
    return {"train": [files[i] for i in train], "test": [files[i] for i in test]}


def recorded(
    folder: Path, splits: dict[str, list[File]], read_file: ReadFile, sample_shape: tuple[int, ...], classes: int
) -> Recorded:
    """Returns a data set with one file for each recording. read_file: returns x, y, time and polarity of its events."""

    def read() -> Raw:
        chunks = {split: read_files(files, read_file, sample_shape) for split, files in splits.items()}
        return Raw(sample_shape, classes, chunks)

    return Recorded(str(folder), fingerprint([file for files in splits.values() for file, _ in files]), read)


def read_files(files: Sequence[File], read_file: ReadFile, sample_shape: tuple[int, ...]) -> Iterator[Recordings]:
    """Yields the events of some files. Raises UsageError, with the file's name, for a file that is damaged."""
    times: list[np.ndarray] = []
    features: list[np.ndarray] = []
    labels: list[int] = []
    for number, (file, label) in enumerate(files):
        try:
            x, y, t, p = (np.asarray(column).ravel() for column in read_file(file))
        except UsageError:
            raise
        except Exception as error:  # the readers of other libraries raise anything for a damaged file
            raise damaged(file, f"cannot be read ({type(error).__name__}: {error})") from error
        if not len(x) == len(y) == len(t) == len(p):
            raise damaged(file, f"has {len(x)} x, {len(y)} y, {len(t)} times and {len(p)} polarities")
        features.append(flat(file, x, y, p, sample_shape))
        times.append(whole_us(file, t))
        labels.append(label)
        if len(labels) == CHUNK or sum(map(len, times)) >= CHUNK_EVENTS or number == len(files) - 1:
            sizes = [len(time) for time in times]
            yield Recordings(np.concatenate(times), np.concatenate(features), offsets(sizes), np.array(labels))
            times, features, labels = [], [], []


def aligned(t: np.ndarray, unit: float = 1) -> np.ndarray:
    """Returns times from the first event on, in microseconds. unit: microseconds in one unit of `t`."""
    with np.errstate(invalid="ignore", over="ignore"):  # of times that are not finite, which `whole_us` refuses
        t = t if unit == 1 else t * float(unit)
        return t - t.min() if t.size else t


def whole_us(file: Path, t: np.ndarray) -> np.ndarray:
    """Returns times in whole microseconds, int64, truncated.

    Raises UsageError, with the file's name, for times that are negative, not finite or beyond half an hour.
    """
    if t.dtype.kind not in "iuf" or (len(t) and not (t.min() >= 0 and t.max() < LONGEST_US)):  # NaN is neither
        worst = t.dtype if t.dtype.kind not in "iuf" else f"{t.min():g} to {t.max():g} us"
        raise damaged(file, f"has times of {worst}, which are negative, not finite or beyond half an hour")
    return t.astype(np.int64)


def flat(file: Path, x: np.ndarray, y: np.ndarray, p: np.ndarray, sample_shape: tuple[int, ...]) -> np.ndarray:
    """Returns `(p * height + y) * width + x`. Raises UsageError for an event outside the sensor."""
    channels, height, width = sample_shape
    feature = np.zeros(len(x), np.int64)
    for axis, values, size in (("polarity", p, channels), ("y", y, height), ("x", x, width)):
        if values.dtype.kind not in "biuf":
            raise damaged(file, f"has a column {axis} of type {values.dtype}")
        if len(values) and not (values.min() >= 0 and values.max() < size):  # NaN is neither
            place = values.max() if values.max() >= size else values.min()
            raise damaged(file, f"has an event at {axis}={place}, outside the {width}x{height} pixels of the sensor")
        places = values.astype(np.int64)
        if not np.array_equal(places, values):
            raise damaged(file, f"has an event between two places of {axis}")
        feature = feature * size + places
    return feature
