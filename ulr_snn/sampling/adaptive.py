"""How many copies a step takes: a number, or as many as the measured variance of its gradient asks for.

The copies of a step, in G groups that are independent of each other, give two halves a and b of its gradient g = a + b,
the batch being what it is. With baselines from the other groups (leave-one-out),

    4 E[a · b] = |E g|² (1 + 1 / (G - 1)²)
    trace(cov g) = E|a - b|² + |E g|² / (G - 1)²

and from running means of both follows at how many groups trace(cov g) is `variance` times |E g|². The number holds for
the steps that come after, so that it does not depend on the noise that it weighs: the gradient stays unbiased. (The
norm test of adaptive sampling, Byrd, Chin, Nocedal, Wu 2012, with copies for samples.)
"""

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

EVERY = 8  # steps between two measurements, once there are so many
WINDOW = 16  # measurements that the running means reach back


@dataclass
class FixedCopies:
    """The same number of copies in every step; None: the default of the credit."""

    number: int | None

    def due(self, step: int) -> bool:
        """Whether a step's gradient is to be measured."""
        return False

    def copies(self, site: str | None = None, default: int = 1) -> int:
        """Of the next step."""
        return self.number or default

    def see(self, site: str | None, halves: list[tuple[Tensor, Tensor]], copies: int) -> None:
        """Takes what the two halves of a step's copies give, parameter by parameter."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is kept."""


@dataclass
class CopyBudget:
    """As many copies as the measured variance asks for, see `Adaptive`.

    What has been measured is kept by site (layer by layer) or, of all together, by None. variances: trace(cov) of one
    group; powers: squares of the mean's norm; both running means over so many measurements.
    """

    variance: float
    least: int
    most: int
    group: int  # copies that are not independent of each other
    variances: dict[str | None, float] = field(default_factory=dict)
    powers: dict[str | None, float] = field(default_factory=dict)
    measured: dict[str | None, int] = field(default_factory=dict)

    def due(self, step: int) -> bool:
        """Whether step (0, 1, ...) is one that measures."""
        return step < EVERY or step % EVERY == 0

    def copies(self, site: str | None = None, default: int = 1) -> int:
        """Of the next step; of one site, where each has copies of its own."""
        if site not in self.measured:
            return self.least
        variance, power = self.variances[site], self.powers[site]
        if power * self.variance * self.most <= variance * self.group:  # also where no mean is seen in the noise
            return self.most
        halves = math.ceil(variance / (power * self.variance) / 2)  # groups in each
        return min(self.most, max(self.least, 2 * halves * self.group))

    def see(self, site: str | None, halves: list[tuple[Tensor, Tensor]], copies: int) -> None:
        """Takes what the two halves of a step's copies give, parameter by parameter."""
        groups = copies // self.group
        noise = sum(float((a - b).square().sum()) for a, b in halves)
        product = sum(float((a * b).sum()) for a, b in halves)
        coupled = 1 / (groups - 1) ** 2  # by baselines
        power = 4 * product / (1 + coupled)
        found = {"variances": groups * (noise + coupled * power), "powers": power}
        count = self.measured[site] = self.measured.get(site, 0) + 1
        for name, value in found.items():
            means = getattr(self, name)
            means[site] = means.get(site, 0.0) + (value - means.get(site, 0.0)) / min(count, WINDOW)

    def state_dict(self) -> dict[str, Any]:
        return {name: dict(getattr(self, name)) for name in ("variances", "powers", "measured")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, values in state.items():
            setattr(self, name, dict(values))
