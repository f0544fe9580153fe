"""Stratified splits that are the same everywhere."""

import numpy as np

from ulr_snn.data.events import EventDataset
from ulr_snn.errors import UsageError


def stratified(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ascending indices `(rest, held_out)` of `labels` [n]: about `fraction` of every class is held out.

    The order comes from raw bits of PCG64, whose stream is fixed for good; that of NumPy's, torch's and
    scikit-learn's shuffles may change with their versions.
    """
    draws = np.random.PCG64(seed).random_raw(len(labels))
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(draws[members], kind="stable")]
        held_out[members[: int(fraction * len(members) + 0.5)]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def split(dataset: EventDataset, fraction: float, seed: int = 0) -> tuple[EventDataset, EventDataset]:
    """`(rest, held_out)`: two data sets with about `fraction` of every class in the second.

    The same seed gives the same split. Both share the events of `dataset`, its order and its quick batches.
    Raises UsageError where either part would be empty.
    """
    rest, held_out = stratified(dataset.targets.numpy(), fraction, seed) if 0 < fraction < 1 else ([], [])
    if len(rest) == 0 or len(held_out) == 0:
        raise UsageError(
            f"fraction={fraction!r} of {len(dataset)} recordings leaves one side of the split empty; "
            "give a fraction between 0 and 1 that takes a recording of some class and leaves others."
        )
    return dataset.subset(rest), dataset.subset(held_out)
