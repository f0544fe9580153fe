"""Stratified splits that are the same on every machine."""

from typing import Annotated

import numpy as np

from ulr_snn.data.events import EventDataset
from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import Count, Fraction, Whole, checked, where

Recordings = Annotated[EventDataset, where("a data set of data.load", lambda value: isinstance(value, EventDataset))]


def stratified(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns ascending indices `(rest, held_out)` of `labels` [n], with about `fraction` of every class held out.

    The order comes from raw bits of PCG64, a stream that never changes. The shuffles of NumPy, torch and scikit-learn
    may change between their versions.
    """
    draws = np.random.PCG64(seed % 2**64).random_raw(len(labels))
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(draws[members], kind="stable")]
        held_out[members[: int(fraction * len(members) + 0.5)]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


@checked
def split(dataset: Recordings, fraction: Fraction, seed: Whole = 0) -> tuple[EventDataset, EventDataset]:
    """Returns two data sets `(rest, held_out)`, with about `fraction` of every class in the second.

    The same seed gives the same split. Both data sets share the events of `dataset` and keep its order. The second is
    not augmented.
    Raises UsageError if either part would be empty.
    """
    rest, held_out = stratified(dataset.targets.numpy(), fraction, seed)
    if len(rest) == 0 or len(held_out) == 0:
        raise UsageError(
            f"fraction={fraction!r} of {len(dataset)} recordings leaves one side of the split empty; "
            "give a fraction between 0 and 1 that takes a recording of some class and leaves others"
        )
    return dataset.subset(rest), dataset.subset(held_out).plain()


@checked
def balanced(dataset: Recordings, per_class: Count, seed: Whole = 0) -> EventDataset:
    """Returns a data set of `per_class` recordings of every class, in the order of `dataset`, whose events it shares.

    The same seed gives the same recordings. Raises UsageError if a class has fewer.
    """
    labels = dataset.targets.numpy()
    sizes = np.bincount(labels, minlength=dataset.classes)
    if per_class > sizes.min():
        raise UsageError(
            f"per_class={per_class!r} recordings of every class are not there; give an integer from 1 to the size of "
            f"the smallest class, {sizes.min()}"
        )
    draws = np.random.PCG64(seed % 2**64).random_raw(len(labels))
    order = np.lexsort((draws, labels))
    starts = np.cumsum(sizes) - sizes
    return dataset.subset(np.sort(np.concatenate([order[start : start + per_class] for start in starts])))
