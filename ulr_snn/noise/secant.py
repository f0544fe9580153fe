"""Credit for finite changes: secants of the firing probability over the distances that its membranes have to go.

A neuron with standardised drive x = (u - threshold) / scale fires with p = F(x). Its derivative p' = F'(x) says what an
infinitesimal change of the membrane does. Where the scale is small it is nearly zero almost everywhere, although what
training does to membranes is not small: to fire or not, a membrane has to cross its distance |x| to the threshold.
So credit takes the mean over K measured distances δ of the secants of F:

    k(x) = 1/K sum_δ [F(x + δ) - F(x - δ)] / 2δ

A secant is the least-squares linear response to changes ±δ: k = argmin E[(F(x + Δ) - F(x) - k Δ)²] for Δ = ±δ with
equal probability. It is exact for the difference between the two, and it is the mean of F' over [x - δ, x + δ]. With
δ -> 0 it is p'. For a network whose firing is linear in its membranes over these distances, all of it is exact.

Which distance a membrane has to go differs from neuron to neuron and from sample to sample, and nothing is known of its
order of magnitude. So the K distances stand for one that is uniform on a logarithmic scale: the middles of K equal
parts of it, from the scale of the noise, below which F is straight and every secant p', to the farthest membrane that
the layer's last step has found, or, before the first, deterministic firing. These are no draws of the step that credit
is taken in, so that credit from independent copies keeps the unbiased estimators unbiased. The first step needs
secants, too: an optimizer that divides by past gradients remembers it for long.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def secant(probability: Callable[[Tensor], Tensor], x: Tensor, distances: Tensor) -> Tensor:
    """Mean slope k(x) of the secants over these distances [K], in the shape of x."""
    found = torch.zeros_like(x)
    for distance in distances.to(x.dtype).unbind():
        found += (probability(x + distance) - probability(x - distance)) / (2 * distance)
    return found / len(distances)


def farthest(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Largest |x|, a number; mask: 0 on what is left out."""
    low, high = (x if mask is None else x * mask).detach().aminmax()
    return torch.maximum(-low, high)


def between(end: Tensor, count: int) -> Tensor:
    """[count] standardised distances, the middles of equal parts of the logarithmic scale from 1, the scale of the
    noise, to the end, which is at least 1."""
    middles = (torch.arange(count, device=end.device, dtype=end.dtype) + 0.5) / count
    return end.clamp(min=1.0) ** middles
