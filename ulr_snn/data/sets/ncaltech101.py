"""N-Caltech101 (Orchard et al., Frontiers in Neuroscience 9:437, 2015), as tonic's `NCALTECH101` unpacks it.

`NCALTECH101/Caltech101/<class>/*.bin`, in N-MNIST's file format. Recordings differ in size; each lies at the top left
of 240 x 180 pixels. Classes are numbered in the order of their folders' names. A fifth of every class is the test set.
"""

from pathlib import Path

import numpy as np

from ulr_snn.data.entry import Entry, Recorded, Root
from ulr_snn.data.files import find_folder, held_out, needs, recorded
from ulr_snn.data.tonic import read_bin

SAMPLE_SHAPE = (2, 180, 240)
TEST_SHARE = 0.2


def find(root: Root) -> Recorded:
    """Finds the recordings, of which there may be fewer than 101 classes."""
    folder = find_folder(root, ("NCALTECH101/Caltech101", "Caltech101"), "*/*.bin")
    found = sorted(folder.glob("*/*.bin"))
    names = sorted({file.parent.name for file in found})
    files = [(file, names.index(file.parent.name)) for file in found]
    return recorded(folder, held_out(files, TEST_SHARE), read, SAMPLE_SHAPE, len(names))


def read(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns x, y, time in microseconds and polarity of a recording's events, x and y from their smallest on."""
    events = read_bin(file, "N-Caltech101")
    x, y = (events[axis] - events[axis].min(initial=255) for axis in ("x", "y"))
    return x, y, events["t"], events["p"]


def download(root: Path) -> None:
    """Lets tonic fetch the recordings."""
    needs("tonic.datasets", "N-Caltech101").NCALTECH101(save_to=str(root))


ENTRY = Entry(300_000, 15_000, find, download)
