"""The event data set. It stores recordings as lists of occupied cells and makes each batch dense."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ulr_snn.data.binning import Binned
from ulr_snn.errors import UsageError

Collated = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


class EventDataset(Dataset[Any]):
    """Binned recordings with labels. Item i is `(x, y)`, x uint8 `[T, *sample_shape]`, y an int.

    sample_shape: shape of one time step, such as (2, 34, 34) or (128,).
    time_bins: T, or the largest T if recordings keep their own lengths.
    classes: number of classes.
    targets: int64 tensor [n], the labels.
    lengths: int64 tensor [n], the number of time bins of each recording.
    binary: whether x holds 0 and 1, or counts of events (at most 255).
    """

    def __init__(self, binned: Binned, sample_shape: tuple[int, ...], classes: int, binary: bool) -> None:
        self.sample_shape = tuple(sample_shape)
        self.classes = classes
        self.binary = binary
        self.time_bins = int(binned.lengths.max(initial=0))
        self.targets = torch.from_numpy(binned.labels)
        self.lengths = torch.from_numpy(binned.lengths)
        self._cells = binned.cells
        self._counts = binned.counts
        self._starts = binned.offsets[:-1]
        self._sizes = np.diff(binned.offsets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"recording {index} of {len(self)}")
        x, _, _ = self.dense([index])
        return x[:, 0], int(self.targets[index])

    def __getitems__(self, indices: Sequence[int]) -> "EventBatch":
        return EventBatch(self, indices)

    def dense(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `(x, y, lengths)` of some recordings: x uint8 [T, B, *sample_shape], y and lengths int64 [B].

        T is the longest of their lengths. x is zero beyond a recording's own length.
        """
        place, counts, shape = self._placed(indices)
        x = np.zeros(shape.numel(), np.uint8)
        x[place] = counts
        return torch.from_numpy(x).view(shape), *self._about(indices)

    def sparse(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `(x, y, lengths)` like `dense`, but x is a coalesced sparse COO tensor, made without frames."""
        place, counts, shape = self._placed(indices)
        order = np.argsort(place, kind="stable")
        cells = torch.from_numpy(np.stack(np.unravel_index(place[order], shape)))
        values = torch.from_numpy(counts[order])
        x = torch.sparse_coo_tensor(cells, values, shape, is_coalesced=True, check_invariants=False)
        return x, *self._about(indices)

    def _about(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = np.asarray(indices, dtype=np.int64)
        return self.targets[chosen], self.lengths[chosen]

    def _placed(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray, torch.Size]:
        """Returns the places of occupied cells in the flattened batch [T, B, *sample_shape], their counts, and the
        batch's shape."""
        chosen = np.asarray(indices, dtype=np.int64)
        features = int(np.prod(self.sample_shape))
        batch, steps = len(chosen), int(self.lengths[chosen].max())
        sizes = self._sizes[chosen]
        # `source` indexes all events of the batch in the flat list, one recording after another.
        run_start = np.cumsum(sizes) - sizes
        source = np.arange(sizes.sum()) + np.repeat(self._starts[chosen] - run_start, sizes)
        cells = self._cells[source]
        # Cell t * features + f of sample b lies at (t * batch + b) * features + f in [T, B, features].
        place = cells + (cells // features).astype(np.int64) * ((batch - 1) * features)
        place += np.repeat(np.arange(batch) * features, sizes)
        counts = np.ones(len(place), np.uint8) if self.binary else self._counts[source]
        return place, counts, torch.Size((steps, batch, *self.sample_shape))

    def subset(self, indices: Sequence[int] | np.ndarray) -> "EventDataset":
        """Returns a data set of the recordings at `indices`, in that order, which shares the events."""
        chosen = np.asarray(indices, dtype=np.int64)
        part = object.__new__(EventDataset)
        part.__dict__.update(self.__dict__)
        part.targets, part.lengths = self.targets[chosen], self.lengths[chosen]
        part._starts, part._sizes = self._starts[chosen], self._sizes[chosen]
        return part


class EventBatch(Sequence[Any]):
    """A batch that a DataLoader fetches. `collate` makes it dense in one scatter; for other collate functions it is a
    sequence of `(x, y)` items."""

    def __init__(self, dataset: EventDataset, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> tuple[Tensor, int]:  # an int; slices are not supported
        return self.dataset[self.indices[index]]


def collate(items: Sequence[tuple[Any, int]], sparse: bool = False) -> Collated:
    """Collates recordings to a batch, time first.

    items: `(x, y)` pairs, x `[T_i, ...]` (tensor or array, the same `...` for all), y a class index.
    sparse: whether x is a sparse COO tensor. For this package's data sets it is made without frames.
    Returns `(x [T, B, ...], y [B])` if all recordings have the same length, otherwise
    `(x [T, B, ...], y [B], lengths [B])`, where x is zero beyond a recording's length. x keeps its type (uint8 for this
    package's data sets), y and lengths are int64.
    Raises UsageError for an empty batch and for recordings whose time steps differ in shape.
    """
    if len(items) == 0:
        raise UsageError("collate got an empty batch; give it at least one (x, y) item")
    if isinstance(items, EventBatch):
        x, y, lengths = (items.dataset.sparse if sparse else items.dataset.dense)(items.indices)
    else:
        x, y, lengths = _pad([torch.as_tensor(item[0]) for item in items], [item[1] for item in items])
        x = x.to_sparse() if sparse else x
    return (x, y) if bool((lengths == len(x)).all()) else (x, y, lengths)


def _pad(recordings: list[Tensor], labels: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    shapes = sorted({tuple(recording.shape[1:]) for recording in recordings})
    if len(shapes) > 1:
        raise UsageError(f"one batch holds time steps of shapes {shapes}; collate recordings of one sensor only")
    lengths = torch.tensor([len(recording) for recording in recordings])
    x = torch.zeros(int(lengths.max()), len(recordings), *shapes[0], dtype=recordings[0].dtype)
    for sample, recording in enumerate(recordings):
        x[: len(recording), sample] = recording
    return x, torch.stack([torch.as_tensor(label) for label in labels]), lengths


def loader(
    dataset: Dataset[Any],
    batch_size: int = 64,
    shuffle: bool = False,
    seed: int = 0,
    drop_last: bool = False,
    num_workers: int = 0,
    sparse: bool = False,
    pin_memory: bool | None = None,
) -> DataLoader[Any]:
    """Returns a DataLoader of time-first batches (see `collate`), in the same order for the same `seed`.

    With `shuffle=True` every epoch has another order. num_workers: number of processes that fetch batches ahead.
    sparse: whether batches are sparse tensors. pin_memory: whether batches are in pinned memory, which a GPU reads
    while it computes; None: only if there is a GPU and batches are dense.
    """
    if pin_memory is None:
        pin_memory = torch.cuda.is_available() and not sparse
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=partial(collate, sparse=sparse),
        generator=torch.Generator().manual_seed(seed),
    )
