"""Data sets that are not registered: tonic's own, and any sequence of events and labels."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

import numpy as np

from ulr_snn.data import columns, identity
from ulr_snn.data.assemble import Augment, Clock, Options, assemble
from ulr_snn.data.binning import Recordings, TimeBins
from ulr_snn.data.entry import Raw, Recorded
from ulr_snn.data.events import EventDataset
from ulr_snn.data.files import CHUNK, CHUNK_EVENTS, MOST_CLASSES, offsets
from ulr_snn.data.registry import ENTRIES
from ulr_snn.data.view import Polarity, View
from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import Count, Flag, Positive, Whole, checked, shown

Sensor = tuple[int, int, int]  # width, height and polarities, as in tonic; units lie along the width


@checked
def from_tonic(
    dataset: Any,
    *,
    sensor_size: Sensor | None = None,
    time_bins: TimeBins | None = None,
    bin_us: int | None = None,
    clock_us: Positive = 1.0,
    align: Flag | None = None,
    classes: Count | None = None,
    binary: Flag = False,
    cache_dir: str | os.PathLike[str] | None = None,
    crop: tuple[int, int] | None = None,
    downsample: int = 1,
    polarity: Polarity = "both",
    augment: Augment | None = None,
    validation: float | None = None,
    per_class: Count | None = None,
    seed: Whole = 0,
    stream: Flag | None = None,
) -> EventDataset | tuple[EventDataset, ...]:
    """Returns a tonic data set, or any sequence of recordings, as `load` returns those that it knows.

    dataset: a data set of tonic, or a sequence of `(events, label)`. Events are a structured array with the fields `t`
        and `x`, and `y` and `p` if the sensor has them, or `ts`, `time`, `timestamp`, `pol`, `polarity`. Places are
        whole numbers, polarities 0 and 1, -1 and 1, or bools. A label is a class index or a name. Names are numbered as
        in the data set's attribute `classes`, else in alphabetical order. A pair of these, `(train, test)`, gives a
        pair of data sets; a single one gives one.
    sensor_size: (width, height, polarities), as in tonic; default: the data set's own, else the smallest that holds all
        events. One row of pixels and one polarity make units, with time steps of shape [width]. Polarities are left
        out if the sensor has one, and may be any index if it has more than two.
    time_bins, bin_us: see `load`. Data sets that `load` knows have its defaults. Otherwise bins cover the longest
        recording, by default 20 of them.
    clock_us: microseconds in one unit of `t`. Times are rounded to whole microseconds.
    align: whether the first event of each recording is at time 0; default: as in `load`, else False. It is needed for
        times of a clock that runs on, as in slices of recordings.
    classes: number of classes; default: the data set's own, else 1 + the largest label.
    binary, cache_dir, crop, downsample, polarity, augment, validation, per_class, seed, stream: see `load`. With
        `validation` the held-out recordings follow the training recordings: `(train, validation, test)`.

    Recordings are read once and cached. A data set of tonic is read again after a change of its files, attributes or
    transforms. Sequences, classes and transforms that are not tonic's are read in full at each call, to see whether
    recordings have changed. A transform of tonic's data set that is random is cached as it was drawn; give it as
    `augment` instead.

    Raises UsageError for events with other fields, outside the sensor or before time 0, recordings without an event in
    any time bin, and for labels of two kinds.
    """
    pair = isinstance(dataset, tuple) and len(dataset) == 2 and not any(map(_is_recording, dataset))
    parts = _parts(dataset if pair else (dataset,))
    name = type(parts["train"]).__name__.lower()
    entry = ENTRIES.get(name) if _is_tonic(parts["train"]) else None
    clock = Clock(time_bins, bin_us, entry.span_us if entry else None, entry.bin_us if entry else None)
    align = bool(entry and entry.align) if align is None else align
    reader = _Reader(sensor_size, clock_us, align, classes, clock.end_us)
    view = View(crop, downsample, polarity)
    options = Options(binary, view, augment, validation, per_class, seed, cache_dir, stream)
    found = assemble(name if _is_tonic(parts["train"]) else "events", reader.find(parts), clock, options)
    if pair:
        return found
    return found[0] if validation is None else found[:-1]


def _parts(given: tuple[Any, ...]) -> dict[str, Any]:
    parts = dict(zip(("train", "test"), given, strict=False))
    for split, part in parts.items():
        if not (hasattr(part, "__len__") and hasattr(part, "__getitem__")) or len(part) == 0 or _is_recording(part):
            raise UsageError(
                f"from_tonic got {type(part).__name__} as the {split}ing set; give a tonic data set or a sequence of "
                "(events, label), which is not empty"
            )
    return parts


def _is_recording(part: Any) -> bool:
    return isinstance(part, tuple) and len(part) == 2 and _is_events(part[0])


def _is_events(value: Any) -> TypeGuard[np.ndarray]:
    return isinstance(value, np.ndarray) and value.dtype.names is not None


def _is_tonic(dataset: Any) -> bool:
    return hasattr(dataset, "location_on_system")  # of tonic's base class, which takes seconds to import


class _Reader:
    """Reads sequences of recordings. end_us: end of the last time bin, if it is known; the other arguments are those of
    `from_tonic`."""

    def __init__(
        self, sensor_size: Sensor | None, clock_us: float, align: bool, classes: int | None, end_us: int | None
    ) -> None:
        self.sensor_size = sensor_size
        self.clock_us = clock_us
        self.align = align
        self.classes = classes
        self.end_us = end_us

    def find(self, parts: dict[str, Any]) -> Recorded:
        """Returns how to read the recordings, and what they are cached under."""
        states = [identity.of_tonic(part) for part in parts.values()]
        told = [state for state in states if state is not None]
        if len(told) < len(states):
            layout = self.layout(parts)
            contents = identity.of_contents(self.read(parts, *layout))
            return Recorded(contents, contents, lambda: self.read(parts, *layout))
        own = [(getattr(part, "sensor_size", None), _listed(part)) for part in parts.values()]
        arguments = f"{self.sensor_size} {self.clock_us} {self.align} {self.classes} {self.end_us} {own}"
        place = "\n".join([arguments, *(state for state, _ in told)])
        return Recorded(place, " ".join(files for _, files in told), lambda: self.read(parts, *self.layout(parts)))

    def layout(self, parts: dict[str, Any]) -> tuple[tuple[int, ...], int | None, list[str]]:
        """Returns the shape of a time step, the number of classes, and their names, if labels are names."""
        own = getattr(parts["train"], "sensor_size", None)
        width, height, channels = self.sensor_size or own or _smallest_sensor(parts)
        shape = (width,) if height == channels == 1 else (channels, height, width)
        names = _names(list(parts.values()))
        known = getattr(parts["train"], "classes", None)
        own_classes = len(names or _listed(parts["train"])) or (known if isinstance(known, int) else None)
        return shape, self.classes or own_classes, names

    def read(self, parts: dict[str, Any], shape: tuple[int, ...], classes: int | None, names: list[str]) -> Raw:
        """Returns the recordings, chunk by chunk. The other arguments are the results of `layout`."""
        splits = {split: self.chunks(part, split, shape, classes, names) for split, part in parts.items()}
        if "test" not in parts:
            nothing = np.empty(0, np.int64)
            splits["test"] = iter([Recordings(nothing, nothing, np.zeros(1, np.int64), nothing)])
        return Raw(shape, classes, dict(splits))

    def chunks(
        self, part: Any, split: str, shape: tuple[int, ...], classes: int | None, names: list[str]
    ) -> Iterator[Recordings]:
        """Yields the recordings of a sequence with times in microseconds."""
        times: list[np.ndarray] = []
        features: list[np.ndarray] = []
        labels: list[int] = []
        for index in range(len(part)):
            where = f"recording {index} of the {split}ing set"
            events, label = _recording(part, index, where)
            times.append(self.times(events["t"], where))
            features.append(columns.features(events, shape, where))
            labels.append(_class_index(label, names, where, classes))
            if len(labels) == CHUNK or sum(map(len, times)) >= CHUNK_EVENTS or index == len(part) - 1:
                sizes = [len(time) for time in times]
                yield Recordings(np.concatenate(times), np.concatenate(features), offsets(sizes), np.array(labels))
                times, features, labels = [], [], []

    def times(self, t: np.ndarray, where: str) -> np.ndarray:
        """Returns times in microseconds. Raises UsageError if all of them lie behind the last time bin."""
        found = columns.times(t, self.clock_us, self.align, where)
        if self.end_us is not None and found.min(initial=self.end_us) >= self.end_us and len(found):
            raise UsageError(
                f"{where} has {len(found):,} events, the first of them at {found.min():,} us, but time bins end at "
                f"{self.end_us:,} us; let times start with each recording (align=True), or give other bins"
            )
        return found


def _recording(part: Any, index: int, where: str) -> tuple[columns.Columns, Any]:
    item = part[index]
    if not (isinstance(item, Sequence) and len(item) == 2):
        raise UsageError(f"{where} is {type(item).__name__}, not a pair (structured array of events, label)")
    if not _is_events(item[0]):
        raise UsageError(
            f"{where} has events of type {type(item[0]).__name__}, which is no structured array with fields such as t "
            "and x; leave out transforms that make frames"
        )
    return columns.of_events(item[0], where), item[1]


def _class_index(label: Any, names: list[str], where: str, classes: int | None) -> int:
    """Returns the index of a label. names: of the classes, in their order, if labels are names."""
    if names and isinstance(label, str):
        if label in names[:classes]:
            return names.index(label)
        raise UsageError(
            f"{where} has the label {label!r}, which is none of the {len(names[:classes])} classes "
            f"{shown(names[:classes])}; list it in the data set's .classes, or give more classes="
        )
    try:
        found = int(label)
        known = bool(found == label) and not names
    except (TypeError, ValueError, OverflowError):
        found, known = -1, False
    if not known or not 0 <= found < (classes or MOST_CLASSES):
        limit = f"from 0 to {(classes or MOST_CLASSES) - 1}"
        raise UsageError(f"{where} has the label {label!r}; labels are all names, or all class indices {limit}")
    return found


def _names(parts: list[Any]) -> list[str]:
    """Returns the names of the classes in the order of the data set's own list, else in alphabetical order. It returns
    nothing if labels are numbers."""
    if not isinstance(_recording(parts[0], 0, "recording 0 of the training set")[1], str):
        return []
    listed = next(filter(None, map(_listed, parts)), [])
    if listed and all(isinstance(name, str) for name in listed):
        return listed
    found: set[Any] = set()
    for part in parts:
        targets: Any = getattr(part, "targets", None)
        changed = any(getattr(part, name, None) is not None for name in ("target_transform", "transforms"))
        changed = changed or not hasattr(targets, "__len__") or len(targets) != len(part)
        if changed or not all(isinstance(target, str) for target in targets):
            targets = (part[index][1] for index in range(len(part)))
        found |= {target for target in targets if isinstance(target, str)}
    return sorted(map(str, found))


def _listed(part: Any) -> list[Any]:
    """Returns the classes that a data set lists by itself, in the order of their indices."""
    known: Any = getattr(part, "classes", None)
    if isinstance(known, dict) and all(isinstance(index, int) for index in known.values()):
        return sorted(known, key=lambda name: known[name])
    return list(known) if hasattr(known, "__len__") else []


def _smallest_sensor(parts: dict[str, Any]) -> Sensor:
    """Returns the smallest sensor with all events. It has two polarities if events have p, and y or both polarities."""
    width = height = 1
    fields: set[str] = set()
    polarities: set[bool] = set()
    for split, part in parts.items():
        for index in range(len(part)):
            where = f"recording {index} of the {split}ing set"
            events, _ = _recording(part, index, where)
            fields |= set(events)
            width = max(width, int(events["x"].max(initial=0)) + 1)
            if "y" in events:
                height = max(height, int(events["y"].max(initial=0)) + 1)
            if "p" in events:
                on = columns.on(events["p"], where)
                polarities |= {value for value, seen in ((True, on.any()), (False, not on.all())) if seen}
    return width, height, 2 if "p" in fields and ("y" in fields or len(polarities) == 2) else 1
