"""DVS128 Gesture (Amir et al., CVPR 2017), in the pieces that tonic's `DVSGesture` downloads.

`DVSGesture/ibmGestureTrain/<user>_<light>/<label>.npy` (and `ibmGestureTest`): [events, 4] with x, y, polarity and time
in milliseconds.
"""

from pathlib import Path

import numpy as np

from ulr_snn.data.entry import Entry, Recorded, Root
from ulr_snn.data.files import File, damaged, find_folder, missing, needs, recorded

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
    events = np.load(file, allow_pickle=False)
    if events.ndim != 2 or events.shape[1] != 4:
        raise damaged(file, f"has an array of shape {events.shape}, not [events, 4]")
    x, y, p, t = events.T
    t = t * MILLISECOND
    return x, y, t - t.min(initial=t[0] if len(t) else 0), p


def download(root: Path) -> None:
    """Lets tonic fetch the recordings."""
    for train in (True, False):
        needs("tonic.datasets", "DVS128 Gesture").DVSGesture(save_to=str(root), train=train)


ENTRY = Entry(6_000_000, 100_000, find, download, align=True)
