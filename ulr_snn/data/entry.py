"""What a data set tells the registry: its default window, where it lies, and how to read it."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ulr_snn.data.binning import Recordings, TimeBins
from ulr_snn.data.cache import BinnedSplits

Root = str | os.PathLike[str] | None
Build = Callable[[TimeBins, int], BinnedSplits]


@dataclass(frozen=True)
class Source:
    """A data set that has been found and bins its recordings itself."""

    place: str  # its folder
    fingerprint: str  # changes with the state of its files
    build: Build  # reads and bins its recordings


@dataclass(frozen=True)
class Raw:
    """The recordings of a data set, chunk by chunk.

    sample_shape: (2, height, width), channel 1 is ON, or (units,).
    classes: the number of classes, or None for 1 + the largest label.
    splits: "train", "test" and, if the data set has it, "validation".
    """

    sample_shape: tuple[int, ...]
    classes: int | None
    splits: Mapping[str, Iterable[Recordings]]


@dataclass(frozen=True)
class Recorded:
    """A data set that has been found and gives its events. `load` crops, bins and augments them."""

    place: str  # its folder
    fingerprint: str  # changes with the state of its files
    read: Callable[[], Raw]  # reads its recordings


@dataclass(frozen=True)
class Entry:
    """A data set in the registry."""

    span_us: int  # time that bins cover by default, in microseconds
    bin_us: int  # default width of the bins, in microseconds
    find: Callable[[Root], Source | Recorded]  # finds the data set for a root folder
    download: Callable[[Path], None] | None = None  # fetches the data set into a root folder
    align: bool = False  # whether the first event of each recording is at time 0
