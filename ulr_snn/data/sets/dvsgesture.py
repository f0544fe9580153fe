"""DVS128 Gesture (Amir et al., CVPR 2017), in the pieces that tonic's `DVSGesture` downloads.

`DVSGesture/ibmGestureTrain/<user>_<light>/<label>.npy` (and `ibmGestureTest`): [events, 4] with x, y, polarity and time
in milliseconds.
"""

from math import prod
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from ulr_snn.data.entry import Entry, Recorded, Root
from ulr_snn.data.files import File, aligned, damaged, find_folder, missing, needs, recorded

SAMPLE_SHAPE = (2, 128, 128)
CLASSES = 11
FOLDERS = {"train": "ibmGestureTrain", "test": "ibmGestureTest"}
MILLISECOND = 1_000


def find(root: Root) -> Recorded:
    """Finds the recordings. Raises UsageError if a split has none, or for a file that is not named by a label."""
    folder = find_folder(root, ("DVSGesture",), FOLDERS["train"])
    return recorded(
        folder, {split: _files(folder / name) for split, name in FOLDERS.items()}, read, SAMPLE_SHAPE, CLASSES
    )


def _files(folder: Path) -> list[File]:
    files = sorted(folder.glob("*/*.npy"))
    if not files:
        raise missing(folder / "<user>_<light>" / "<label>.npy")
    for file in files:
        if not (file.stem.isdecimal() and int(file.stem) < CLASSES):
            raise damaged(file, f"is not named by a label, 0 to {CLASSES - 1}")
    return [(file, int(file.stem)) for file in files]


def read(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns x, y, time from the first event in microseconds, and polarity of a recording's events."""
    with file.open("rb") as content:
        version = npy.read_magic(content)
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = header(content)
        size = content.tell() + prod(shape) * dtype.itemsize
        if len(shape) != 2 or shape[1] != 4 or size != file.stat().st_size:  # before memory is taken for it
            raise damaged(file, f"has {file.stat().st_size} bytes and an array of shape {shape}, not [events, 4]")
    x, y, p, t = np.load(file, allow_pickle=False).T
    return x, y, aligned(t.astype(np.float64), MILLISECOND), p


def download(root: Path) -> None:
    """Lets tonic fetch the recordings."""
    for train in (True, False):
        needs("tonic.datasets", "DVS128 Gesture").DVSGesture(save_to=str(root), train=train)


ENTRY = Entry(6_000_000, 100_000, find, download, align=True)
