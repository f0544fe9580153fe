"""Binning of events in time. The result lists the occupied cells (compressed rows, one row for each recording)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ulr_snn.errors import UsageError

MAX_COUNT = 255
MAX_CELLS = 2**31

TimeBins = int | Literal["full"]


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
class Binned:
    """`n` recordings as sorted lists of the cells that hold events.

    cells: [C] int32, time bin * features + feature.
    counts: [C] uint8, events in the cell, saturating at 255.
    offsets: [n + 1] int64; recording i is `cells[offsets[i]:offsets[i + 1]]`.
    labels: [n] int64.
    lengths: [n] int64, time bins of each recording.
    """

    cells: np.ndarray
    counts: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray


def window(span_us: int, default_us: int, time_bins: TimeBins | None, bin_us: int | None) -> tuple[TimeBins, int]:
    """Returns the number of bins and their width in microseconds. Each may be given or not.

    A missing number or width follows from `span_us`, the part of a recording that bins cover by default. If both are
    missing, bins are `default_us` wide. `time_bins="full"` keeps every recording's own length.
    Raises UsageError for a number or width that is not a positive integer.
    """
    for option, value in (("time_bins", time_bins), ("bin_us", bin_us)):
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value > 0
        if not (value is None or whole or (option == "time_bins" and value == "full")):
            allowed = 'a positive integer or "full"' if option == "time_bins" else "a positive integer of microseconds"
            raise UsageError(f"{option}={value!r} is not a way to bin events; give {allowed}")
    if bin_us is None:
        bin_us = default_us if time_bins is None or isinstance(time_bins, str) else -(-span_us // time_bins)
    if time_bins is None:
        time_bins = -(-span_us // bin_us)
    return (time_bins if time_bins == "full" else int(time_bins)), int(bin_us)


def bin_recordings(chunks: Iterable[Recordings], features: int, time_bins: TimeBins, bin_us: int) -> Binned:
    """Bins events in fixed windows. An event at time t falls into bin `t // bin_us`.

    Events at or after `time_bins * bin_us` are dropped. With `time_bins="full"` no event is dropped: a recording ends
    with the bin of its last event and has at least one bin. Only one chunk's raw events are in memory at a time.
    Raises UsageError if `time_bins * features` does not fit 32 bits.
    """
    parts = [_bin_chunk(chunk, features, time_bins, bin_us) for chunk in chunks]
    sizes = np.concatenate([np.diff(part.offsets) for part in parts])
    return Binned(
        cells=np.concatenate([part.cells for part in parts]),
        counts=np.concatenate([part.counts for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        labels=np.concatenate([part.labels for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
    )


def _bin_chunk(chunk: Recordings, features: int, time_bins: TimeBins, bin_us: int) -> Binned:
    count = len(chunk.labels)
    owner = np.repeat(np.arange(count), np.diff(chunk.offsets))
    bins = chunk.time.astype(np.int64) // bin_us
    if time_bins == "full":
        lengths = np.ones(count, np.int64)
        np.maximum.at(lengths, owner, bins + 1)
        longest = int(lengths.max(initial=1))
    else:
        lengths = np.full(count, time_bins, np.int64)
        longest = time_bins
    if longest * features > MAX_CELLS:
        raise UsageError(
            f"{longest:,} time bins of {features:,} inputs are more than {MAX_CELLS:,} cells a recording; "
            "use fewer or wider bins (time_bins=, bin_us=)"
        )
    row = longest * features
    key = owner * row + bins * features + chunk.feature
    occupied, counts = np.unique(key[bins < longest], return_counts=True)
    return Binned(
        cells=(occupied % row).astype(np.int32),
        counts=np.minimum(counts, MAX_COUNT).astype(np.uint8),
        offsets=np.searchsorted(occupied, np.arange(count + 1) * row).astype(np.int64),
        labels=chunk.labels.astype(np.int64),
        lengths=lengths,
    )
