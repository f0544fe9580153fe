"""The number of copies of a step: fixed, or by the measured variance of its gradient.

The copies of a step form G independent groups. Half of the groups give a, the others b, and the gradient is g = a + b.
With leave-one-out baselines from the other groups, and for a given batch,

    4 E[a · b] = |E g|² (1 + 1 / (G - 1)²)
    trace(cov g) = E|a - b|² + |E g|² / (G - 1)²

Running means of both tell for how many groups trace(cov g) is `variance` times |E g|². The number applies to later
steps, so it does not depend on their noise, and the gradient stays unbiased. This is the norm test of adaptive sampling
(Byrd, Chin, Nocedal, Wu 2012), with copies in place of samples.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

EVERY = 8  # steps between two measurements, after as many first steps that all measure


@dataclass
class FixedCopies:
    """A fixed number of copies; None for the default of the credit."""

    number: int | None

    def due(self, step: int) -> bool:
        """True if the step's gradient is to be measured."""
        return False

    def copies(self, site: str | None = None, default: int = 1) -> int:
        """Returns the number of copies of the next step."""
        return self.number or default

    def see(self, site: str | None, halves: list[tuple[Tensor, Tensor]], copies: int) -> None:
        """Takes the gradients by each half of a step's copies, for every parameter."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing, because there is no state."""


@dataclass
class CopyBudget:
    """The number of copies by the measured variance; see `Adaptive`.

    Keys are sites with `LayerByLayer`, else None. variances: trace(cov) of one group; powers: squared norm of the mean
    gradient; measured: number of measurements in these running means; group: copies that depend on each other; window:
    measurements that the running means remember.
    """

    variance: float
    least: int
    most: int
    group: int
    window: int = 16
    variances: dict[str | None, float] = field(default_factory=dict)
    powers: dict[str | None, float] = field(default_factory=dict)
    measured: dict[str | None, int] = field(default_factory=dict)

    def due(self, step: int) -> bool:
        """True if step (0, 1, ...) measures."""
        return step < EVERY or step % EVERY == 0

    def copies(self, site: str | None = None, default: int = 1) -> int:
        """Returns the number of copies of the next step. site: the only site at which the copies differ."""
        if site not in self.measured:
            return self.least
        variance, power = self.variances[site], self.powers[site]
        if power * self.variance * self.most <= variance * self.group:  # also if the mean is lost in the noise
            return self.most
        halves = math.ceil(variance / (power * self.variance) / 2)  # groups in each half
        return min(self.most, max(self.least, 2 * halves * self.group))

    def see(self, site: str | None, halves: list[tuple[Tensor, Tensor]], copies: int) -> None:
        """Takes the gradients by each half of a step's copies, for every parameter."""
        groups = copies // self.group
        noise = sum(float((a - b).square().sum()) for a, b in halves)
        product = sum(float((a * b).sum()) for a, b in halves)
        coupled = 1 / (groups - 1) ** 2  # covariance of the halves, by their baselines
        power = 4 * product / (1 + coupled)
        measurement = {"variances": groups * (noise + coupled * power), "powers": power}
        count = self.measured[site] = self.measured.get(site, 0) + 1
        for name, value in measurement.items():
            means = getattr(self, name)
            means[site] = means.get(site, 0.0) + (value - means.get(site, 0.0)) / min(count, self.window)

    def state_dict(self) -> dict[str, Any]:
        return {name: dict(getattr(self, name)) for name in ("variances", "powers", "measured")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, values in state.items():
            setattr(self, name, dict(values))
