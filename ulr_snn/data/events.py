"""The event data set. It stores recordings as lists of occupied cells and makes each batch dense."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Annotated, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, SequentialSampler, Subset

from ulr_snn.data.augment import Transform, augmented
from ulr_snn.data.binning import Binned, Rows, Timed, bin_events
from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import Count, Flag, Natural, Whole, checked, iterates, where
from ulr_snn.model.targets import padded

Examples = Annotated[Dataset[Any], where("a data set of examples (x, y)", iterates)]
Place = int | tuple[int, int]
Collated = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


class CellSource(Protocol):
    """Gives the occupied cells of recordings. Cell t * features + f is input f in time bin t."""

    def take(self, rows: np.ndarray, seeds: Sequence[int | None]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns `(cells, counts, sizes)` of some recordings, one after another; sizes: cells of each recording.

        seeds: one for each recording, of what is random in it; None draws it from PyTorch's global generator.
        """
        ...


class BinnedSource:
    """Recordings that were binned before."""

    def __init__(self, binned: Binned) -> None:
        self.binned = binned

    def take(self, rows: np.ndarray, seeds: Sequence[int | None]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        records, sizes = gather(self.binned, rows)
        return records["cell"], records["count"], sizes


@dataclass(frozen=True)
class TimedSource:
    """Recordings that are augmented and binned when they are fetched. transforms: random changes of their events."""

    timed: Timed
    lengths: np.ndarray  # time bins of each recording
    bin_us: int
    sample_shape: tuple[int, ...]
    transforms: Sequence[Transform] = ()

    def take(self, rows: np.ndarray, seeds: Sequence[int | None]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        records, sizes = gather(self.timed, rows)
        parts = np.split(records, np.cumsum(sizes)[:-1])
        drawn = [int(torch.randint(2**62, ())) if seed is None else seed for seed in seeds] if self.transforms else []
        chunk, owner = augmented(self.transforms, parts, drawn or [0] * len(parts), self.sample_shape)
        chunk = replace(chunk, labels=self.timed.labels[rows])
        binned = bin_events(owner, chunk, self.lengths[rows], prod(self.sample_shape), self.bin_us)
        return binned.records["cell"], binned.records["count"], np.diff(binned.offsets)


def gather(table: Rows, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the records of some recordings, one after another, and the number of each recording."""
    starts, stops = table.offsets[rows], table.offsets[rows + 1]
    sizes = stops - starts
    found = np.empty(int(sizes.sum()), table.records.dtype)
    end = np.cumsum(sizes)
    for start, stop, first, last in zip(starts, stops, end - sizes, end, strict=True):
        found[first:last] = table.records[start:stop]
    return found, sizes


class EventDataset(Dataset[Any]):
    """Binned recordings with labels. Item i is `(x, y)`, x uint8 `[T, *sample_shape]`, y an int.

    sample_shape: shape of one time step, such as (2, 34, 34) or (128,).
    time_bins: T, or the largest T if recordings keep their own lengths.
    classes: number of classes.
    targets: int64 tensor [n], the labels.
    lengths: int64 tensor [n], the number of time bins of each recording.
    binary: whether x holds 0 and 1, or counts of events (at most 255).
    augments: whether recordings change at random each time (`load(augment=)`).

    A place of `dense`, `sparse` or a batch is an index, or `(index, seed)`, where the seed determines the augmentation.
    """

    def __init__(self, binned: Binned, sample_shape: tuple[int, ...], classes: int, binary: bool) -> None:
        self._set(BinnedSource(binned), binned.labels, binned.lengths, sample_shape, classes, binary)

    def _set(
        self,
        source: CellSource,
        labels: np.ndarray,
        lengths: np.ndarray,
        sample_shape: tuple[int, ...],
        classes: int,
        binary: bool,
    ) -> None:
        self.sample_shape = tuple(sample_shape)
        self.classes = classes
        self.binary = binary
        self.time_bins = int(lengths.max(initial=0))
        self.targets = torch.from_numpy(labels)
        self.lengths = torch.from_numpy(lengths)
        self._source = source
        self._rows = np.arange(len(labels))

    @classmethod
    def of_events(cls, source: TimedSource, classes: int, binary: bool) -> "EventDataset":
        """Returns a data set that bins its recordings when they are fetched."""
        dataset: EventDataset = object.__new__(cls)
        dataset._set(source, source.timed.labels, source.lengths, source.sample_shape, classes, binary)
        return dataset

    @property
    def augments(self) -> bool:
        return isinstance(self._source, TimedSource) and bool(self._source.transforms)

    def plain(self) -> "EventDataset":
        """Returns the data set without augmentation. It shares the events."""
        if not isinstance(self._source, TimedSource):
            return self
        part = self.subset(range(len(self)))
        part._source = replace(self._source, transforms=())
        return part

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, place: Place) -> tuple[Tensor, int]:
        index, _ = _split(place)
        if not -len(self) <= index < len(self):
            raise IndexError(f"recording {index} of {len(self)}")
        x, _, _ = self.dense([place])
        return x[:, 0], int(self.targets[index])

    def __getitems__(self, places: Sequence[Place]) -> "EventBatch":
        return EventBatch(self, places)

    def dense(self, indices: Sequence[Place]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `(x, y, lengths)` of some recordings: x uint8 [T, B, *sample_shape], y and lengths int64 [B].

        T is the longest of their lengths. x is zero beyond a recording's own length.
        """
        place, counts, shape = self._placed(indices)
        x = np.zeros(shape.numel(), np.uint8)
        x[place] = counts
        return torch.from_numpy(x).view(shape), *self._about(indices)

    def sparse(self, indices: Sequence[Place]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `(x, y, lengths)` like `dense`, but x is a coalesced sparse COO tensor, made without frames."""
        place, counts, shape = self._placed(indices)
        order = np.argsort(place, kind="stable")
        cells = torch.from_numpy(np.stack(np.unravel_index(place[order], shape)))
        values = torch.from_numpy(counts[order])
        x = torch.sparse_coo_tensor(cells, values, shape, is_coalesced=True, check_invariants=False)
        return x, *self._about(indices)

    def _about(self, places: Sequence[Place]) -> tuple[Tensor, Tensor]:
        chosen = [_split(place)[0] for place in places]
        return self.targets[chosen], self.lengths[chosen]

    def _placed(self, places: Sequence[Place]) -> tuple[np.ndarray, np.ndarray, torch.Size]:
        """Returns the places of occupied cells in the flattened batch [T, B, *sample_shape], their counts, and the
        batch's shape."""
        split = [_split(place) for place in places]
        chosen = np.array([index for index, _ in split], np.int64)
        features = prod(self.sample_shape)
        batch, steps = len(chosen), int(self.lengths[chosen].max())
        cells, counts, sizes = self._source.take(self._rows[chosen], [seed for _, seed in split])
        # Cell t * features + f of sample b lies at (t * batch + b) * features + f in [T, B, features].
        place = cells + (cells // features).astype(np.int64) * ((batch - 1) * features)
        place += np.repeat(np.arange(batch) * features, sizes)
        counts = np.ones(len(place), np.uint8) if self.binary else np.ascontiguousarray(counts)
        return place, counts, torch.Size((steps, batch, *self.sample_shape))

    def subset(self, indices: Sequence[int] | np.ndarray) -> "EventDataset":
        """Returns a data set of the recordings at `indices`, in that order, which shares the events."""
        chosen = np.asarray(indices, dtype=np.int64)
        part = object.__new__(EventDataset)
        part.__dict__.update(self.__dict__)
        part.targets, part.lengths = self.targets[chosen], self.lengths[chosen]
        part._rows = self._rows[chosen]
        return part


def _split(place: Place) -> tuple[int, int | None]:
    return (int(place[0]), int(place[1])) if isinstance(place, tuple) else (int(place), None)


class SeededSampler(Sampler[Place]):
    """Gives each index of an epoch with a seed for its augmentation. Both follow from the generator alone."""

    def __init__(self, indices: Sampler[int], generator: torch.Generator) -> None:
        self.indices = indices
        self.generator = generator

    def __len__(self) -> int:
        return len(self.indices)  # type: ignore[arg-type]  # torch's samplers have a length, their base class has none

    def __iter__(self) -> Iterator[Place]:
        epoch = int(torch.randint(2**62, (), generator=self.generator))
        for index in self.indices:
            yield index, epoch * 2**32 + index


class SeededItems(Dataset[Any]):
    """Items of a data set that holds event sets. At a place `(index, seed)` the seed determines the augmentation."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: Place) -> Any:
        index, seed = _split(place)
        if seed is None:
            return self.dataset[index]
        before = torch.get_rng_state()
        # The generator takes 32 bits of its seed; those of `SeedSequence` depend on all bits of the place's seed.
        torch.default_generator.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        try:
            return self.dataset[index]
        finally:
            torch.set_rng_state(before)


def _augments(dataset: Any) -> bool:
    """Returns whether a data set, or one that it holds, such as those of a `ConcatDataset`, augments."""
    if isinstance(dataset, EventDataset):
        return dataset.augments
    return any(map(_augments, _held(dataset)))


def _held(dataset: Any) -> list[Any]:
    several = getattr(dataset, "datasets", ())
    held = [getattr(dataset, "dataset", None), *(several if isinstance(several, list | tuple) else ())]
    return [part for part in held if isinstance(part, Dataset) and part is not dataset]


def _whole(dataset: Any) -> Any:
    """Returns a `Subset` of an event set as an event set, and other data sets as they are."""
    inner = _whole(dataset.dataset) if type(dataset) is Subset else None
    return inner.subset(dataset.indices) if isinstance(inner, EventDataset) else dataset


class EventBatch(Sequence[Any]):
    """A batch that a DataLoader fetches. `collate` makes it dense in one scatter; for other collate functions it is a
    sequence of `(x, y)` items."""

    def __init__(self, dataset: EventDataset, indices: Sequence[Place]) -> None:
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> tuple[Tensor, int]:  # an int; slices are not supported
        return self.dataset[self.indices[index]]


@checked
def collate(items: Sequence[tuple[Any, Any]], sparse: Flag = False, over_time: Flag | None = None) -> Collated:
    """Collates recordings to a batch, time first.

    items: `(x, y)` pairs, x `[T_i, ...]` (tensor or array, the same `...` for all), y a class index or another target.
    sparse: whether x is a sparse COO tensor. For this package's data sets it is made without frames.
    over_time: whether targets `[T_i, ...]` have an entry for each time step. None: they do if every target of the batch
        is as long as its recording.
    Returns `(x [T, B, ...], y [B, ...])` if all recordings have the same length, otherwise
    `(x [T, B, ...], y [B, ...], lengths [B])`, where x is zero beyond a recording's length. x keeps its type (uint8 for
    this package's data sets), class indices and lengths are int64. Targets over time are y `[T, B, ...]`. Beyond a
    recording's length class indices are -100, which losses leave out, and values are 0.
    Raises UsageError for an empty batch, for recordings or targets that differ in shape, and for vectors of floats or
    bools that may be targets over time or not.
    """
    if len(items) == 0:
        raise UsageError("collate got an empty batch; give it at least one (x, y) item")
    if isinstance(items, EventBatch):
        x, y, lengths = (items.dataset.sparse if sparse else items.dataset.dense)(items.indices)
    else:
        x, lengths = _pad([torch.as_tensor(item[0]) for item in items])
        y = _targets([item[1] for item in items], lengths.tolist(), over_time)
        x = x.to_sparse() if sparse else x
    return (x, y) if bool((lengths == len(x)).all()) else (x, y, lengths)


def _pad(recordings: list[Tensor]) -> tuple[Tensor, Tensor]:
    if any(recording.ndim == 0 for recording in recordings):
        raise UsageError("a recording is a single number; collate takes recordings with the axes [T, ...]")
    shapes = sorted({tuple(recording.shape[1:]) for recording in recordings})
    if len(shapes) > 1:
        raise UsageError(f"one batch holds time steps of shapes {shapes}; collate recordings of one sensor only")
    return pad_sequence(recordings), torch.tensor([len(recording) for recording in recordings])


def _targets(given: list[Any], lengths: list[int], over_time: bool | None) -> Tensor:
    """Returns the targets of recordings of these lengths, [B, ...], or [T, B, ...] if they are over time."""
    try:
        targets = [torch.as_tensor(target) for target in given]
    except (TypeError, ValueError, RuntimeError):
        kinds = ", ".join(sorted({type(target).__name__ for target in given}))
        raise UsageError(f"collate got targets of type {kinds}; give numbers, tensors or arrays") from None
    fits = all(y.ndim > 0 and len(y) == length for y, length in zip(targets, lengths, strict=True))
    vectors = all(y.ndim == 1 and (y.is_floating_point() or y.dtype == torch.bool) for y in targets)
    if fits and vectors and over_time is None and len(set(lengths)) == 1:
        raise UsageError(
            f"targets are vectors of {lengths[0]} numbers, and recordings have {lengths[0]} time steps; give loader or "
            "collate over_time=True for a number for each time step, or over_time=False for a vector of each recording"
        )
    if fits and over_time is not False and len({y.shape[1:] for y in targets}) == 1:
        return padded(targets, batch_first=False)
    shapes = sorted({tuple(y.shape) for y in targets})
    if over_time or len(shapes) > 1:
        raise UsageError(
            f"recordings of {sorted(set(lengths))} time steps have targets of shapes {shapes} in one batch; give all "
            "targets the same shape, or an entry for each time step of their recording"
        )
    return torch.stack(targets)


@checked
def loader(
    dataset: Examples,
    batch_size: Count = 64,
    shuffle: Flag = False,
    seed: Whole = 0,
    drop_last: Flag = False,
    num_workers: Natural = 0,
    sparse: Flag = False,
    pin_memory: Flag | None = None,
    over_time: Flag | None = None,
) -> DataLoader[Any]:
    """Returns a DataLoader of time-first batches (see `collate`), in the same order for the same `seed`.

    With `shuffle=True` every epoch has another order. A data set that augments gives other events in every epoch, the
    same for the same `seed`, whatever the number of processes. So does a data set that holds such sets: a `Subset`, a
    `ConcatDataset`, or one of your own with an attribute `dataset` or a list `datasets`.

    num_workers: number of processes that fetch batches ahead. sparse: whether batches are sparse tensors. pin_memory:
    whether batches are in pinned memory, which a GPU reads while it computes; None: only if there is a GPU and batches
    are dense. over_time: see `collate`.
    """
    if pin_memory is None:
        pin_memory = torch.cuda.is_available() and not sparse
    generator = torch.Generator().manual_seed(seed % 2**64)
    sampler = None
    if _augments(dataset) and not isinstance(dataset, IterableDataset):
        dataset = _whole(dataset)
        dataset = dataset if isinstance(dataset, EventDataset) else SeededItems(dataset)
        indices = RandomSampler(dataset, generator=generator) if shuffle else SequentialSampler(dataset)
        sampler, shuffle = SeededSampler(indices, generator), False
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        sampler=sampler,
        drop_last=drop_last,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=partial(collate, sparse=sparse, over_time=over_time),
        generator=generator,
    )
