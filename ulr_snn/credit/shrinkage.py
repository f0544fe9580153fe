"""λ of each parameter between feedback (0) and the unbiased estimator (1), from measured variance and bias.

The unbiased gradient is that of the prediction a plus that of the scores, g = g_a + g_s, where the mean of g_s is what
g_a lacks. g_a + λ g_s has the mean square error (1 - λ)² |E g_s|² + λ² trace(cov g_s), which is smallest for

    λ = |E g_s|² / E |g_s|²

The square of the mean is a running mean of products of g_s with that of the step before: their noise is independent.
"""

from typing import Any

import torch
from torch import Tensor

WINDOW = 64  # steps that the running means reach back


class Shrinkage:
    """λ by parameter name. products, powers: running means; last: g_s of the step before."""

    def __init__(self) -> None:
        self.products: dict[str, float] = {}
        self.powers: dict[str, float] = {}
        self.last: dict[str, Tensor] = {}

    def factor(self, name: str) -> float:
        """λ as it is now; 0 before two steps have been seen."""
        power = self.powers.get(name, 0.0)
        return min(1.0, max(0.0, self.products.get(name, 0.0) / power)) if power > 0 else 0.0

    def see(self, name: str, scores: Tensor) -> None:
        """Takes g_s of a step. After use: λ must not depend on the noise that it weighs."""
        before = self.last.get(name)
        if before is not None:
            product, power = float((scores * before).sum()), float(scores.square().sum())
            known = name in self.powers
            self.products[name] = moved(self.products[name], product) if known else product
            self.powers[name] = moved(self.powers[name], power) if known else power
        self.last[name] = scores.detach().clone()

    def state_dict(self) -> dict[str, Any]:
        last = {name: g.clone() for name, g in self.last.items()}
        return {"products": dict(self.products), "powers": dict(self.powers), "last": last}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.products, self.powers = dict(state["products"]), dict(state["powers"])
        self.last = {name: g.to(device) for name, g in state["last"].items()}


def moved(mean: float, value: float) -> float:
    return mean + (value - mean) / WINDOW
