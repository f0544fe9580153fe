"""Firing noise: the distribution of the threshold noise, and the counter-based uniforms that draw from it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ulr_snn.errors import UsageError
from ulr_snn.kernels import dispatch
from ulr_snn.kernels.state import Draw
from ulr_snn.noise.secant import between

LEVELS = (0.07, 3.0)  # bounds of a calibrated starting scale, in units of the threshold
WIDENING = 0.1  # of the training: while the learning rate warms up, layers may leave the regime that was measured
FLOOR, TINY = 0.01, 1e-6  # of the membranes' spread, that a threshold counts as at least; where that is not known
WIDENED = 1.0  # up to here the starting scale follows them then


@dataclass(frozen=True)
class Firing:
    """Distribution of the threshold noise: a neuron with drive d = u - threshold fires with p = F(d / scale).

    scale: a constant scale, in units of the membrane, > 0. None: calibrated and annealed, see `NoiseLevel`.
    start: sets the starting scale, from the spread of the layer's membranes, > 0.
    end: the scale at the end of training and in stochastic evaluation, in units of each neuron's threshold, > 0.
    secants: number of measured distances over which credit takes secants of F in place of its derivative (see
        `secant`); 0: the derivative.
    """

    scale: float | None = None
    start: float = 0.05
    end: float = 0.05
    secants: int = 4

    def __post_init__(self) -> None:
        check_positive(self, "scale", "start", "end")
        if not (isinstance(self.secants, int) and self.secants >= 0):
            raise UsageError(f"{type(self).__name__} got secants={self.secants!r}; it is a whole number, at least 0")

    def probability(self, x: Tensor) -> Tensor:
        """p = F(x), where x = drive / scale is the standardised drive."""
        raise NotImplementedError

    def slope(self, x: Tensor) -> Tensor:
        """p' = ∂p/∂x = f(x)."""
        raise NotImplementedError

    def score(self, spikes: Tensor, x: Tensor) -> Tensor:
        """δ = ∂ log P(spikes) / ∂x = (s - p) p' / (p (1 - p))."""
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
        # (s - p) p' / (p (1 - p)) is 0/0 where p saturates: the log-CDF keeps the ratio finite.
        sign = 2 * spikes - 1
        log_ratio = -0.5 * x**2 - 0.5 * math.log(2 * math.pi) - torch.special.log_ndtr(sign * x)
        return sign * torch.exp(log_ratio)


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


# -- counter-based uniforms --------------------------------------------------------------------------------

_GOLDEN = 0x9E3779B9
SOBOL_POINTS = 64
_CHUNK = 1 << 18  # elements hashed at once: a chunk's temporaries stay in cache


def _int32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


_M1, _M2 = _int32(0x7FEB352D), _int32(0x846CA68B)


