"""ASL-DVS (Bi et al., ICCV 2019), as tonic's `ASLDVS` unpacks it.

`ASLDVS/**/<letter>/*.mat`, MATLAB files with `ts`, `x`, `y` and `pol`. 24 letters: J and Z need motion. A fifth of
every letter is the test set.
"""

from pathlib import Path

import numpy as np

from ulr_snn.data import child
from ulr_snn.data.entry import Entry, Recorded, Root
from ulr_snn.data.files import aligned, damaged, find_folder, held_out, needs, recorded

SAMPLE_SHAPE = (2, 180, 240)
LETTERS = "abcdefghiklmnopqrstuvwxy"
TEST_SHARE = 0.2


def find(root: Root) -> Recorded:
    """Finds the recordings. Raises UsageError for one whose folder is not named by a letter."""
    folder = find_folder(root, ("ASLDVS",), "**/*.mat")
    found = sorted(folder.rglob("*.mat"))
    for file in found:
        if file.parent.name[-1:].lower() not in LETTERS:
            raise damaged(file, "lies in a folder whose name does not end with one of the 24 letters")
    files = [(file, LETTERS.index(file.parent.name[-1].lower())) for file in found]
    return recorded(folder, held_out(files, TEST_SHARE), read, SAMPLE_SHAPE, len(LETTERS))


def read(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns x, y (downwards), time from the first event in microseconds, and polarity of a recording's events."""
    needs("scipy.io", "ASL-DVS")
    x, y, t, p = child.read("mat", file)
    return x, SAMPLE_SHAPE[1] - 1 - y.astype(np.float64), aligned(t), p


def download(root: Path) -> None:
    """Lets tonic fetch the recordings."""
    needs("tonic.datasets", "ASL-DVS").ASLDVS(save_to=str(root))


ENTRY = Entry(100_000, 5_000, find, download, align=True)
