"""Global credit: the loss minus a baseline, the same for every spike (the paper's estimator)."""

import torch
from torch import Tensor

from ulr_snn.kernels import ranks


def baseline(losses: Tensor, copies: list[int], group: int, moving: Tensor | None) -> Tensor:
    """Returns baselines [copies, B, ...] for losses [K, B, ...], independent of the copies' own draws. The baseline is
    the mean loss of the sample's copies in other groups (leave-one-out, or leave-group-out where copies of a group
    depend on each other). With a single group it is the moving mean."""
    count = len(losses)
    if count <= group:
        own = losses[: len(copies)]
        return torch.zeros_like(own) if moving is None else moving.expand_as(own)
    groups = losses.unflatten(0, (-1, group)).sum(1)  # [K / group, B, ...]
    others = (losses.sum(0) - groups) / (count - group)
    return others[torch.tensor(copies, device=losses.device) // group]


def moving(mean: Tensor | None, losses: Tensor) -> Tensor:
    """Returns the exponential moving average of the losses after one more step."""
    now = ranks.mean(losses)
    return now if mean is None else mean.to(now.dtype).lerp(now, 0.05)


def to_go(losses: Tensor) -> Tensor:
    """Returns the reward-to-go [..., T]: the sum of a loss's summands by time step from each step on."""
    return losses.flip(-1).cumsum(-1).flip(-1)


def multi_sample_weights(losses: Tensor) -> Tensor:
    """Returns K ∂/∂L_k of the multi-sample bound -log mean exp(-L_k) for losses [K, B] (GEM-SNN, arXiv 2102.03280)."""
    return len(losses) * torch.softmax(-losses, 0)


def multi_sample_signals(losses: Tensor) -> Tensor:
    """Returns the weights of K copies' scores in the gradient of the multi-sample bound, [K, B] (VIMCO, arXiv
    1602.06725): K times the bound, minus K times the bound with the copy's loss replaced by the mean of the others."""
    count = len(losses)
    bound = -torch.logsumexp(-losses, 0)
    others = (losses.sum(0) - losses) / max(1, count - 1)
    own = torch.eye(count, dtype=torch.bool, device=losses.device)[..., None]
    replaced = torch.where(own, others[:, None], losses[None])  # [K, K, B]
    return count * (bound + torch.logsumexp(-replaced, 1))
