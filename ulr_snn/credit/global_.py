"""Global credit: the loss less a baseline, for every spike alike (the paper's estimator)."""

import torch
from torch import Tensor


def baseline(losses: Tensor, copies: list[int], group: int, moving: Tensor | None) -> Tensor:
    """b [copies, B], independent of the copies' own draws: the mean loss of the sample's copies in other groups
    (leave-one-out, or leave-pair-out for antithetic pairs); with a single group the moving mean."""
    count = len(losses)
    if count <= group:
        return torch.zeros_like(losses[:1]) if moving is None else moving.expand(len(copies), losses.shape[1])
    groups = losses.unflatten(0, (-1, group)).sum(1)  # [K / group, B]
    others = (losses.sum(0) - groups) / (count - group)
    return others[torch.tensor(copies, device=losses.device) // group]
