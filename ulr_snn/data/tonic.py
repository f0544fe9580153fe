"""Readers of recordings in the formats of N-MNIST and of the Heidelberg spiking sets (SHD, SSC), in tonic's folders.

Subsets are supported, and nothing is downloaded. `tonic.io.read_mnist_file` reads N-MNIST's files, since
`tonic.datasets.NMNIST` starts a download unless it counts 10,000 files a split. h5py reads SHD's files, since
`tonic.datasets.SHD` opens the file again for every sample, in a process of its own, since HDF5 loops without end for
some damaged files. tonic takes seconds to import, so tonic and h5py are imported only to read recordings, not if the
recordings come from the cache.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ulr_snn.data import child
from ulr_snn.data.binning import Recordings
from ulr_snn.data.entry import Entry, Raw, Recorded, Root
from ulr_snn.data.files import (
    CHUNK,
    MOST_CLASSES,
    damaged,
    find_folder,
    fingerprint,
    flat,
    missing,
    needs,
    offsets,
    whole_us,
)
from ulr_snn.errors import UsageError

NMNIST_SHAPE = (2, 34, 34)  # channel 1 is ON
NMNIST_CLASSES = 10
NMNIST_FOLDERS = {"train": "Train", "test": "Test"}
EVENT_BYTES = 5
EVENT_FIELDS = np.dtype([(name, np.int64) for name in ("x", "y", "t", "p")])
OVERFLOW, MOST_OVERFLOWS = 240, 1_024  # the y that adds 8,192 us to all later times; these are 8 s
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
    for start in range(0, len(files), CHUNK):
        part = files[start : start + CHUNK]
        events = [read_bin(file, "N-MNIST") for file in part]
        features = [
            flat(file, event["x"], event["y"], event["p"], NMNIST_SHAPE)
            for file, event in zip(part, events, strict=True)
        ]
        yield Recordings(
            time=np.concatenate([event["t"] for event in events]),
            feature=np.concatenate(features),
            offsets=offsets([len(event) for event in events]),
            labels=np.array([int(file.parent.name) for file in part]),
        )


def read_bin(file: Path, what: str) -> np.ndarray:
    """Returns the events of a file in N-MNIST's format, with fields x, y, t and p. Raises UsageError, with the file's
    name, if the file is empty, cut short, or full of overflows of its clock, for which tonic takes quadratic time.

    what: the data set, for the error if tonic is missing.
    """
    content = np.fromfile(file, np.uint8)
    if len(content) == 0 or len(content) % EVENT_BYTES:
        raise damaged(file, f"has {len(content)} bytes, not a positive multiple of {EVENT_BYTES}")
    if (overflows := int((content[1::EVENT_BYTES] == OVERFLOW).sum())) > MOST_OVERFLOWS:
        raise damaged(file, f"has {overflows:,} overflows of its clock, more than {MOST_OVERFLOWS:,}")
    events: np.ndarray = needs("tonic.io", what).read_mnist_file(os.fspath(file), dtype=EVENT_FIELDS)
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
    needs("h5py", "SHD")
    largest, classes = 0, 0
    for file in files.values():
        labels, names = child.read("shd_labels", file)
        if labels.ndim != 1 or labels.dtype.kind not in "iuf" or not np.array_equal(labels, np.floor(labels)):
            raise damaged(
                file, f"has labels of shape {labels.shape} and type {labels.dtype}, which are no class indices"
            )
        names = int(labels.max(initial=0)) + 1 if names is None else names
        if len(labels) == 0 or not 0 <= labels.min() <= labels.max() < names <= MOST_CLASSES:
            raise damaged(file, f"has {len(labels)} labels, but not one or more from 0..{min(names, MOST_CLASSES) - 1}")
        if not 0 <= (unit := child.read("shd_largest_unit", file, CHUNK)) < SHD_UNITS[-1]:
            raise damaged(file, f"has a spike of unit {unit}, but SHD has {SHD_UNITS[-1]} units")
        largest, classes = max(largest, unit), max(classes, names)
    return min(units for units in SHD_UNITS if units > largest), classes


def read_shd(file: Path) -> Iterator[Recordings]:
    """Yields raw spikes of an SHD file, time in whole microseconds (truncated, as in tonic), feature = unit.

    Raises UsageError, with the file's name, for times or units that are negative, not finite or differ in number, and
    for times beyond half an hour.
    """
    labels = child.read("shd_labels", file)[0].astype(np.int64)
    for start in range(0, len(labels), CHUNK):
        part = labels[start : start + CHUNK]
        (times, sizes), (units, others) = child.read("shd_spikes", file, start, start + CHUNK)
        if sizes != others or len(sizes) != len(part):
            raise damaged(file, "has other numbers of times, units and labels")
        one = np.zeros(len(units), np.int64)
        feature = flat(file, units, one, one, (1, 1, SHD_UNITS[-1]))
        yield Recordings(whole_us(file, times), feature, offsets(sizes), part)


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
