"""Sequential MNIST as spikes, pixel by pixel, with the encoding and the folder of tonic's `SMNIST`.

`smnist/train-images-idx3-ubyte` and the other three files of MNIST. A picture is read row by row, one pixel in 2 ms.
Each of 99 units spikes twice when the grey value passes its threshold: 49 upwards, 49 downwards, and one for white.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ulr_snn.data.binning import Recordings
from ulr_snn.data.entry import Entry, Raw, Recorded, Root
from ulr_snn.data.files import damaged, find_folder, fingerprint, missing, needs, offsets

UNITS = 99
CLASSES = 10
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
PIXELS = 28 * 28
STEP_US = 1_000  # two of them for each pixel
WHITE = 255
IMAGES, LABELS = 2051, 2049  # the first four bytes of an IDX file
CHUNK = 500


def find(root: Root) -> Recorded:
    """Finds the four files. Raises UsageError if one is missing."""
    folder = find_folder(root, ("smnist",), FILES["train"][0])
    files = {split: [folder / name for name in names] for split, names in FILES.items()}
    paths = [file for pair in files.values() for file in pair]
    for file in paths:
        if not file.is_file():
            raise missing(file)

    def read() -> Raw:
        return Raw((UNITS,), CLASSES, {split: _read(*pair) for split, pair in files.items()})

    return Recorded(str(folder), fingerprint(paths), read)


def _read(images_file: Path, labels_file: Path) -> Iterator[Recordings]:
    images = _idx(images_file, IMAGES, 16, PIXELS)
    labels = _idx(labels_file, LABELS, 8, 1)[:, 0]
    if len(labels) != len(images) or labels.max(initial=0) >= CLASSES:
        raise damaged(labels_file, f"has {len(labels)} labels, but not one of 0..9 for each of {len(images)} pictures")
    for start in range(0, len(images), CHUNK):
        yield encode(images[start : start + CHUNK], labels[start : start + CHUNK])


def _idx(file: Path, magic: int, header: int, size: int) -> np.ndarray:
    content = np.fromfile(file, np.uint8)
    head = content[:header].view(">u4") if len(content) >= header else np.zeros(2, ">u4")
    if head[0] != magic or head[1] == 0 or len(content) != header + int(head[1]) * size:
        raise damaged(file, "is not a whole IDX file of MNIST")
    return content[header:].reshape(-1, size)


def encode(images: np.ndarray, labels: np.ndarray) -> Recordings:
    """Returns the spikes of pictures [n, 784]: where one pixel lies on the other side of a threshold than the last."""
    thresholds = np.linspace(0.0, WHITE - 1, UNITS // 2).astype(np.uint8)
    above = images[:, :, None] >= thresholds
    rises, falls = ~above[:, :-1] & above[:, 1:], above[:, :-1] & ~above[:, 1:]
    found = [np.nonzero(rises), np.nonzero(falls)]
    owner, step = np.nonzero(images == WHITE)
    owners, steps, places = (np.concatenate(column) for column in zip(*found, (owner, step, owner), strict=True))
    unit = UNITS - places
    unit[len(found[0][0]) :] -= UNITS // 2  # thresholds downwards
    unit[len(owners) - len(owner) :] = 0  # white
    order = np.argsort(owners, kind="stable")
    time = 2 * STEP_US * np.repeat(steps[order], 2) + np.tile([0, STEP_US], len(order))
    sizes = 2 * np.bincount(owners, minlength=len(images))
    return Recordings(time, np.repeat(unit[order], 2), offsets(sizes), labels.astype(np.int64))


def download(root: Path) -> None:
    """Lets tonic fetch the files."""
    for train in (True, False):
        needs("tonic.datasets", "sequential MNIST").SMNIST(save_to=str(root), train=train)


ENTRY = Entry(2 * STEP_US * PIXELS, 2 * STEP_US, find, download)
