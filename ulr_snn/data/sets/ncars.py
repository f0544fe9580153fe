"""N-CARS (Sironi et al., CVPR 2018), in the folders of tonic's former class `NCARS`.

`NCARS/train/<class>/*.dat` (and `test`), or the folders `n-cars_train` and `n-cars_test` of its archives, in
Prophesee's file format DAT: lines that begin with %, the type and the size of an event, and for each event a time and
an address of 32 bits. Recordings differ in size; all fit 120 x 100 pixels. tonic 1.7 neither reads nor downloads them.
"""

from pathlib import Path

import numpy as np

from ulr_snn.data.entry import Entry, Recorded, Root
from ulr_snn.data.files import File, base_folder, damaged, missing, recorded

SAMPLE_SHAPE = (2, 100, 120)
CLASSES = ("background", "cars")
EVENT = np.dtype([("time", "<u4"), ("address", "<u4")])
COORDINATE_BITS = {1: (9, 8), 2: (14, 14)}  # of x and y by the version of the format; polarity is the next bit


def find(root: Root) -> Recorded:
    """Finds the recordings. Raises UsageError if a split has none."""
    base = base_folder(root, "NCARS")
    for folder in (base / "NCARS", base):
        splits = {split: _files(folder, split) for split in ("train", "test")}
        if splits["train"]:
            break
    for split, files in splits.items():
        if not files:
            raise missing((base / "NCARS" if folder == base else folder) / split / "<class>" / "*.dat")
    return recorded(folder, splits, read, SAMPLE_SHAPE, len(CLASSES))


def _files(folder: Path, split: str) -> list[File]:
    for place in (folder / split, folder / f"n-cars_{split}", folder / f"n-cars_{split}" / split):
        files = [(file, label) for label, name in enumerate(CLASSES) for file in sorted((place / name).glob("*.dat"))]
        if files:
            return files
    return []


def read(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns x, y, time in microseconds and polarity of a recording's events."""
    content, start, version = file.read_bytes(), 0, 1
    while content[start : start + 1] == b"%":
        end = content.index(b"\n", start) + 1
        words = content[start:end].decode("latin-1").split()
        if len(words) > 2 and words[1] == "Version":
            version = int(words[2])
        start = end
    if start:
        if content[start + 1] != EVENT.itemsize:
            raise damaged(file, f"has events of {content[start + 1]} bytes, not {EVENT.itemsize}")
        start += 2
    if (len(content) - start) % EVENT.itemsize:
        raise damaged(file, f"has {len(content) - start} bytes of events, not a multiple of {EVENT.itemsize}")
    events = np.frombuffer(content, EVENT, offset=start)
    columns, rows = COORDINATE_BITS[min(version, 2)]
    address = events["address"].astype(np.int64)
    x, y = address & (2**columns - 1), address >> columns & (2**rows - 1)
    return x, y, events["time"], address >> (columns + rows) & 1


ENTRY = Entry(100_000, 5_000, find)
