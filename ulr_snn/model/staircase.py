"""What a function of autograd computes, if it fires: its output is a staircase in one of its arguments."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ulr_snn.adapters.stairs import NEAREST, Flight, Staircase
from ulr_snn.errors import UsageError

STAIRS = 8  # most steps of a function that fires; a function with more of them rounds
GRID = 2049  # evenly spaced points on which a function is looked at, and as many far away
FARTHEST = 1e6
HALVINGS = 1200  # of an interval, more than numbers of double precision need
MOVED = 0.375  # by how much a threshold among the arguments is moved

Arguments = tuple[Any, ...]
Calls = list[tuple[Arguments, Tensor]]  # arguments and output of each call of a function
Values = Callable[[Tensor], Tensor]


@torch.no_grad()
def staircase(function: type[Function], calls: Calls) -> Staircase | None:
    """Returns the staircase that a function's outputs are, bit for bit; None if they are no staircase. Raises
    UsageError if its steps depend on another argument in a way that is not known."""
    arguments, output = calls[0]
    for membrane, x in enumerate(arguments):
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.shape == output.shape and x.numel()):
            continue
        plain = tuple(item if i == membrane else level(item) for i, item in enumerate(arguments))
        grid = points(calls, membrane)
        found = stairs_of(values_of(function, plain, membrane), grid, membrane)
        if found is None:
            continue
        others = [i for i in range(len(plain)) if i != membrane and moves(function, plain, membrane, i, grid)]
        known = [moved(function, plain, membrane, i, grid, form) for i in others for form in (Shifted, Scaled)]
        if all(constant(plain[i]) for i in others):  # numbers that are no thresholds
            known.append(found)
        for stairs in filter(None, known):
            stairs = replace(stairs, dtype=None if output.dtype == x.dtype else output.dtype)
            if all(stairs.gives(given, result) for given, result in calls):
                return stairs
        raise UsageError(
            f"{function.__name__} fires by a rule that is not known: a staircase in its argument {membrane} alone, or "
            "in that less, or over, one other argument; compute membranes, and subtract thresholds, before the call"
        )
    return None


def level(item: Any) -> Any:
    """Returns a tensor of one value in place of one of several, and anything else as it is."""
    several = isinstance(item, Tensor) and item.is_floating_point() and item.numel() > 1
    return torch.ones_like(item) if several else item


def constant(item: Any) -> bool:
    """Returns whether an argument is one number, which training leaves as it is."""
    return not isinstance(item, Tensor) or (item.numel() == 1 and not item.requires_grad)


def points(calls: Calls, membrane: int) -> Tensor:
    """Returns numbers, in ascending order, at which a function of membranes like those of the calls is looked at."""
    x = calls[0][0][membrane]
    most = 8.0 + 2.0 * max(float(arguments[membrane].abs().max()) for arguments, _ in calls)
    near = torch.linspace(-most, most, GRID, dtype=torch.float64)
    far = torch.logspace(0, 1, GRID // 2, max(FARTHEST / most, 2.0), dtype=torch.float64)[1:] * most
    return torch.cat([-far.flip(0), near, far]).to(x)


def values_of(function: type[Function], arguments: Arguments, membrane: int) -> Values:
    """Returns a function's values at numbers [n], with all other arguments as they are. The numbers are put into a
    tensor of the shape that it knows."""
    x = arguments[membrane]

    def values(at: Tensor) -> Tensor:
        parts = []
        for part in at.split(x.numel()):
            given = part.repeat(-(-x.numel() // len(part)))[: x.numel()].view(x.shape)
            result = function.apply(*arguments[:membrane], given, *arguments[membrane + 1 :])
            parts.append(result.flatten()[: len(part)].to(x.dtype))
        return torch.cat(parts)

    return values


def stairs_of(values: Values, grid: Tensor, membrane: int) -> Staircase | None:
    """Returns the staircase of values that only ever rise, by a few steps."""
    found = values(grid)
    rising = found.diff()
    if not torch.isfinite(found).all() or bool((rising < 0).any()):
        return None
    jumps = torch.nonzero(rising).flatten().tolist()
    if not jumps:
        return None
    edges = [edge(values, grid[i], grid[i + 1]) for i in jumps[: STAIRS + 1]]
    known = [e for e in edges if e is not None]
    if len(edges) > STAIRS or len(known) < len(edges):
        return flight_of(edges, grid, found, membrane)
    lows, highs = zip(*known, strict=True)
    strict = sum(len(repr(v)) for v in lows) < sum(len(repr(v)) for v in highs)  # a threshold has few digits
    return Staircase(
        membrane, None, lows if strict else highs, tuple(map(float, rising[jumps])), float(found[0]) + 0.0, strict
    )


def flight_of(edges: list[tuple[float, float] | None], grid: Tensor, found: Tensor, membrane: int) -> Flight | None:
    """Returns the even flight of steps that values [n] on the grid are. edges: of the first steps."""
    highs = [e[1] for e in edges[:STAIRS] if e is not None]
    if len(highs) < STAIRS:
        return None
    first, rise = float(found[0]) + 0.0, float(found[found > found[0]][0] - found[0])
    top = found[-1] == found[-3]
    most = float((found[-1] - first) / rise) if top else torch.inf
    spacing = (highs[-1] - highs[0]) / (STAIRS - 1)
    stairs = Flight(membrane, None, (highs[0],), (rise,) * NEAREST, first, False, even=spacing, most=most)
    arguments = (*(None,) * membrane, grid)
    return stairs if stairs.gives(arguments, found) else None


def edge(values: Values, low: Tensor, high: Tensor) -> tuple[float, float] | None:
    """Returns the neighbouring numbers between which values jump from that at `low` to that at `high`; None if they
    take another value between the two."""
    under, over = values(low[None]), values(high[None])
    for _ in range(HALVINGS):
        middle = low + (high - low) / 2
        if middle in (low, high):
            return float(low), float(high)
        value = values(middle[None])
        if value != under and value != over:
            return None
        low, high = (middle, high) if value == under else (low, middle)
    return None


def moves(function: type[Function], arguments: Arguments, membrane: int, other: int, grid: Tensor) -> bool:
    """Returns whether the steps move with another argument of the function."""
    moved = arguments[other]
    whole = isinstance(moved, int) and not isinstance(moved, bool)
    if not (whole or isinstance(moved, float) or (isinstance(moved, Tensor) and moved.is_floating_point())):
        return False
    changed = (*arguments[:other], moved + MOVED, *arguments[other + 1 :])
    try:
        found = values_of(function, changed, membrane)(grid)
    except (RuntimeError, TypeError, ValueError):  # a whole number of something
        return False
    return not torch.equal(values_of(function, arguments, membrane)(grid), found)


@dataclass(frozen=True)
class Shifted:
    """Membranes that stand to thresholds by their difference from another argument."""

    other: int
    origin = 0.0

    def places(self, x: Tensor, by: float) -> Tensor:
        return x + by

    def back(self, threshold: float, by: float) -> float:
        return threshold - by

    def of(self, stairs: Staircase) -> Staircase:
        return replace(stairs, below=self.other)


@dataclass(frozen=True)
class Scaled:
    """Membranes that stand to thresholds by their ratio to another argument."""

    other: int
    origin = 1.0

    def places(self, x: Tensor, by: float) -> Tensor:
        return x * by

    def back(self, threshold: float, by: float) -> float:
        return threshold / by

    def of(self, stairs: Staircase) -> Staircase:
        return replace(stairs, over=self.other)


def moved(
    function: type[Function],
    arguments: Arguments,
    membrane: int,
    other: int,
    grid: Tensor,
    kind: type[Shifted] | type[Scaled],
) -> Staircase | None:
    """Returns the staircase of a function in the difference or the ratio of two arguments, if its steps move so."""
    form, given, found = kind(other), arguments[other], None
    for by in (form.origin, form.origin + MOVED):
        at = torch.full_like(given, by) if isinstance(given, Tensor) else by
        changed = (*arguments[:other], at, *arguments[other + 1 :])
        here = stairs_of(values_of(function, changed, membrane), form.places(grid, by), membrane)
        if here is None:
            return None
        found = here if found is None else found
        same = type(here) is type(found) and here.rises == found.rises
        pairs = zip(marks(here), marks(found), strict=True) if same else [(1.0, 0.0)]
        if any(abs(form.back(a, by) - b) > 1e-6 * max(1.0, abs(b)) for a, b in pairs):
            return None
    return None if found is None else form.of(found)


def marks(stairs: Staircase) -> tuple[float, ...]:
    """Returns the thresholds of a staircase, or the first two of a flight."""
    return (
        stairs.thresholds if stairs.spacing is None else (stairs.thresholds[0], stairs.thresholds[0] + stairs.spacing)
    )
