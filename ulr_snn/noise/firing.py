"""Distributions of the threshold noise, which makes firing stochastic."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ulr_snn.errors.arguments import Natural, Positive, check_fields


@dataclass(frozen=True)
class Firing:
    """Distribution of the threshold noise: a neuron with drive d = u - threshold fires with p = F(d / scale).

    scale: constant scale, in units of the membrane, > 0. None: the scale is calibrated and annealed, see `NoiseLevel`.
    start: factor of the starting scale, which follows from the spread of the layer's membranes, > 0.
    end: scale at the end of training and in stochastic evaluation, in units of each neuron's threshold, > 0.
    secants: number of measured distances over which credit uses secants of F instead of its derivative (see
        `secant`). 0: credit uses the derivative.
    """

    scale: Positive | None = None
    start: Positive = 0.05
    end: Positive = 0.05
    secants: Natural = 4

    def __post_init__(self) -> None:
        check_fields(self)

    def probability(self, x: Tensor) -> Tensor:
        """Returns p = F(x), where x = drive / scale is the standardised drive."""
        raise NotImplementedError

    def slope(self, x: Tensor) -> Tensor:
        """Returns p' = ∂p/∂x = f(x)."""
        raise NotImplementedError

    def score(self, spikes: Tensor, x: Tensor) -> Tensor:
        """Returns δ = ∂ log P(spikes) / ∂x = (s - p) p' / (p (1 - p))."""
        raise NotImplementedError


@dataclass(frozen=True)
class Logistic(Firing):
    """Logistic threshold noise: p = sigmoid(x), δ = s - p."""

    def probability(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def slope(self, x: Tensor) -> Tensor:
        p = torch.sigmoid(x)
        return p * (1 - p)

    def score(self, spikes: Tensor, x: Tensor) -> Tensor:
        return spikes - torch.sigmoid(x)


@dataclass(frozen=True)
class Gaussian(Firing):
    """Gaussian threshold noise with standard deviation `scale`: p = Phi(x)."""

    def probability(self, x: Tensor) -> Tensor:
        return torch.special.ndtr(x)

    def slope(self, x: Tensor) -> Tensor:
        return torch.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)

    def score(self, spikes: Tensor, x: Tensor) -> Tensor:
        # (s - p) p' / (p (1 - p)) is 0/0 where p saturates. The log-CDF keeps the ratio finite.
        sign = 2 * spikes - 1
        log_ratio = -0.5 * x**2 - 0.5 * math.log(2 * math.pi) - torch.special.log_ndtr(sign * x)
        return sign * torch.exp(log_ratio)


def law_of(firing: Firing) -> str | None:
    """Returns the name of the law for the fused scans; None if they do not support it. Subclasses have no name, since
    they may have another probability."""
    return {Logistic: "logistic", Gaussian: "gaussian"}.get(type(firing))
