"""Readers of recordings in the formats of N-MNIST and of the Heidelberg spiking sets (SHD, SSC), in tonic's folders.

Subsets are supported, and nothing is downloaded. `tonic.io.read_mnist_file` reads N-MNIST's files, since
`tonic.datasets.NMNIST` starts a download unless it counts 10,000 files a split. h5py reads SHD's files, since
`tonic.datasets.SHD` opens the file again for every sample. tonic takes seconds to import, so tonic and h5py are
imported only to read recordings, not if the recordings come from the cache.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ulr_snn.data.binning import Recordings
from ulr_snn.data.entry import Entry, Raw, Recorded, Root
from ulr_snn.data.files import CHUNK, damaged, find_folder, fingerprint, missing, needs, offsets
from ulr_snn.errors import UsageError

NMNIST_SHAPE = (2, 34, 34)  # channel 1 is ON
NMNIST_CLASSES = 10
NMNIST_FOLDERS = {"train": "Train", "test": "Test"}
NMNIST_EVENT_BYTES = 5
SHD_FILES = {"train": "shd_train.h5", "test": "shd_test.h5"}
SSC_FILES = {"train": "ssc_train.h5", "validation": "ssc_valid.h5", "test": "ssc_test.h5"}
SHD_UNITS = (128, 700)


def nmnist_files(folder: Path, split: str) -> list[Path]:
    """Returns the recordings `<folder>/Train/<digit>/*.bin` (or `Test`), sorted.

    Raises UsageError if there is no recording, or if a recording's folder is not named by a digit.
    """
    base = folder / NMNIST_FOLDERS[split]
    files = sorted(base.glob("*/*.bin"))
    if not files:
        raise missing(base / "<digit>" / "*.bin")
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
    tonic_io = needs("tonic.io", "N-MNIST")
    fields = np.dtype([(name, np.int64) for name in ("x", "y", "t", "p")])
    for start in range(0, len(files), CHUNK):
        part = files[start : start + CHUNK]
        events = [_read_nmnist_file(tonic_io, file, fields) for file in part]
        yield Recordings(
            time=np.concatenate([event["t"] for event in events]),
            feature=np.concatenate([(event["p"] * 34 + event["y"]) * 34 + event["x"] for event in events]),
            offsets=offsets([len(event) for event in events]),
            labels=np.array([int(file.parent.name) for file in part]),
        )


def _read_nmnist_file(tonic_io: ModuleType, file: Path, fields: np.dtype) -> np.ndarray:
    size = os.stat(file).st_size
    if size == 0 or size % NMNIST_EVENT_BYTES:
        raise damaged(file, f"has {size} bytes, not a positive multiple of {NMNIST_EVENT_BYTES}")
    events = tonic_io.read_mnist_file(os.fspath(file), dtype=fields)
    for axis, pixels in (("x", NMNIST_SHAPE[2]), ("y", NMNIST_SHAPE[1])):
        largest = events[axis].max(initial=0)
        if largest >= pixels:
            raise damaged(file, f"has an event at {axis}={largest}, outside N-MNIST's 34x34 pixels")
    return events


def shd_files(folder: Path, names: dict[str, str] = SHD_FILES) -> dict[str, Path]:
    """Returns the files of `names` in `folder`, by split. Raises UsageError if one is missing."""
    files = {split: folder / name for split, name in names.items()}
    for file in files.values():
        if not file.is_file():
            raise missing(file)
    return files


def shd_shape(files: dict[str, Path]) -> tuple[int, int]:
    """Returns `(units, classes)` of all files together.

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
                raise damaged(file, f"has {len(labels)} labels, but not one or more from 0..{names - 1}")
        if largest >= SHD_UNITS[-1]:
            raise damaged(file, f"has a spike of unit {largest}, but SHD has {SHD_UNITS[-1]} units")
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
                raise damaged(file, "has other numbers of times, units and labels")
            seconds = np.concatenate(times).astype(np.float64)
            feature = np.concatenate(units).astype(np.int64)
            if not np.all((seconds >= 0) & np.isfinite(seconds) & (feature >= 0)):
                raise damaged(file, "has spikes whose time or unit is negative or not finite")
            yield Recordings((seconds * 1e6).astype(np.int64), feature, offsets(sizes), labels[part])


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Opens the HDF5 file for reading. Errors of h5py and NumPy in its contents become a UsageError."""
    h5py = needs("h5py", "SHD")
    try:
        with h5py.File(file, "r") as content:
            yield content
    except UsageError:
        raise
    except (OSError, LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise damaged(file, f"cannot be read as recordings in SHD's format ({error})") from error


def _find_nmnist(root: Root) -> Recorded:
    folder = find_folder(root, ("NMNIST", "saccade-mnist/NMNIST"), "Train")
    files = {split: nmnist_files(folder, split) for split in ("train", "test")}

    def read() -> Raw:
        return Raw(NMNIST_SHAPE, NMNIST_CLASSES, {split: read_nmnist(part) for split, part in files.items()})

    return Recorded(str(folder), fingerprint(files["train"] + files["test"]), read)


def _find_heidelberg(root: Root, folders: tuple[str, ...], names: dict[str, str]) -> Recorded:
    files = shd_files(find_folder(root, folders, names["train"]), names)

    def read() -> Raw:
        units, classes = shd_shape(files)
        return Raw((units,), classes, {split: read_shd(file) for split, file in files.items()})

    return Recorded(str(files["train"].parent), fingerprint(list(files.values())), read)


def _fetch_nmnist(root: Path) -> None:
    for train in (True, False):
        needs("tonic.datasets", "N-MNIST").NMNIST(save_to=str(root), train=train)


def _fetch_shd(root: Path) -> None:
    for train in (True, False):
        needs("tonic.datasets", "SHD").SHD(save_to=str(root), train=train)


def _fetch_ssc(root: Path) -> None:
    for split in ("train", "valid", "test"):
        needs("tonic.datasets", "SSC").SSC(save_to=str(root), split=split)


NMNIST = Entry(300_000, 15_000, _find_nmnist, _fetch_nmnist)
SHD = Entry(1_000_000, 20_000, lambda root: _find_heidelberg(root, ("SHD", "spoken-digits/SHD"), SHD_FILES), _fetch_shd)
SSC = Entry(1_000_000, 20_000, lambda root: _find_heidelberg(root, ("SSC",), SSC_FILES), _fetch_ssc)
