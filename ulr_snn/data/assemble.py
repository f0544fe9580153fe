"""From events to data sets: view, cache, binning, augmentation, held-out and balanced parts."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, cast

from ulr_snn.data import child
from ulr_snn.data.augment import Augmentation, Transform, bind
from ulr_snn.data.binning import (
    MAX_CELLS,
    Binned,
    Recordings,
    Rows,
    TimeBins,
    Timed,
    bin_chunk,
    bin_lengths,
    check_window,
    pack,
    window,
)
from ulr_snn.data.cache import BinnedSplits, Chunks, cached
from ulr_snn.data.entry import Recorded, Source
from ulr_snn.data.events import EventDataset, TimedSource
from ulr_snn.data.splits import balanced, split
from ulr_snn.data.view import WHOLE, View
from ulr_snn.errors import UsageError

Augment = Augmentation | Transform | Sequence[Transform]
Validation = float | Literal["own"]


@dataclass(frozen=True)
class Clock:
    """How time is cut into bins. span_us: what bins cover by default; None: the longest recording."""

    time_bins: TimeBins | None
    bin_us: int | None
    span_us: int | None
    default_us: int | None

    def __post_init__(self) -> None:
        check_window(self.time_bins, self.bin_us)

    @property
    def known(self) -> bool:
        """Whether the window is known before the recordings are read."""
        return self.span_us is not None or (self.time_bins is not None and self.bin_us is not None)

    @property
    def end_us(self) -> int | None:
        """The end of the last bin, or None if it follows from the recordings."""
        bins, width = self.window(0) if self.known else ("full", 0)
        return None if isinstance(bins, str) else bins * width

    def window(self, longest_us: int) -> tuple[TimeBins, int]:
        """Returns the number of bins and their width, by default 20 bins where nothing is known of the data set."""
        span = self.span_us or longest_us
        return window(span, self.default_us or -(-span // 20), self.time_bins, self.bin_us)


@dataclass(frozen=True)
class Options:
    """What `load` and `from_tonic` do alike, see `load`."""

    binary: bool = False
    view: View = WHOLE
    augment: Augment | None = None
    validation: Validation | None = None
    per_class: int | None = None
    seed: int = 0
    cache_dir: str | os.PathLike[str] | None = None
    stream: bool | None = None


def assemble(name: str, found: Source | Recorded, clock: Clock, options: Options) -> tuple[EventDataset, ...]:
    """Returns the training, the validation (if asked for) and the test recordings."""
    if isinstance(found, Source):
        splits, dataset = _binned_by_itself(name, found, clock, options)
    elif options.augment is None and clock.known:
        splits, dataset = _binned(name, found, clock, options)
    else:
        splits, dataset = _timed(name, found, clock, options)
    train, test = dataset(splits.train, True), dataset(splits.test, False)
    if options.validation is None:
        held_out = []
    elif options.validation != "own":
        train, rest = split(train, options.validation, options.seed)
        held_out = [rest]
    elif splits.validation is None:
        raise UsageError(f"{name} has no validation recordings of its own; give validation= a fraction, such as 0.1")
    else:
        held_out = [dataset(splits.validation, False)]
    if options.per_class is not None:
        train = balanced(train, options.per_class, options.seed)
    return train, *held_out, test


MakeDataset = Callable[[Rows, bool], EventDataset]  # of a split; whether it is augmented


def _binned_by_itself(name: str, found: Source, clock: Clock, options: Options) -> tuple[BinnedSplits, MakeDataset]:
    if options.view != WHOLE or options.augment is not None:
        raise UsageError(
            f"{name} bins its recordings itself; leave crop=, downsample=, polarity= and augment= out, or let its "
            "entry return ulr_snn.data.Recorded"
        )
    bins, width = clock.window(0)
    key = f"{found.place}\n{bins} {width}"
    return _cached(name, key, found, lambda: found.build(bins, width), options)


def _binned(name: str, found: Recorded, clock: Clock, options: Options) -> tuple[BinnedSplits, MakeDataset]:
    bins, width = clock.window(0)

    def build() -> Chunks:
        return _chunks(found, options.view, lambda chunk, inputs: bin_chunk(chunk, inputs, bins, width), Binned)

    key = f"{found.place}\n{bins} {width}" + ("" if options.view == WHOLE else f"\n{options.view}")
    return _cached(name, key, found, build, options)


def _cached(
    name: str, key: str, found: Source | Recorded, build: Callable[[], BinnedSplits | Chunks], options: Options
) -> tuple[BinnedSplits, MakeDataset]:
    try:
        splits = cached(options.cache_dir, name, key, found.fingerprint, build, options.stream)
    finally:
        child.close()

    def dataset(rows: Rows, augmented: bool) -> EventDataset:
        return EventDataset(cast(Binned, rows), splits.sample_shape, splits.classes, options.binary)

    return splits, dataset


def _timed(name: str, found: Recorded, clock: Clock, options: Options) -> tuple[BinnedSplits, MakeDataset]:
    def build() -> Chunks:
        return _chunks(found, options.view, lambda chunk, inputs: pack(chunk), Timed)

    key = f"{found.place}\nevents\n{options.view}"
    splits, _ = _cached(name, key, found, build, options)
    rows = [part for part in (splits.train, splits.validation, splits.test) if part is not None]
    bins, width = clock.window(max(int(part.lengths.max(initial=1)) for part in rows))
    shape = splits.sample_shape
    transforms = [] if options.augment is None else bind(options.augment, shape)

    def dataset(rows: Rows, augmented: bool) -> EventDataset:
        lengths = bin_lengths(rows.lengths, bins, width)
        if int(lengths.max(initial=1)) * prod(shape) > MAX_CELLS:
            raise UsageError(
                f"{lengths.max():,} time bins of {prod(shape):,} inputs are too many; use fewer or wider bins"
            )
        source = TimedSource(cast(Timed, rows), lengths, width, shape, transforms if augmented else ())
        return EventDataset.of_events(source, splits.classes, options.binary)

    return splits, dataset


def _chunks(found: Recorded, view: View, convert: Callable[[Recordings, int], Rows], kind: type[Rows]) -> Chunks:
    raw = found.read()
    shape = view.shape(raw.sample_shape)

    def converted(chunks: Iterable[Recordings]) -> Iterator[Rows]:
        for chunk in chunks:
            yield convert(view.apply(chunk, raw.sample_shape), prod(shape))

    splits = {split: converted(chunks) for split, chunks in raw.splits.items()}
    return Chunks(splits, shape, raw.classes, kind)
