"""What a function that fires computes: its output is a staircase of its argument.

The output rises by a step at each threshold. A `Staircase` lists its thresholds, each of which is a neuron to its site.
A `Flight` has more steps than can be listed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NEAREST = 2  # thresholds of a flight at which a membrane may fire: the last that it has passed, and the next
WIDEST = 2.0  # spread with which noise begins at a fifth of the spacing, so that thresholds left out stay sure
CLOSE = 1e-3  # share of the spacing, up to which a number may count as a threshold of a flight


@dataclass(frozen=True)
class Staircase:
    """The output of a function, first + Σ_k rises[k] (x > thresholds[k]), or ≥ where it is not strict.

    membrane: position of x among the arguments. below: position of a threshold that is an argument, too; thresholds are
    then those of x minus this argument. over: position of the unit of all thresholds; they are then those of x divided
    by this argument. dtype: of the output; None: that of x.
    """

    membrane: int
    below: int | None
    thresholds: tuple[float, ...]
    rises: tuple[float, ...]
    first: float
    strict: bool
    dtype: torch.dtype | None = None
    over: int | None = None

    @property
    def single(self) -> bool:
        """True if there is one threshold."""
        return len(self.thresholds) == 1

    @property
    def bare(self) -> bool:
        """True if the output is the spikes themselves."""
        return self.rises == (1.0,) and not self.first and self.dtype is None

    @property
    def spacing(self) -> float | None:
        """Distance between thresholds that go on without end; None if there are no others."""
        return None

    @property
    def widest(self) -> float:
        """Bound of the spread of membranes after which noise begins, in units of the first threshold."""
        return torch.inf

    def standing(self, arguments: tuple[Any, ...]) -> Tensor:
        """Returns the membrane of a call, as it stands to the thresholds."""
        x: Tensor = arguments[self.membrane]
        x = x if self.below is None else x - arguments[self.below]
        return x if self.over is None else x / arguments[self.over]

    def at(self, standing: Tensor, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns the arguments of a call with a membrane that stands so."""
        x = standing if self.over is None else standing * arguments[self.over]
        x = x if self.below is None else x + arguments[self.below]
        return (*arguments[: self.membrane], x, *arguments[self.membrane + 1 :])

    def climbed(self, x: Tensor, own: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Returns the number of thresholds below `standing`, where it is needed. own: gives the output of the function
        itself, which decides where rounding matters."""
        return None

    def drive(self, x: Tensor, climbed: Tensor | None = None, axis: int = 1) -> Tensor:
        """Returns the distances of `standing` from the thresholds, with an axis for several of them. climbed: number of
        thresholds below; axis: where that axis is, before those of the features, so that sums over it are fast."""
        if len(self.thresholds) > 1:
            return torch.stack([x - threshold for threshold in self.thresholds], axis)
        return x - self.thresholds[0] if self.thresholds[0] else x

    def settled(self, drive: Tensor, climbed: Tensor | None, axis: int = 1) -> Tensor:
        """Returns the drive with signs that tell the number of thresholds below."""
        return drive

    def output(self, spikes: Tensor, climbed: Tensor | None = None, axis: int = 1) -> Tensor:
        """Returns the output for spikes in the shape of the drive."""
        if len(self.rises) > 1:
            spikes = self._summed(spikes, axis)
        elif self.rises != (1.0,):
            spikes = self.rises[0] * spikes
        found = self.first + spikes if self.first else spikes
        return self._typed(found)

    def _typed(self, found: Tensor) -> Tensor:
        return found if self.dtype is None else found.to(self.dtype)

    def values(self, arguments: tuple[Any, ...]) -> Tensor:
        """Returns the output of a call without noise."""
        drive = self.drive(self.standing(arguments))
        return self.output((drive > 0 if self.strict else drive >= 0).to(drive.dtype))

    def gives(self, arguments: tuple[Any, ...], output: Tensor) -> bool:
        """Returns whether the output is that of a call without noise."""
        return torch.equal(self.values(arguments), output)

    def probes(self, x: Tensor, sample: Tensor) -> Tensor:
        """Returns numbers next to the thresholds in the shape of one sample of x, or else of x if it has too few."""
        beside = self._beside(x)
        like = sample if sample.numel() >= len(beside) and self.below is self.over is None else x
        return beside.repeat(-(-like.numel() // len(beside)))[: like.numel()].view(like.shape)

    @torch.no_grad()
    def holds(self, own: Callable[..., Tensor], arguments: tuple[Any, ...], probes: Tensor) -> bool:
        """Returns whether a function is still this staircase, by what its own forward gives for `probes`."""
        given = self.at(probes, arguments)
        return self.gives(given, own(*given))

    def _beside(self, like: Tensor) -> Tensor:
        """Returns numbers next to the thresholds, on both sides."""
        edges = torch.tensor(self.thresholds, dtype=like.dtype, device=like.device)
        side = torch.full_like(edges, torch.inf if self.strict else -torch.inf)
        return torch.stack([edges, edges.nextafter(side)], 1).flatten()

    def credit(self, a: Tensor, slope: Tensor, axis: int = 1) -> Tensor:
        """Returns the credit of `standing`, from the credit a of the output, and the slopes in the shape of the
        drive."""
        if len(self.rises) == 1:
            return a * slope if self.rises == (1.0,) else a * slope * self.rises[0]
        return a * self._summed(slope, axis)

    def _summed(self, steps: Tensor, axis: int) -> Tensor:
        """Returns the sum of numbers at the thresholds, each times its rise."""
        first, *others = steps.unbind(axis)
        found = first * self.rises[0]
        for step, rise in zip(others, self.rises[1:], strict=True):
            found = found.add_(step, alpha=rise)
        return found


@dataclass(frozen=True)
class Flight(Staircase):
    """A staircase with more steps than can be listed: evenly spaced thresholds from the first on, up to `most` of them
    if there is an end. Only the nearest ones may fire or not; those far below have fired, those far above have not.

    thresholds: the first; rises: of each of the nearest steps; even: distance between thresholds.
    """

    even: float = 1.0
    most: float = torch.inf

    @property
    def single(self) -> bool:
        return False

    @property
    def spacing(self) -> float | None:
        return self.even

    @property
    def widest(self) -> float:
        return WIDEST

    @torch.no_grad()
    def climbed(self, x: Tensor, own: Callable[[], Tensor] | None = None) -> Tensor | None:
        if own is not None:
            return ((own() - self.first) / self.rises[0]).round_().to(x.dtype)
        first, even = self.thresholds[0], self.even
        count = x.floor() if first == even == 1 else (x - first).div_(even).add_(1).floor_()
        return count.clamp_(0, None if self.most == torch.inf else self.most)

    def settled(self, drive: Tensor, climbed: Tensor | None, axis: int = 1) -> Tensor:
        assert climbed is not None
        passed = climbed - self._passed(climbed)
        low, high = drive.clamp(min=0), drive.clamp(max=-torch.finfo(drive.dtype).tiny)
        parts = zip(low.unbind(axis), high.unbind(axis), strict=True)
        return torch.stack([torch.where(passed > step, *part) for step, part in enumerate(parts)], axis)

    def _passed(self, climbed: Tensor) -> Tensor:
        """Returns the number of thresholds that lie too far below to matter."""
        found = (climbed - NEAREST // 2).clamp_(min=0)
        return found if self.most == torch.inf else found.clamp_(max=self.most - NEAREST)

    def drive(self, x: Tensor, climbed: Tensor | None = None, axis: int = 1) -> Tensor:
        assert climbed is not None
        passed = self._passed(climbed)
        first = x - (passed.mul_(self.even) if self.even != 1 else passed).add_(self.thresholds[0])
        return torch.stack([first - self.even * step if step else first for step in range(NEAREST)], axis)

    def output(self, spikes: Tensor, climbed: Tensor | None = None, axis: int = 1) -> Tensor:
        assert climbed is not None
        found = self._passed(climbed)
        for step in spikes.unbind(axis):
            found += step
        found = found if self.rises[0] == 1 else found.mul_(self.rises[0])
        found = found.add_(self.first) if self.first else found
        return self._typed(found)

    def credit(self, a: Tensor, slope: Tensor, axis: int = 1) -> Tensor:
        first, *others = slope.unbind(axis)
        for other in others:
            first = first + other
        return a * first if self.rises[0] == 1 else a * first * self.rises[0]

    def values(self, arguments: tuple[Any, ...]) -> Tensor:
        x = self.standing(arguments)
        count = ((x - self.thresholds[0]) / self.even + 1).floor().clamp(0, self.most)
        found = self.first + self.rises[0] * count
        return self._typed(found)

    def gives(self, arguments: tuple[Any, ...], output: Tensor) -> bool:
        place = (self.standing(arguments) - self.thresholds[0]) / self.even
        near = (place - place.round()).abs() <= CLOSE * (1 + place.abs() * CLOSE)
        off = (self.values(arguments) - output).abs()
        return bool(((off == 0) | (near & (off <= abs(self.rises[0]) * (1 + place.abs() * CLOSE)))).all())

    def _beside(self, like: Tensor) -> Tensor:
        steps = torch.arange(int(min(self.most, NEAREST)), dtype=like.dtype, device=like.device)
        beside = torch.stack([steps - 2 * CLOSE, steps + 2 * CLOSE], 1).flatten()
        return self.thresholds[0] + self.even * beside