def _mix(h: Tensor) -> Tensor:
    """A bijective 32-bit mixer (xorshift-multiply, constants of C. Wellons' lowbias32)."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * _M1
    h = (h ^ ((h >> 15) & 0x1FFFF)) * _M2
    return h ^ ((h >> 16) & 0xFFFF)


def _splitmix(*words: int) -> int:
    """64-bit key of a few integers (splitmix64, chained)."""
    state = 0
    for word in words:
        state = (state + (word & 0xFFFFFFFFFFFFFFFF) + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state


@dataclass(frozen=True)
class Noise:
    """Uniforms keyed by seed, step, sample, copy, site, neuron and time: the same numbers in whatever order,
    chunk or process they are made.

    sample: [B] int32, index of each row's sample in the global batch; stream: [B] int32, its independent draw
    (the two copies of an antithetic pair share one); mirrored: [B] bool, rows that see 1 - uniform. point: [B] int64,
    which point of a Sobol set a row is: its bits are those of the stream, exclusive-or those of the point, so that the
    rows of a stream are a randomly shifted net, each by itself as if drawn independently. varied: the only site at
    which streams, mirrors and points differ; at all others every row of a sample sees stream 0.
    """

    seed: int
    step: int
    sample: Tensor
    stream: Tensor
    mirrored: Tensor | None = None
    point: Tensor | None = None
    varied: int | None = None

    def uniform(self, site: int, first_step: int, steps: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Uniforms on (0, 1) with 23 bits, [steps, B, *shape], for times first_step .. first_step + steps - 1; in at
        least single precision, since a lower one cannot hold their bits."""
        dtype = torch.promote_types(dtype, torch.float32)
        if self.at(site) is not self:
            return self.at(site).uniform(site, first_step, steps, shape, dtype)
        device = self.sample.device
        row1, row2 = self.words(site, first_step, steps)
        neurons = math.prod(shape)
        counter = torch.arange(neurons, dtype=torch.int32, device=device) * _int32(_GOLDEN)
        out = torch.empty(steps, len(self.sample), neurons, dtype=dtype, device=device)
        stride = max(1, _CHUNK // max(1, len(self.sample) * neurons)) if device.type == "cpu" else steps
        for t in range(0, steps, stride):
            now = slice(t, t + stride)
            bits = _hash(counter, row1[now, :, None], row2[now, :, None])
            if self.point is not None:
                bits ^= sobol_bits(self.point, range(first_step + t, first_step + t + len(bits)), neurons)
            out[now] = bits
            out[now].add_(0.5).mul_(2.0**-23)
        if self.mirrored is not None:
            rows = self.mirrored.view(1, -1, 1)
            out = torch.where(rows, 1 - out, out)
        return out.view(steps, len(self.sample), *shape)

    def at(self, site: int) -> "Noise":
        """The noise of a site: that which is common to all copies where they differ at another site alone."""
        if self.varied is None or site == self.varied:
            return self
        return Noise(self.seed, self.step, self.sample, torch.zeros_like(self.stream))

    def words(self, site: int, first_step: int, steps: int) -> tuple[Tensor, Tensor]:
        """The two random words of every row at every time, [steps, B] int32, that `_hash` mixes with the neurons."""
        key = _splitmix(self.seed, self.step, site)
        done = dispatch.words(key, self.sample, self.stream, first_step, steps)
        if done is not None:
            return done
        time = torch.arange(first_step, first_step + steps, dtype=torch.int32, device=self.sample.device)[:, None]
        rows = torch.stack([self.sample + _int32(word) for word in (key, key >> 32)])
        row1, row2 = _mix(_mix(_mix(rows) + self.stream)[:, None] + time)
        return row1, row2

    def normal(self, site: int, first_step: int, steps: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Standard normal z of the uniforms, -z in mirrored rows; same shape."""
        return torch.special.ndtri(self.uniform(site, first_step, steps, shape, dtype)).to(dtype)


def sobol_bits(points: Tensor, times: range, neurons: int) -> Tensor:
    """23 bits of these Sobol points [B], [times, B, neurons]: a dimension a neuron and time, as far as there are so
    many; then they begin anew, which the shifts of `Noise` allow."""
    table = _sobol_table().to(points.device)
    dimension = torch.arange(times.start * neurons, times.stop * neurons, device=points.device) % table.shape[1]
    few = table[: int(points.max()) + 1][:, dimension].view(-1, len(times), neurons).transpose(0, 1)
    return few[:, points]


@lru_cache
def _sobol_table() -> Tensor:
    points = torch.quasirandom.SobolEngine(torch.quasirandom.SobolEngine.MAXDIM).draw(SOBOL_POINTS, dtype=torch.float64)
    return (points * (1 << 23)).to(torch.int32)


def _hash(counter: Tensor, row1: Tensor, row2: Tensor) -> Tensor:
    """23 random bits per (row, neuron): the mixer over the neuron's counter, with the row's second word put in
    half-way, so that two rows whose first words collide still differ."""
    h = counter + row1
    h ^= (h >> 16) & 0xFFFF
    h *= _M1
    h += row2
    h ^= (h >> 15) & 0x1FFFF
    h *= _M2
    h ^= (h >> 16) & 0xFFFF
    return (h >> 9) & 0x7FFFFF


class Drawer:
    """Draws the spikes of one layer in one pass, the steps of time in their order.

    scale: of the noise, broadcast against [...]. first: the step of time that the first one here is.
    """

    def __init__(self, noise: Noise, firing: Firing, site: int, steps: int, scale: Tensor, first: int = 0) -> None:
        self.noise, self.firing, self.site, self.steps = noise.at(site), firing, site, steps
        self.scale, self.first = scale, first
        self._start, self._uniforms = 0, None

    def __call__(self, t: int, x: Tensor) -> Tensor:
        """Spikes of standardised drives x [B, ...]."""
        block = max(1, (1 << 20) // max(1, x.numel()))  # steps of noise held at a time
        start = t - t % block
        if self._uniforms is None or start != self._start:
            steps = min(block, self.steps - start)
            self._uniforms = self.noise.uniform(self.site, self.first + start, steps, x.shape[1:], x.dtype)
            self._start = start
        return (self._uniforms[t - start] < self.firing.probability(x)).to(x.dtype)

    def draw(self, words: bool = True) -> Draw | None:
        """What a fused scan draws the same spikes by; None where none knows how. words: else they need not be drawn."""
        law = law_of(self.firing)
        if law is None or self.noise.point is not None:
            return None
        drawn = self.noise.words(self.site, self.first, self.steps) if words else None
        return Draw(law, self.scale, drawn, self.noise.mirrored)


def law_of(firing: Firing) -> str | None:
    """The name of a law that fused scans know; exactly of these classes, since others may have another probability."""
    return {Logistic: "logistic", Gaussian: "gaussian"}.get(type(firing))
