"""The scale of the noise at every site over the course of training."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ulr_snn.kernels import ranks
from ulr_snn.noise.firing import Firing
from ulr_snn.noise.kinds import CurrentNoise
from ulr_snn.noise.secant import distances

LEVELS = (0.07, 3.0)  # bounds of a calibrated starting scale, in units of the threshold
WIDENING = 0.1  # share of the training in which `widen` acts: the warm-up may move layers far from the first batch
FLOOR, TINY = 0.01, 1e-6  # least unit of a site: FLOOR times the membranes' spread, or TINY if that is unknown
WIDENED = 1.0  # largest starting scale that `widen` sets, in units of the threshold


@dataclass
class NoiseLevel:
    """The scale of the noise at every site over the course of training.

    Wide noise lets silent neurons fire and get credit. Narrow noise makes the stochastic net equal to the deterministic
    one. So the scale falls geometrically to `end` times the threshold. It starts at `start * d * max(1, d)` times the
    threshold, clipped to 0.07 to 3 times. d is the standard deviation of the layer's membranes in the first batch,
    under deterministic firing, in units of the threshold. If d is large, few neurons are near the threshold, and narrow
    noise reaches only these. If the outputs are spikes, no readout learns by an exact gradient. A layer whose membranes
    hardly leave rest then starts with the narrowest noise, and the first steps may throw it far from the threshold for
    good. For such layers `widen` lets the start follow d upwards, to at most 1 threshold, in the first tenth of the
    training.

    progress: from 0, the first step, to 1, the end of training. currents: noise of the sites on input currents. starts:
    by site, the calibrated scale over the threshold; for input currents, their standard deviation. resting: sites that
    started with the narrowest noise. idle: sites that did not run in the calibration. noiseless: sites without noise.
    floors: by site, the least unit of the scale. units: thresholds of sites whose threshold is measured in the first
    batch. farthest: by site, the largest distances of membranes below and above the threshold in the last step, [2].
    """

    firing: Firing
    progress: float = 1.0
    currents: dict[str, CurrentNoise] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)
    resting: set[str] = field(default_factory=set)
    idle: set[str] = field(default_factory=set)
    noiseless: set[str] = field(default_factory=set)
    floors: dict[str, float] = field(default_factory=dict)
    units: dict[str, float] = field(default_factory=dict)
    farthest: dict[str, Tensor] = field(default_factory=dict)

    def secants(self, site: str, scale: Tensor) -> Tensor | None:
        """Returns the standardised distances [K] for the secants of a site with noise of this scale. None: credit uses
        the derivative."""
        found = self.farthest.get(site) if self.firing.secants else None
        return None if found is None else distances(found / scale.detach().mean(), self.firing.secants)

    def measure_distances(self, passes: Iterable[list[Any]]) -> None:
        """Measures how far membranes are from the threshold, for the secants of the next step. passes: records of each
        pass of this step."""
        found: dict[str, Tensor] = {}
        for record in [record for records in passes for record in records if record.site not in self.currents]:
            here, before = record.farthest, found.get(record.site)
            found[record.site] = here if before is None else torch.maximum(before, here)
        self.store_distances(found)

    def store_distances(self, found: dict[str, Tensor]) -> None:
        """Stores the measured distances by site. It ignores distances that are not finite."""
        if self.firing.secants and found:
            largest = ranks.greatest(torch.stack(list(found.values())))
            finite = largest.isfinite().all(1).tolist()
            self.farthest |= {
                site: row for site, row, kept in zip(found, largest.unbind(), finite, strict=True) if kept
            }

    def is_calibrated(self, site: str) -> bool:
        """Returns whether the scale of this site needs no calibration, or has been calibrated."""
        if site in self.starts or site in self.idle:
            return True
        if site in self.currents:
            return self.currents[site].scale is not None
        return self.firing.scale is not None or self.progress >= 1

    def _start(self, d: float, most: float) -> float:
        return min(max(self.firing.start * d * max(1.0, d), LEVELS[0]), most)

    def widen(self, site: str, threshold: Tensor, spread: Callable[[], float]) -> None:
        """Raises the starting scale of a resting layer to fit the spread of its membranes, early in training."""
        if site in self.resting and self.progress <= WIDENING and self.starts[site] < WIDENED:
            d = spread() / self.unit(site, threshold).detach().mean().item()
            self.starts[site] = max(self.starts[site], self._start(d, WIDENED))

    def current_scale(self, site: str, spread: Callable[[], float] | None = None) -> float:
        """Returns the scale of the noise on an input current. spread: calibrates a new site; None if it `knows` it."""
        noise = self.currents[site]
        if noise.scale is not None:
            return noise.scale
        if spread is not None and site not in self.starts:
            self.starts[site] = spread() or 1.0
        return self.starts[site] * noise.start ** (1 - self.progress) * noise.end**self.progress

    def unit(self, site: str, threshold: Tensor) -> Tensor:
        """Returns the unit of the scale: the threshold, or at least a share of the membranes' spread."""
        threshold = threshold if threshold.is_floating_point() else threshold.to(torch.get_default_dtype())
        return threshold.abs().clamp(min=self.floors.get(site, TINY))

    def scale(self, site: str, threshold: Tensor, spread: Callable[[], float] | None = None) -> Tensor:
        """Returns the scale for neurons with this threshold, differentiable in the threshold. spread: calibrates a new
        site; None if this object `knows` it."""
        firing = self.firing
        if firing.scale is not None:
            return torch.full_like(self.unit(site, threshold), firing.scale)
        if self.progress >= 1:
            return firing.end * self.unit(site, threshold)
        if spread is not None and site not in self.starts:
            found = spread()
            self.floors[site] = FLOOR * found if 0 < found < math.inf else TINY
            self.starts[site] = self._start(found / self.unit(site, threshold).detach().mean().item(), LEVELS[1])
            if self.starts[site] == LEVELS[0]:
                self.resting.add(site)
        return self.starts[site] ** (1 - self.progress) * firing.end**self.progress * self.unit(site, threshold)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that a resumed run needs."""
        return {
            "noise_starts": dict(self.starts),
            "noise_resting": sorted(self.resting),
            "noise_floors": dict(self.floors),
            "noise_units": dict(self.units),
            "quiet": sorted(self.noiseless),
            "farthest": dict(self.farthest),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.starts, self.resting = dict(state["noise_starts"]), set(state["noise_resting"])
        self.floors, self.noiseless = dict(state.get("noise_floors", {})), set(state.get("quiet", ()))
        self.units = dict(state.get("noise_units", {}))
        self.farthest = {site: distance.to(device) for site, distance in state.get("farthest", {}).items()}
