"""Random changes of training events, drawn anew in every epoch."""

import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from ulr_snn.data.binning import Recordings
from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import Flag, Fraction, Natural, NotNegative, check_fields, shown

Transform = Callable[[np.ndarray], np.ndarray]
FIELDS = np.dtype([(name, np.int64) for name in ("x", "y", "t", "p")])
_SEEDED = threading.Lock()


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a recording's events, in the order of the fields.

    event_drop: whether events are dropped at random, in a span of time or in a part of the sensor, one of them or none
        for each recording (tonic's `EventDrop`, Gu et al., IJCAI 2021).
    flip: probability that a recording is mirrored, left to right (tonic's `RandomFlipLR`).
    shift: largest distance, in inputs, by which a recording moves along x and along y. An event that leaves the sensor
        is dropped.
    jitter_us: standard deviation of the noise on the time of each event (tonic's `TimeJitter`). An event that leaves
        the recording is dropped.
    transforms: more functions of the events, a structured array with fields x, y, t (microseconds) and p, such as
        tonic's transforms. They draw from NumPy's global generator.

    Positions are those after crop and downsampling. Lists of units lie along x.
    """

    event_drop: Flag = False
    flip: Fraction = 0.0
    shift: Natural = 0
    jitter_us: NotNegative = 0.0
    transforms: Sequence[Transform] = ()

    def __post_init__(self) -> None:
        check_fields(self)

    def bound(self, sample_shape: tuple[int, ...]) -> list[Transform]:
        """Returns the changes for recordings of this shape. Raises UsageError for a change that does not fit it."""
        if self.flip and len(sample_shape) == 1:
            raise UsageError("recordings of units have no left and right; use flip=0")
        channels, height, width = _sensor(sample_shape)
        found: list[Transform] = []
        if self.event_drop:
            found.append(_tonic().EventDrop(sensor_size=(width, height, channels)))
        if self.flip:
            found.append(_tonic().RandomFlipLR(sensor_size=(width, height, channels), p=self.flip))
        if self.shift:
            found.append(Shift(self.shift, self.shift if height > 1 else 0))
        if self.jitter_us:
            found.append(_tonic().TimeJitter(std=self.jitter_us, clip_negative=True))
        return found + list(self.transforms)


@dataclass(frozen=True)
class Shift:
    """Moves all events of a recording by one random distance, of at most `x` and `y`."""

    x: int
    y: int

    def __call__(self, events: np.ndarray) -> np.ndarray:
        for axis, largest in (("x", self.x), ("y", self.y)):
            events[axis] += np.random.randint(-largest, largest + 1)
        return events


def bind(augment: "Augmentation | Transform | Sequence[Transform]", sample_shape: tuple[int, ...]) -> list[Transform]:
    """Returns the functions of the events that `augment` stands for."""
    if not isinstance(augment, Augmentation):
        several = isinstance(augment, Sequence) and not isinstance(augment, str)
        augment = Augmentation(transforms=cast(Sequence[Transform], augment if several else [augment]))
    if wrong := [transform for transform in augment.transforms if not callable(transform)]:
        raise UsageError(
            f"augment got {shown(wrong[0])}; give an Augmentation, a function of a structured array of events, or a "
            "list of such functions"
        )
    return augment.bound(sample_shape)


def augmented(
    transforms: Sequence[Transform],
    recordings: Sequence[np.ndarray],
    seeds: Sequence[int],
    sample_shape: tuple[int, ...],
) -> tuple[Recordings, np.ndarray]:
    """Returns changed recordings and the recording of each event.

    recordings: records of `Timed`, one array a recording. seeds: one a recording, the only source of its randomness.
    Events that have left the sensor or lie before the start are dropped.
    """
    channels, height, width = _sensor(sample_shape)
    changed = []
    for records, seed in zip(recordings, seeds, strict=True):
        events = np.empty(len(records), FIELDS)
        place, events["x"] = np.divmod(records["feature"], width)
        events["p"], events["y"] = np.divmod(place, height)
        events["t"] = records["time"]
        if len(events) and transforms:
            with _seeded(seed):
                for transform in transforms:
                    events = _changed(events, transform)
        changed.append(events)
    owner = np.repeat(np.arange(len(changed)), [len(events) for events in changed])
    x, y, t, p = (np.concatenate([events[name].astype(np.int64) for events in changed]) for name in FIELDS.names or ())
    kept = (x >= 0) & (x < width) & (y >= 0) & (y < height) & (t >= 0) & (p >= 0) & (p < channels)
    feature = ((p * height + y) * width + x)[kept]
    none = np.empty(0, np.int64)  # offsets and labels, which the caller knows
    return Recordings(t[kept], feature, none, none), owner[kept]


def _changed(events: np.ndarray, transform: Transform) -> np.ndarray:
    found = transform(events)
    if not isinstance(found, np.ndarray) or not set(FIELDS.names or ()) <= set(found.dtype.names or ()):
        raise UsageError(
            f"the augmentation {shown(transform)} returned {type(found).__name__}, not a structured array of events "
            "with the fields x, y, t and p; leave out what makes frames, and return the events"
        )
    return found


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds NumPy's global generator, from which tonic's transforms draw, and restores it afterwards."""
    with _SEEDED:
        before = np.random.get_state()
        np.random.seed(np.random.SeedSequence(seed).generate_state(4))
        try:
            yield
        finally:
            np.random.set_state(before)


def _sensor(sample_shape: tuple[int, ...]) -> tuple[int, int, int]:
    channels, height, width = sample_shape if len(sample_shape) == 3 else (1, 1, *sample_shape)
    return channels, height, width


def _tonic() -> Any:
    try:
        return importlib.import_module("tonic.transforms")
    except ImportError as error:
        raise UsageError(
            f"these augmentations need {error.name or 'tonic'}; install it with `pip install ulr_snn[tonic]`"
        ) from error
