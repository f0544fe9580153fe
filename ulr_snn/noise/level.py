"""The level of the noise at every site as training goes on."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ulr_snn.noise.firing import Firing
from ulr_snn.noise.kinds import CurrentNoise
from ulr_snn.noise.secant import between

LEVELS = (0.07, 3.0)  # bounds of a calibrated starting scale, in units of the threshold
WIDENING = 0.1  # of the training: while the learning rate warms up, layers may leave the regime that was measured
FLOOR, TINY = 0.01, 1e-6  # of the membranes' spread, that a threshold counts as at least; where that is not known
WIDENED = 1.0  # up to here the starting scale follows them then


@dataclass
class NoiseLevel:
    """The scale of the noise at every site as training goes on.

    Wide noise lets silent neurons fire and find credit; narrow noise makes the stochastic net the deterministic
    one. So the scale falls geometrically to `end` times the threshold. It begins at `start * d * max(1, d)` times the
    threshold, but at 0.07 to 3 times, with d the standard deviation of the layer's membranes in the first batch, under
    deterministic firing, over the threshold: where d is large, few neurons are near the threshold, and narrow noise
    reaches only these. Where the outputs are spikes, no readout learns by an exact gradient, and layers that begin with
    the narrowest noise, since their membranes hardly leave rest yet, are thrown far from the threshold by the first
    steps and would stay there for good: there `widen` lets the start follow d upwards, to 1 threshold at most, during
    the first tenth of the training.
    progress: from 0, first step, to 1, the end of training. currents: noise of the sites on input currents. starts: by
    site, the calibrated scale over the threshold, of input currents their standard deviation. resting: sites that began
    with the narrowest noise. idle: sites that did not run when the others were measured. quiet: sites that get
    none. floors: by site, what a threshold counts at least as. farthest: by site, the largest distance of a membrane to
    the threshold that the last step found.
    """

    firing: Firing
    progress: float = 1.0
    currents: dict[str, CurrentNoise] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)
    resting: set[str] = field(default_factory=set)
    idle: set[str] = field(default_factory=set)
    quiet: set[str] = field(default_factory=set)
    floors: dict[str, float] = field(default_factory=dict)
    farthest: dict[str, Tensor] = field(default_factory=dict)

    def over(self, site: str, scale: Tensor) -> Tensor | None:
        """Standardised distances [K] for the secants of a site with noise of this scale; None: its derivative."""
        found = self.farthest.get(site) if self.firing.secants else None
        return None if found is None else between(found / scale.detach().mean(), self.firing.secants)

    def see(self, passes: Iterable[list[Any]]) -> None:
        """Measures how far from their threshold membranes are, for the secants of the next step. passes: records of
        each pass of a step."""
        found: dict[str, Tensor] = {}
        for r in [r for records in passes for r in records if r.site not in self.currents]:
            here = r.farthest
            found[r.site] = torch.maximum(found.get(r.site, here), here)
        self.take(found)

    def take(self, found: dict[str, Tensor]) -> None:
        """Such distances by site, where they have been measured."""
        if self.firing.secants:
            self.farthest |= {site: distance for site, distance in found.items() if distance.isfinite()}

    def knows(self, site: str) -> bool:
        """Whether the scale of this site does not depend any more on the spread of what it is measured by."""
        if site in self.starts or site in self.idle:
            return True
        if site in self.currents:
            return self.currents[site].scale is not None
        return self.firing.scale is not None or self.progress >= 1

    def _start(self, d: float, most: float) -> float:
        return min(max(self.firing.start * d * max(1.0, d), LEVELS[0]), most)

    def widen(self, site: str, threshold: Tensor, spread: Callable[[], float]) -> None:
        """Lets the starting scale of a layer that began at rest follow the spread of its membranes, while it may."""
        if site in self.resting and self.progress <= WIDENING and self.starts[site] < WIDENED:
            d = spread() / self.unit(site, threshold).detach().mean().item()
            self.starts[site] = max(self.starts[site], self._start(d, WIDENED))

    def current_scale(self, site: str, spread: Callable[[], float]) -> float:
        """Scale of the noise on an input current. spread() is called where the site is not known yet."""
        noise = self.currents[site]
        if noise.scale is not None:
            return noise.scale
        if site not in self.starts:
            self.starts[site] = spread() or 1.0
        return self.starts[site] * noise.start ** (1 - self.progress) * noise.end**self.progress

    def unit(self, site: str, threshold: Tensor) -> Tensor:
        """What the scale counts in: the threshold, or a part of what the membranes spread by where it is less."""
        threshold = threshold if threshold.is_floating_point() else threshold.to(torch.get_default_dtype())
        return threshold.abs().clamp(min=self.floors.get(site, TINY))

    def scale(self, site: str, threshold: Tensor, spread: Callable[[], float]) -> Tensor:
        """Scale of neurons with this threshold, differentiable in a learned one. spread() is called where the site is
        not known yet."""
        firing = self.firing
        if firing.scale is not None:
            return torch.full_like(self.unit(site, threshold), firing.scale)
        if self.progress >= 1:
            return firing.end * self.unit(site, threshold)
        if site not in self.starts:
            found = spread()
            self.floors[site] = FLOOR * found if 0 < found < math.inf else TINY
            self.starts[site] = self._start(found / self.unit(site, threshold).detach().mean().item(), LEVELS[1])
            if self.starts[site] == LEVELS[0]:
                self.resting.add(site)
        return self.starts[site] ** (1 - self.progress) * firing.end**self.progress * self.unit(site, threshold)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "noise_starts": dict(self.starts),
            "noise_resting": sorted(self.resting),
            "noise_floors": dict(self.floors),
            "quiet": sorted(self.quiet),
            "farthest": dict(self.farthest),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.starts, self.resting = dict(state["noise_starts"]), set(state["noise_resting"])
        self.floors, self.quiet = dict(state.get("noise_floors", {})), set(state.get("quiet", ()))
        self.farthest = {site: distance.to(device) for site, distance in state.get("farthest", {}).items()}
