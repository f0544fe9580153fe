"""Counter-based random numbers. The noise does not depend on the order, chunk or process in which it is drawn."""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from ulr_snn.kernels import dispatch
from ulr_snn.kernels.state import Draw
from ulr_snn.noise.firing import Firing, law_of

_GOLDEN = 0x9E3779B9
SOBOL_POINTS = 64
_CHUNK = 1 << 18  # elements hashed at once, so that temporaries stay in the cache


def _int32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


_M1, _M2 = _int32(0x7FEB352D), _int32(0x846CA68B)


def _mix(h: Tensor) -> Tensor:
    """Applies a bijective 32-bit mixer (xorshift-multiply, constants of C. Wellons' lowbias32)."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * _M1
    h = (h ^ ((h >> 15) & 0x1FFFF)) * _M2
    return h ^ ((h >> 16) & 0xFFFF)


def _splitmix(*words: int) -> int:
    """Hashes a few integers to a 64-bit key (splitmix64, chained)."""
    state = 0
    for word in words:
        state = (state + (word & 0xFFFFFFFFFFFFFFFF) + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state


@dataclass(frozen=True)
class Noise:
    """Uniforms keyed by seed, step, sample, copy, site, neuron and time.

    sample: [B] int32, index of each row's sample in the global batch. stream: [B] int32, index of the row's independent
    draw; the two copies of an antithetic pair share a stream. mirrored: [B] bool, rows that see 1 - uniform. point: [B]
    int64, index of the row's point in a Sobol set. A row's bits are the stream's bits XOR the point's bits, so that the
    rows of a stream are a randomly shifted net, and each row alone is uniform. varied: the only site at which streams,
    mirrors and points differ; at all other sites every row of a sample sees stream 0.
    """

    seed: int
    step: int
    sample: Tensor
    stream: Tensor
    mirrored: Tensor | None = None
    point: Tensor | None = None
    varied: int | None = None

    def uniform(self, site: int, first_step: int, steps: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Returns uniforms on (0, 1) with 23 bits, [steps, B, *shape], for times first_step .. first_step + steps - 1.
        They have at least single precision, since a lower precision cannot hold 23 bits."""
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

    @cached_property
    def _rows(self) -> tuple[Any, Any] | None:
        return dispatch.row_words(self.sample, self.stream)

    def at(self, site: int) -> "Noise":
        """Returns the noise of a site. If copies differ only at another site, this noise is common to all copies."""
        if self.varied is None or site == self.varied:
            return self
        return Noise(self.seed, self.step, self.sample, torch.zeros_like(self.stream))

    def words(self, site: int, first_step: int, steps: int) -> tuple[Tensor, Tensor]:
        """Returns two random words for every row at every time, [steps, B] int32, which `_hash` mixes with neurons."""
        key = _splitmix(self.seed, self.step, site)
        if self._rows is not None:
            return dispatch.words(key, self._rows, first_step, steps)
        time = torch.arange(first_step, first_step + steps, dtype=torch.int32, device=self.sample.device)[:, None]
        rows = torch.stack([self.sample + _int32(word) for word in (key, key >> 32)])
        row1, row2 = _mix(_mix(_mix(rows) + self.stream)[:, None] + time)
        return row1, row2

    def normal(self, site: int, first_step: int, steps: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Returns standard normal z, [steps, B, *shape], from the uniforms. Mirrored rows get -z."""
        return torch.special.ndtri(self.uniform(site, first_step, steps, shape, dtype)).to(dtype)


def sobol_bits(points: Tensor, times: range, neurons: int) -> Tensor:
    """Returns 23 bits of these Sobol points [B], [times, B, neurons]. Every neuron and time has its own dimension. The
    dimensions repeat when they run out, which the random shifts of `Noise` allow."""
    table = _sobol_table().to(points.device)
    dimension = torch.arange(times.start * neurons, times.stop * neurons, device=points.device) % table.shape[1]
    few = table[: int(points.max()) + 1][:, dimension].view(-1, len(times), neurons).transpose(0, 1)
    return few[:, points]


@lru_cache
def _sobol_table() -> Tensor:
    points = torch.quasirandom.SobolEngine(torch.quasirandom.SobolEngine.MAXDIM).draw(SOBOL_POINTS, dtype=torch.float64)
    return (points * (1 << 23)).to(torch.int32)


def _hash(counter: Tensor, row1: Tensor, row2: Tensor) -> Tensor:
    """Returns 23 random bits per (row, neuron). The mixer runs over the neuron's counter and takes in the row's second
    word half-way, so that two rows whose first words collide still differ."""
    h = counter + row1
    h ^= (h >> 16) & 0xFFFF
    h *= _M1
    h += row2
    h ^= (h >> 15) & 0x1FFFF
    h *= _M2
    h ^= (h >> 16) & 0xFFFF
    return (h >> 9) & 0x7FFFFF


class Drawer:
    """Draws the spikes of one layer in one pass, in the order of the time steps.

    scale: scale of the noise, broadcast against [...]. first: index in time of the first step.
    """

    def __init__(self, noise: Noise, firing: Firing, site: int, steps: int, scale: Tensor, first: int = 0) -> None:
        self.noise, self.firing, self.site, self.steps = noise.at(site), firing, site, steps
        self.scale, self.first = scale, first
        self._start = 0
        self._uniforms: Tensor | None = None

    def __call__(self, t: int, x: Tensor) -> Tensor:
        """Draws spikes from standardised drives x [B, ...] of step t."""
        block = max(1, (1 << 20) // max(1, x.numel()))  # steps of noise held at a time
        start = t - t % block
        if self._uniforms is None or start != self._start:
            steps = min(block, self.steps - start)
            self._uniforms = self.noise.uniform(self.site, self.first + start, steps, x.shape[1:], x.dtype)
            self._start = start
        return (self._uniforms[t - start] < self.firing.probability(x)).to(x.dtype)

    def draw(self, words: bool = True) -> Draw | None:
        """Returns the input with which a fused scan draws the same spikes; None if no fused scan can. words: whether to
        include the random words, which known spikes do not need."""
        law = law_of(self.firing)
        if law is None or self.noise.point is not None:
            return None
        drawn = self.noise.words(self.site, self.first, self.steps) if words else None
        return Draw(law, self.scale, drawn, self.noise.mirrored)
