"""CIFAR10-DVS (Li et al., Frontiers in Neuroscience 11:309, 2017), as tonic's `CIFAR10DVS` unpacks it.

`CIFAR10DVS/<class>/*.aedat4`, in the file format AEDAT 4. A tenth of every class is the test set.
"""

from pathlib import Path

import numpy as np

from ulr_snn.data import child
from ulr_snn.data.entry import Entry, Recorded, Root
from ulr_snn.data.files import aligned, find_folder, held_out, needs, recorded

SAMPLE_SHAPE = (2, 128, 128)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TEST_SHARE = 0.1


def find(root: Root) -> Recorded:
    """Finds the recordings in the folders that are named by a class."""
    folder = find_folder(root, ("CIFAR10DVS",), "*/*.aedat4")
    files = [(file, CLASSES.index(name)) for name in CLASSES for file in sorted((folder / name).glob("*.aedat4"))]
    return recorded(folder, held_out(files, TEST_SHARE), read, SAMPLE_SHAPE, len(CLASSES))


def read(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns x, y, time from the first event in microseconds, and polarity of a recording's events."""
    needs("aedat", "CIFAR10-DVS")
    x, y, t, p = child.read("aedat4", file)
    return x, y, aligned(t.astype(np.int64)), p


def download(root: Path) -> None:
    """Lets tonic fetch the recordings."""
    needs("tonic.datasets", "CIFAR10-DVS").CIFAR10DVS(save_to=str(root))


ENTRY = Entry(1_300_000, 65_000, find, download, align=True)
