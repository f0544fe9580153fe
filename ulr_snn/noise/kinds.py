"""Noise on input currents, on weights and on outputs."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ulr_snn.errors.arguments import Flag, Positive, check_fields, whole


@dataclass(frozen=True)
class CurrentNoise:
    """Gaussian noise on a module's input current J, drawn at every time step. It is for unknown modules.

    The module sees J + scale z, and the score with respect to J is z / scale (arXiv 2305.08960).

    scale: constant scale, in units of the current, > 0. None: the scale falls geometrically over the training from
    `start` to `end`, in units of the standard deviation of the layer's current in the first batch.
    """

    scale: Positive | None = None
    start: Positive = 0.5
    end: Positive = 0.1

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class WeightNoise:
    """Gaussian noise on a parameter W, for parameters that no gradient of another site reaches.

    A copy runs with W + scale ζ, one ζ for all samples and time steps, and the score with respect to W is ζ / scale.

    scale: constant scale, in units of the parameter, > 0. None: `relative` times the parameter's current root mean
    square, or `relative` if that is zero. per_sample: every sample of a batch has its own noise, made by random signs,
    so that its own loss is the signal and the variance is much lower. It is for weights and biases of linear and
    convolutional modules.
    """

    scale: Positive | None = None
    relative: Positive = 0.1
    per_sample: Flag = False

    def __post_init__(self) -> None:
        check_fields(self)

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Draws ζ for a parameter of this shape, in double precision."""
        return torch.randn(shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class OutputNoise:
    """Gaussian noise on the model's outputs o, for losses that have no gradient.

    The loss becomes the mean of L(o + scale z), whose derivative with respect to o is the mean of L z / scale. A draw
    needs no forward pass, only another evaluation of the loss. Every time step of the outputs has its own noise.

    scale: constant scale, in units of the outputs of a time step, > 0. None: the noise of the outputs' sum over time
    has `relative` times the standard deviation of that sum over samples and classes. draws: number of draws for each
    sample and copy, in pairs z, -z.
    """

    scale: Positive | None = None
    relative: Positive = 0.5
    draws: Annotated[int, whole(2, "an even whole number, at least 2", multiple=2)] = 64

    def __post_init__(self) -> None:
        check_fields(self)
