"""The data sets that `load` finds by name."""

import inspect
import os
from collections.abc import Callable
from functools import partial
from typing import Any, overload

from torch.utils.data import Dataset

from ulr_snn.data import digits, dynamics, tonic
from ulr_snn.data.assemble import Augment, Clock, Options, Validation, assemble
from ulr_snn.data.binning import TimeBins
from ulr_snn.data.entry import Entry, Recorded, Root, Source
from ulr_snn.data.events import EventDataset
from ulr_snn.data.files import Missing, base_folder
from ulr_snn.data.sets import asldvs, cifar10dvs, dvsgesture, ncaltech101, ncars, smnist
from ulr_snn.data.view import Polarity, View
from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import Count, Flag, Positive, Whole, checked

ENTRIES = {
    "digits": digits.DIGITS,
    "nmnist": tonic.NMNIST,
    "shd": tonic.SHD,
    "ssc": tonic.SSC,
    "dvsgesture": dvsgesture.ENTRY,
    "cifar10dvs": cifar10dvs.ENTRY,
    "ncaltech101": ncaltech101.ENTRY,
    "ncars": ncars.ENTRY,
    "asldvs": asldvs.ENTRY,
    "smnist": smnist.ENTRY,
}

SIGNALS = {f"dynamics/{system}": partial(dynamics.windows, system) for system in dynamics.SYSTEMS}


@overload
def load(  # type: ignore[overload-overlap]  # the names of the second are all others, which no type says
    name: dynamics.Name,
    *,
    seconds: float | None = None,
    dt: float | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> tuple[dynamics.SignalDataset, dynamics.SignalDataset]: ...


@overload
def load(
    name: str,
    root: Root = None,
    *,
    time_bins: TimeBins | None = None,
    bin_us: int | None = None,
    binary: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    crop: tuple[int, int] | None = None,
    downsample: int = 1,
    polarity: Polarity = "both",
    augment: Augment | None = None,
    validation: Validation | None = None,
    per_class: int | None = None,
    seed: int = 0,
    download: bool = False,
    stream: bool | None = None,
) -> tuple[EventDataset, ...]: ...


@checked
def load(
    name: str,
    root: Root = None,
    *,
    time_bins: TimeBins | None = None,
    bin_us: int | None = None,
    binary: Flag = False,
    cache_dir: str | os.PathLike[str] | None = None,
    crop: tuple[int, int] | None = None,
    downsample: int = 1,
    polarity: Polarity = "both",
    augment: Augment | None = None,
    validation: Validation | None = None,
    per_class: Count | None = None,
    seed: Whole = 0,
    download: Flag = False,
    stream: Flag | None = None,
    seconds: Positive | None = None,
    dt: Positive | None = None,
    samples: Count | None = None,
) -> tuple[Dataset[Any], ...]:
    """Returns the training and the test part of a data set, as `(train, test)`. Recordings are binned in fixed windows.

    name: "digits" (made on first use, no download), or a data set in tonic's folders: "nmnist", "shd", "ssc",
        "dvsgesture", "cifar10dvs", "ncaltech101", "ncars", "asldvs", "smnist" (subsets are supported), or
        "dynamics/NAME", which is computed.
    root: the folder that holds tonic's folder, such as `NMNIST`, or that folder itself; default: the environment
        variable ULR_SNN_DATA. The folders `saccade-mnist/NMNIST` and `spoken-digits/SHD` in `root` are found, too.
    time_bins, bin_us: number and width (microseconds) of the bins. An event at time t is in bin `t // bin_us`; events
        after the last bin are dropped. Each data set has its own default. If only one is given, the other follows so
        that the bins cover the same span. `time_bins="full"`: each recording ends with the bin of its last event, and
        batches are padded (see `collate`).
    binary: cells hold 0 and 1 instead of the number of events (at most 255).
    cache_dir: folder of the cached recordings; default ULR_SNN_CACHE, else ~/.cache/ulr_snn. Recordings are read again
        after a change of their files or of an option.
    crop: height and width of the window at the centre of the sensor that is kept.
    downsample: side of the square of pixels (or number of neighbouring units) that become one input, after the crop.
    polarity: "both", "merged" (one channel for both), "on" or "off".
    augment: random changes of the training events, drawn anew in every epoch, before they are binned: an
        `Augmentation`, or functions of a structured array of events, such as tonic's transforms. `loader` seeds them.
    validation: the fraction of every class of the training recordings that is held out, or "own" for the validation
        recordings of the data set itself (ssc). The result is then `(train, validation, test)`.
    per_class: number of training recordings of every class that are kept.
    seed: of the choice of `validation` and `per_class`, or of the windows of a signal.
    download: whether tonic may fetch recordings that are missing. Otherwise nothing is ever downloaded.
    stream: whether recordings stay in the cache file, memory-mapped; None: only if they are larger than half of the
        machine's memory.
    seconds, dt, samples: only for "dynamics/NAME": seconds of a window (1.0) and of a time step (0.005), and number of
        windows for training (256). Raises UsageError for an unknown name, a bad option, and recordings that are missing
        or damaged.
    """
    given = {option: value for option, value in locals().items() if value is not DEFAULTS[option]}
    entry = entry_of(name, given)
    if not isinstance(entry, Entry):
        return entry(**given)
    clock, view = Clock(time_bins, bin_us, entry.span_us, entry.bin_us), View(crop, downsample, polarity)
    options = Options(binary, view, augment, validation, per_class, seed, cache_dir, stream)
    return assemble(name, find(name, entry, root, download), clock, options)


DEFAULTS = {option: parameter.default for option, parameter in inspect.signature(load).parameters.items()}


def entry_of(name: str, given: dict[str, Any]) -> Entry | Callable[..., tuple[Dataset[Any], ...]]:
    """Returns what makes a data set, and takes its name out of the given arguments of `load`. Raises UsageError for an
    unknown name, and for arguments that the data set does not have."""
    if name not in ENTRIES and name not in SIGNALS:
        raise UsageError(f"there is no data set {name!r}; the names are {', '.join(map(repr, [*ENTRIES, *SIGNALS]))}")
    del given["name"]
    signal, options = name in SIGNALS, {"seconds", "dt", "samples"}
    if wrong := set(given) - options - {"seed"} if signal else set(given) & options:
        raise UsageError(f"{name} has no {', '.join(sorted(wrong))}; leave {'it' if len(wrong) == 1 else 'them'} out")
    return SIGNALS[name] if signal else ENTRIES[name]


def find(name: str, entry: Entry, root: Root, download: bool) -> Source | Recorded:
    """Finds a data set, and lets tonic fetch it if it is missing and `download` allows it."""
    try:
        return entry.find(root)
    except Missing as error:
        if not download:
            raise
        if entry.download is None:
            raise UsageError(
                f"tonic cannot download {name}; get it as datasets/{name}/README.md says: {error}"
            ) from error
    entry.download(base_folder(root, name))
    return entry.find(root)


def register(name: str, entry: Entry) -> None:
    """Adds a data set to the names that `load` takes. It replaces a data set that has this name."""
    if not isinstance(entry, Entry):
        raise UsageError(f"data.register got {entry!r} for {name!r}; give an Entry")
    ENTRIES[name] = entry
