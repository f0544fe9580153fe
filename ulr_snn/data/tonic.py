"""Readers of recordings in the formats of N-MNIST and of the Spiking Heidelberg Digits (SHD), in tonic's folders.

Subsets are supported, and nothing is downloaded. `tonic.io.read_mnist_file` reads N-MNIST's files, since
`tonic.datasets.NMNIST` starts a download unless it counts 10,000 files a split. h5py reads SHD's files, since
`tonic.datasets.SHD` opens the file again for every sample. tonic takes seconds to import, so tonic and h5py are
imported only to read recordings, not if the recordings come from the cache.
"""

import hashlib
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ulr_snn.data.binning import Recordings
from ulr_snn.errors import UsageError

NMNIST_SHAPE = (2, 34, 34)  # channel 1 is ON
NMNIST_CLASSES = 10
NMNIST_FOLDERS = {"train": "Train", "test": "Test"}
NMNIST_EVENT_BYTES = 5
SHD_FILES = {"train": "shd_train.h5", "test": "shd_test.h5"}
SHD_UNITS = (128, 700)
CHUNK = 2_000  # number of recordings whose raw events are in memory at a time


def fingerprint(files: list[Path]) -> str:
    """Returns a hash of the paths, sizes and modification times of `files`, without reading the files."""
    state = hashlib.blake2b(digest_size=16)
    for file in files:
        status = os.stat(file)
        state.update(f"{file} {status.st_size} {status.st_mtime_ns}\n".encode())
    return state.hexdigest()


def nmnist_files(folder: Path, split: str) -> list[Path]:
    """Returns the recordings `<folder>/Train/<digit>/*.bin` (or `Test`), sorted.

    Raises UsageError if there is no recording, or if a recording's folder is not named by a digit.
    """
    base = folder / NMNIST_FOLDERS[split]
    files = sorted(base.glob("*/*.bin"))
    if not files:
        raise UsageError(f"no recordings {base}/<digit>/*.bin; unpack {base.name}.zip there, or give another root=")
    for name in sorted({file.parent.name for file in files}):
        if not (len(name) == 1 and name in "0123456789"):
            raise UsageError(
                f"{base / name} holds recordings but is not named by a digit, their label; move or rename it"
            )
    return files


def read_nmnist(files: list[Path]) -> Iterator[Recordings]:
    """Yields raw events of N-MNIST's files, time in microseconds, feature `(polarity * 34 + y) * 34 + x`.

    Raises UsageError, with the file's name, if a file is empty, cut short, or has events outside 34x34 pixels.
    """
    tonic_io = _needs("tonic.io", "N-MNIST")
    fields = np.dtype([(name, np.int64) for name in ("x", "y", "t", "p")])
    for start in range(0, len(files), CHUNK):
        part = files[start : start + CHUNK]
        events = [_read_nmnist_file(tonic_io, file, fields) for file in part]
        yield Recordings(
            time=np.concatenate([event["t"] for event in events]),
            feature=np.concatenate([(event["p"] * 34 + event["y"]) * 34 + event["x"] for event in events]),
            offsets=_offsets([len(event) for event in events]),
            labels=np.array([int(file.parent.name) for file in part]),
        )


def _read_nmnist_file(tonic_io: ModuleType, file: Path, fields: np.dtype) -> np.ndarray:
    size = os.stat(file).st_size
    if size == 0 or size % NMNIST_EVENT_BYTES:
        raise _damaged(file, f"has {size} bytes, not a positive multiple of {NMNIST_EVENT_BYTES}")
    events = tonic_io.read_mnist_file(os.fspath(file), dtype=fields)
    for axis, pixels in (("x", NMNIST_SHAPE[2]), ("y", NMNIST_SHAPE[1])):
        largest = events[axis].max(initial=0)
        if largest >= pixels:
            raise _damaged(file, f"has an event at {axis}={largest}, outside N-MNIST's 34x34 pixels")
    return events


def shd_files(folder: Path) -> dict[str, Path]:
    """Returns `shd_train.h5` and `shd_test.h5` in `folder`, by split. Raises UsageError if one is missing."""
    files = {split: folder / name for split, name in SHD_FILES.items()}
    for file in files.values():
        if not file.is_file():
            raise UsageError(f"no recordings {file}; put SHD's unpacked {file.name} there, or give another root=")
    return files


def shd_shape(files: dict[str, Path]) -> tuple[int, int]:
    """Returns `(units, classes)` of both files together.

    The files do not contain the number of units, and the last unit need not fire. So the number is the smallest known
    size that holds all units that fire: 128 (spoken-digits) or 700 (SHD). Classes are the names in `extra/keys`, else
    1 + the largest label. Raises UsageError for units beyond 700, labels without a name, and damaged files.
    """
    largest, classes = 0, 0
    for file in files.values():
        with _opened(file) as content:
            labels = content["labels"][:]
            for start in range(0, len(labels), CHUNK):
                part = content["spikes/units"][start : start + CHUNK]
                largest = max(largest, *(int(units.max(initial=0)) for units in part))
            names = len(content["extra/keys"]) if "extra/keys" in content else int(labels.max(initial=0)) + 1
            if len(labels) == 0 or not 0 <= labels.min() <= labels.max() < names:
                raise _damaged(file, f"has {len(labels)} labels, but not one or more from 0..{names - 1}")
        if largest >= SHD_UNITS[-1]:
            raise _damaged(file, f"has a spike of unit {largest}, but SHD has {SHD_UNITS[-1]} units")
        classes = max(classes, names)
    return min(units for units in SHD_UNITS if units > largest), classes


def read_shd(file: Path) -> Iterator[Recordings]:
    """Yields raw spikes of an SHD file, time in whole microseconds (truncated, as in tonic), feature = unit.

    Raises UsageError, with the file's name, for times or units that are negative, not finite or differ in number.
    """
    with _opened(file) as content:
        labels = content["labels"][:].astype(np.int64)
        for start in range(0, len(labels), CHUNK):
            part = slice(start, start + CHUNK)
            times, units = content["spikes/times"][part], content["spikes/units"][part]
            sizes = [len(sample) for sample in times]
            if sizes != [len(sample) for sample in units] or len(sizes) != len(labels[part]):
                raise _damaged(file, "has other numbers of times, units and labels")
            seconds = np.concatenate(times).astype(np.float64)
            feature = np.concatenate(units).astype(np.int64)
            if not np.all((seconds >= 0) & np.isfinite(seconds) & (feature >= 0)):
                raise _damaged(file, "has spikes whose time or unit is negative or not finite")
            yield Recordings((seconds * 1e6).astype(np.int64), feature, _offsets(sizes), labels[part])


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Opens the HDF5 file for reading. Errors of h5py and NumPy in its contents become a UsageError."""
    h5py = _needs("h5py", "SHD")
    try:
        with h5py.File(file, "r") as content:
            yield content
    except UsageError:
        raise
    except (OSError, LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(file, f"cannot be read as recordings in SHD's format ({error})") from error


def _damaged(file: Path, what: str) -> UsageError:
    return UsageError(f"{file} {what}: it is damaged or of another format; copy it anew")


def _needs(module: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"reading {what} needs {error.name or module}; install it with `pip install ulr_snn[tonic]`"
        ) from error


def _offsets(sizes: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
