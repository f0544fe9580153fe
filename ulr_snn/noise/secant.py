"""Secants of the firing probability, which give credit for finite changes of the membranes.

A neuron with standardised drive x = (u - threshold) / scale fires with p = F(x). The derivative p' = F'(x) is the
effect of an infinitesimal change of the membrane. If the scale is small, p' is nearly zero almost everywhere. But the
changes that training makes are not infinitesimal: to fire or not, a membrane has to cross its distance |x| to the
threshold. So credit uses the mean of the secants of F over K measured distances δ:

    k(x) = 1/K sum_δ [F(x + δ) - F(x - δ)] / 2δ

A secant is the least-squares linear response to changes ±δ: k = argmin E[(F(x + Δ) - F(x) - k Δ)²] for Δ = ±δ with
equal probability. It is exact for the difference between the two changes, and it is the mean of F' over [x - δ, x + δ].
For δ -> 0 it is p'. Credit is exact for a network whose firing is linear in its membranes over these distances.

The distance that a membrane has to cross differs between neurons and samples, and its order of magnitude is unknown. So
the K distances sample a log-uniform distribution: they are the middles of K equal parts of a logarithmic scale. The
scale begins at the scale of the noise, below which F is straight and every secant is p'. It ends at the farthest
membrane of the layer's last step, or, before the first step, of deterministic firing. No secant reaches that far.
So a layer that has all membranes there, such as a silent one at rest, would get no credit and never fire again. If no
membrane is within the largest of the distances, that becomes the distance of the farthest. The distances do not depend
on the draws of the current step, so that credit from independent copies keeps the unbiased estimators unbiased. The
first step needs secants, too, since an optimizer that divides by past gradients remembers it for long.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ulr_snn.kernels.layout import channels_last, stored


def secant(probability: Callable[[Tensor], Tensor], x: Tensor, distances: Tensor) -> Tensor:
    """Returns the mean slope k(x) of the secants over these distances [K], in the shape of x."""
    found = torch.zeros_like(x)
    for distance in distances.to(x.dtype).unbind():
        found += (probability(x + distance) - probability(x - distance)) / (2 * distance)
    return found / len(distances)


def farthest(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the largest -x and the largest x, [2]. mask: 0 on entries to leave out."""
    x = x.detach()
    if mask is not None:
        out = ~mask.bool()
        return torch.stack([-x.masked_fill(out, torch.inf).min(), x.masked_fill(out, -torch.inf).max()])
    low, high = stored(x, channels_last(x)).aminmax()  # which copies what is not contiguous
    return torch.stack([-low, high])


def distances(found: Tensor, count: int) -> Tensor:
    """Returns [count] standardised distances: the middles of equal parts of the logarithmic scale from 1, the scale of
    the noise, to the farthest membrane, or to beyond it if the nearest is farther than all of them. found: `farthest`
    of the layer, standardised."""
    if found.device.type == "cpu":  # plain numbers take a third of the time
        low, high = sorted(found.tolist())
        end, last = max(high, 1.0), (count - 0.5) / count
        power = 1 / (count - 0.5) if -low > end**last else 1 / count
        return torch.tensor([end ** ((k + 0.5) * power) for k in range(count)], dtype=found.dtype)
    middles = (torch.arange(count, device=found.device, dtype=found.dtype) + 0.5) / count
    end, nearest = found.max().clamp(min=1.0), -found.min()
    return torch.where(nearest > end ** middles[-1], end ** (middles / middles[-1]), end**middles)
