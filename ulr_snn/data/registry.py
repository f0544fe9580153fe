"""The data sets that `load` finds by name."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ulr_snn.data import digits, tonic
from ulr_snn.data.binning import TimeBins, bin_recordings, window
from ulr_snn.data.cache import BinnedSplits, cached
from ulr_snn.data.events import EventDataset
from ulr_snn.errors import UsageError

Build = Callable[[TimeBins, int], BinnedSplits]


@dataclass(frozen=True)
class Source:
    """A data set that has been found."""

    place: str  # its folder
    fingerprint: str  # changes with the state of its files
    build: Build  # reads and bins its recordings


@dataclass(frozen=True)
class Entry:
    """A data set in the registry."""

    span_us: int  # time that bins cover by default, in microseconds
    bin_us: int  # default width of the bins, in microseconds
    find: Callable[[str | os.PathLike[str] | None], Source]  # finds the data set for a root folder


def load(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    time_bins: TimeBins | None = None,
    bin_us: int | None = None,
    binary: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[EventDataset, EventDataset]:
    """Returns the training and the test recordings of a data set, binned in fixed windows, as `(train, test)`.

    name: "digits" (made on first use, no download), "nmnist" or "shd" (recordings in the format of N-MNIST or of the
        Spiking Heidelberg Digits, read from `root`; subsets are supported).
    root: the folder that holds tonic's `NMNIST` or `SHD`, or that folder itself; default: the environment variable
        ULR_SNN_DATA. The folders `saccade-mnist/NMNIST` and `spoken-digits/SHD` in `root` are found, too.
    time_bins, bin_us: number and width (microseconds) of the bins. An event at time t is in bin `t // bin_us`; events
        after the last bin are dropped. By default digits and nmnist have 20 bins of 15,000 us, shd 50 of 20,000 us.
        If only one is given, the other follows so that the bins cover the same span (300 ms; 1 s).
        `time_bins="full"`: each recording ends with the bin of its last event, and batches are padded (see `collate`).
    binary: cells hold 0 and 1 instead of the number of events (at most 255).
    cache_dir: folder of the binned events; default ULR_SNN_CACHE, else ~/.cache/ulr_snn. Recordings are read again
        after a change of their files or of an option.

    Raises UsageError for an unknown name, a bad option, and recordings that are missing or damaged.
    """
    if name not in ENTRIES:
        raise UsageError(f"there is no data set {name!r}; the names are {', '.join(map(repr, ENTRIES))}")
    entry = ENTRIES[name]
    bins, width = window(entry.span_us, entry.bin_us, time_bins, bin_us)
    source = entry.find(root)
    key = f"{source.place}\n{bins} {width}"
    splits = cached(cache_dir, name, key, source.fingerprint, lambda: source.build(bins, width))
    arguments = splits.sample_shape, splits.classes, binary
    return EventDataset(splits.train, *arguments), EventDataset(splits.test, *arguments)


def _digits(root: str | os.PathLike[str] | None) -> Source:
    if root is not None:
        raise UsageError("digits are made, not read from a folder; leave root= out (cache_dir= is their folder)")

    def build(bins: TimeBins, width: int) -> BinnedSplits:
        train, test = (bin_recordings([part], 2 * 16 * 16, bins, width) for part in digits.recordings())
        return BinnedSplits(train, test, digits.SAMPLE_SHAPE, digits.CLASSES)

    return Source("", f"simulation {digits.SIMULATION}", build)


def _nmnist(root: str | os.PathLike[str] | None) -> Source:
    folder = _folder(root, "NMNIST", "saccade-mnist", "Train")
    files = {split: tonic.nmnist_files(folder, split) for split in ("train", "test")}

    def build(bins: TimeBins, width: int) -> BinnedSplits:
        train, test = (bin_recordings(tonic.read_nmnist(part), 2 * 34 * 34, bins, width) for part in files.values())
        return BinnedSplits(train, test, tonic.NMNIST_SHAPE, tonic.NMNIST_CLASSES)

    return Source(str(folder), tonic.fingerprint(files["train"] + files["test"]), build)


def _shd(root: str | os.PathLike[str] | None) -> Source:
    folder = _folder(root, "SHD", "spoken-digits", "shd_train.h5")
    files = tonic.shd_files(folder)

    def build(bins: TimeBins, width: int) -> BinnedSplits:
        units, classes = tonic.shd_shape(files)
        train, test = (bin_recordings(tonic.read_shd(file), units, bins, width) for file in files.values())
        return BinnedSplits(train, test, (units,), classes)

    return Source(str(folder), tonic.fingerprint(list(files.values())), build)


def _folder(root: str | os.PathLike[str] | None, name: str, simulated: str, mark: str) -> Path:
    """Returns the folder `name` with the entry `mark`: in `root`, in its folder `simulated`, or `root` itself."""
    root = root or os.environ.get("ULR_SNN_DATA")
    if not root:
        raise UsageError(f"the recordings have no folder; give root=, the folder of {name}, or set ULR_SNN_DATA to it")
    base = Path(root).expanduser().absolute()
    candidates = (base / name, base / simulated / name, base)
    for folder in candidates:
        if (folder / mark).exists():
            return folder
    raise UsageError(f"there is no {base / name / mark}; unpack the recordings there, or give another root=")


ENTRIES = {
    "digits": Entry(digits.SPAN_US, digits.BIN_US, _digits),
    "nmnist": Entry(300_000, 15_000, _nmnist),
    "shd": Entry(1_000_000, 20_000, _shd),
}


def register(name: str, entry: Entry) -> None:
    """Adds a data set to the names that `load` takes. It replaces a data set that has this name."""
    if not isinstance(entry, Entry):
        raise UsageError(f"data.register got {entry!r} for {name!r}; give an Entry")
    ENTRIES[name] = entry
