"""Noise elsewhere than on firing: on input currents, on weights, on outputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ulr_snn.errors import UsageError


@dataclass(frozen=True)
class CurrentNoise:
    """Gaussian noise on a module's input current J, drawn anew at every time step: the module sees J + scale z, and the
    score with respect to J is z / scale (arXiv 2305.08960). For modules whose inside is not known.

    scale: constant, in units of the current, > 0. None: from `start` to `end`, in units of the standard deviation of
    the layer's current in the first batch, geometrically over the training.
    """

    scale: float | None = None
    start: float = 0.5
    end: float = 0.1

    def __post_init__(self) -> None:
        check_positive(self, "scale", "start", "end")


@dataclass(frozen=True)
class WeightNoise:
    """Gaussian noise on a parameter W, one draw a copy, for all its samples and time steps: a copy runs with
    W + scale ζ, and the score with respect to W is ζ / scale. For parameters that no other site's gradient reaches.

    scale: constant, in units of the parameter, > 0. None: `relative` times the parameter's root mean square as it is
    now, or `relative` itself where that is zero. per_sample: every sample of a
    batch has noise of its own, by signs, so that its own loss tells about it, with much less variance; for weights and
    biases of linear and convolutional modules.
    """

    scale: float | None = None
    relative: float = 0.1
    per_sample: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "scale", "relative")

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """ζ for a parameter of this shape, in double precision."""
        return torch.randn(shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class OutputNoise:
    """Gaussian noise on the model's outputs o, for losses that have no gradient: the loss becomes the mean of
    L(o + scale z), whose derivative with respect to o is the mean of L z / scale. Draws need no forward pass, since
    only the loss is computed anew; of outputs over time, every step has noise of its own.

    scale: constant, in units of the outputs of a time step, > 0. None: `relative` times the standard deviation, over
    samples and classes, of the outputs' sum over time, for the noise of that sum. draws: of each sample and copy, in
    pairs z, -z.
    """

    scale: float | None = None
    relative: float = 0.5
    draws: int = 64

    def __post_init__(self) -> None:
        check_positive(self, "scale", "relative")
        if not (isinstance(self.draws, int) and self.draws >= 2 and self.draws % 2 == 0):
            raise UsageError(f"OutputNoise got draws={self.draws!r}; it must be an even whole number, at least 2")


def check_positive(owner: object, *names: str) -> None:
    """Raises UsageError unless each of these attributes is None or positive."""
    for name in names:
        value = getattr(owner, name)
        if value is not None and not value > 0:
            raise UsageError(f"{type(owner).__name__} got {name}={value}; it must be positive")
