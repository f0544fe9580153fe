"""Binning of events in time. The result lists the occupied cells (compressed rows, one row for each recording)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from ulr_snn.errors import UsageError

MAX_COUNT = 255
MAX_CELLS = 2**31

CELL = np.dtype([("cell", "<i4"), ("count", "u1")])
EVENT = np.dtype([("time", "<i4"), ("feature", "<i4")])

TimeBins = int | Literal["full"]
RowsType = TypeVar("RowsType", bound="Rows")


@dataclass(frozen=True)
class Recordings:
    """Raw events of `n` recordings, one recording after another.

    time: [E] microseconds from the start of the recording, not negative, in any order.
    feature: [E] flat index of the input that fired, in 0..prod(sample_shape)-1.
    offsets: [n + 1]; recording i is `time[offsets[i]:offsets[i + 1]]`.
    labels: [n] class indices.
    """

    time: np.ndarray
    feature: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Rows:
    """`n` recordings, one after another in a table.

    records: [C] structured array, see `Binned` and `Timed`. It may be a `MappedRecords`, which stays on disk.
    offsets: [n + 1] int64; recording i is `records[offsets[i]:offsets[i + 1]]`.
    labels: [n] int64.
    lengths: [n] int64, the length of each recording, in time bins (`Binned`) or microseconds (`Timed`).
    """

    records: Any
    offsets: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray


class Binned(Rows):
    """Recordings as sorted lists of the cells that hold events.

    records: fields `cell` (time bin * features + feature) and `count` (events in the cell, saturating at 255).
    """

    @property
    def cells(self) -> np.ndarray:
        """Returns the cells of all recordings, int32 [C]."""
        return np.ascontiguousarray(self.records["cell"])

    @property
    def counts(self) -> np.ndarray:
        """Returns the number of events in each cell, uint8 [C]."""
        return np.ascontiguousarray(self.records["count"])


class Timed(Rows):
    """Recordings as lists of events. records: fields `time` (microseconds) and `feature`."""


def window(span_us: int, default_us: int, time_bins: TimeBins | None, bin_us: int | None) -> tuple[TimeBins, int]:
    """Returns the number of bins and their width in microseconds. Each may be given or not.

    A missing number or width follows from `span_us`, the part of a recording that bins cover by default. If both are
    missing, bins are `default_us` wide. `time_bins="full"` keeps every recording's own length.
    Raises UsageError for a number or width that is not a positive integer.
    """
    check_window(time_bins, bin_us)
    if bin_us is None:
        bin_us = default_us if time_bins is None or isinstance(time_bins, str) else -(-span_us // time_bins)
    if time_bins is None:
        time_bins = -(-span_us // bin_us)
    return (time_bins if time_bins == "full" else int(time_bins)), int(bin_us)


def check_window(time_bins: object, bin_us: object) -> None:
    """Raises UsageError for a number or a width of bins that is not a positive integer."""
    for option, value in (("time_bins", time_bins), ("bin_us", bin_us)):
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value > 0
        if not (value is None or whole or (option == "time_bins" and value == "full")):
            allowed = 'a positive integer or "full"' if option == "time_bins" else "a positive integer of microseconds"
            raise UsageError(f"{option}={value!r} is not a way to bin events; give {allowed}")


def bin_recordings(chunks: Iterable[Recordings], features: int, time_bins: TimeBins, bin_us: int) -> Binned:
    """Bins events in fixed windows. An event at time t falls into bin `t // bin_us`.

    Events at or after `time_bins * bin_us` are dropped. With `time_bins="full"` no event is dropped: a recording ends
    with the bin of its last event and has at least one bin. Only one chunk's raw events are in memory at a time.
    Raises UsageError if `time_bins * features` does not fit 32 bits.
    """
    return join([bin_chunk(chunk, features, time_bins, bin_us) for chunk in chunks])


def join(parts: Sequence[RowsType]) -> RowsType:
    """Returns the recordings of all parts, in order."""
    sizes = np.concatenate([np.diff(part.offsets) for part in parts])
    return type(parts[0])(
        records=np.concatenate([part.records for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        labels=np.concatenate([part.labels for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
    )


def pack(chunk: Recordings) -> Timed:
    """Returns the events of a chunk unbinned. Raises UsageError for a time that does not fit 32 bits."""
    count = len(chunk.labels)
    lengths = np.ones(count, np.int64)
    np.maximum.at(lengths, np.repeat(np.arange(count), np.diff(chunk.offsets)), chunk.time.astype(np.int64) + 1)
    if lengths.max(initial=1) > MAX_CELLS:
        raise UsageError(
            f"an event {lengths.max():,} us after the start of its recording is later than {MAX_CELLS:,} us; let times "
            "start with each recording (align=True), or give the unit of the times (clock_us=)"
        )
    records = np.empty(len(chunk.time), EVENT)
    records["time"], records["feature"] = chunk.time, chunk.feature
    return Timed(records, np.asarray(chunk.offsets, np.int64), chunk.labels.astype(np.int64), lengths)


def bin_lengths(lengths_us: np.ndarray, time_bins: TimeBins, bin_us: int) -> np.ndarray:
    """Returns the time bins of recordings of `lengths_us` microseconds, int64 [n]."""
    if time_bins == "full":
        return np.maximum(1, -(-lengths_us // bin_us))
    return np.full(len(lengths_us), time_bins, np.int64)


def bin_chunk(chunk: Recordings, features: int, time_bins: TimeBins, bin_us: int) -> Binned:
    """Bins one chunk of recordings (see `bin_recordings`)."""
    count = len(chunk.labels)
    owner = np.repeat(np.arange(count), np.diff(chunk.offsets))
    ends = np.ones(count, np.int64)
    if time_bins == "full":
        np.maximum.at(ends, owner, chunk.time.astype(np.int64) + 1)
    return bin_events(owner, chunk, bin_lengths(ends, time_bins, bin_us), features, bin_us)


def bin_events(owner: np.ndarray, chunk: Recordings, lengths: np.ndarray, features: int, bin_us: int) -> Binned:
    """Bins the events of a chunk, of which `owner` tells the recording. Recording i has `lengths[i]` bins."""
    longest = int(lengths.max(initial=1))
    if longest * features > MAX_CELLS:
        raise UsageError(
            f"{longest:,} time bins of {features:,} inputs are more than {MAX_CELLS:,} cells a recording; "
            "use fewer or wider bins (time_bins=, bin_us=)"
        )
    row = longest * features
    bins = chunk.time.astype(np.int64) // bin_us
    inside = (bins >= 0) & (bins < lengths[owner])
    key = (owner * row + bins * features + chunk.feature)[inside]
    occupied, counts = np.unique(key, return_counts=True)
    records = np.empty(len(occupied), CELL)
    records["cell"], records["count"] = occupied % row, np.minimum(counts, MAX_COUNT)
    return Binned(
        records=records,
        offsets=np.searchsorted(occupied, np.arange(len(lengths) + 1) * row).astype(np.int64),
        labels=chunk.labels.astype(np.int64),
        lengths=lengths,
    )
