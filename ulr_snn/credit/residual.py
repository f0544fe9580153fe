"""Residual credit: predictions from independent copies as a control variate of the unbiased estimator."""

import torch

from ulr_snn.credit.base import Credit
from ulr_snn.model.passes import Pass


def from_other_copies(predictions: list[list[Credit]], passes: list[Pass], group: int) -> list[list[Credit]]:
    """Replaces each copy's prediction a by the mean prediction of the sample's copies in other groups."""
    result: list[list[Credit]] = [[] for _ in passes]
    batch = passes[0].loss.shape[1]
    for column in zip(*predictions, strict=True):  # one site, over passes
        known = [own.a.unflatten(1, (-1, batch)) for own in column if own.a is not None]  # of all copies, or of none
        stacked = None
        if known:
            copies = torch.cat(known, 1)  # [T, K, B, ...]
            sums = copies.unflatten(1, (-1, group)).sum(2, keepdim=True)
            others = (copies.sum(1)[:, None, None] - sums) / (copies.shape[1] - group)
            stacked = others.expand(-1, -1, group, *copies.shape[2:]).flatten(1, 2)
        for p, kept in zip(passes, result, strict=True):
            kept.append(Credit(None if stacked is None else stacked[:, p.copies].flatten(1, 2), None))
    return result
