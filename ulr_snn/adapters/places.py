"""Places in a model's code that fire by a function with a surrogate gradient, in neurons that no adapter knows.

Neurons that are written out fire by a `torch.autograd.Function`: its forward compares membranes with a threshold, and
its backward is the derivative of another function. A `Place` is where the model's code calls it. While a place is
bound, its site draws what the function returns, and the function's backward passes on the credit of the site. So the
surrogate is not asked for, and all other code runs as it is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ulr_snn.adapters.base import StepNeuron
from ulr_snn.adapters.blackbox import detached
from ulr_snn.adapters.comparisons import PLAIN, Rewriting, Rule
from ulr_snn.adapters.intercept import Enter, Path, handled, handler_of, path, set_backward
from ulr_snn.adapters.stairs import Staircase
from ulr_snn.errors import UsageError
from ulr_snn.model.neurons import zero_padding


@dataclass(frozen=True)
class Layout:
    """The form of a function's argument. axis: that on which the samples lie. each: entries on it for each sample.
    whole: all time steps arrive in one call: as [T, B, ...], [B, T, ...], or with both on the first axis. outer: where
    the entries of each sample are neighbours."""

    axis: int
    each: int
    whole: bool
    outer: bool = True

    @property
    def simple(self) -> bool:
        """True if the argument is [B, ...]."""
        return self.axis == 0 and self.each == 1 and not self.whole

    def rows(self, x: Tensor, steps: int) -> Tensor:
        """Returns x as [B, ...], or as [T, B, ...] if it holds all time steps. steps: T."""
        if self.whole and self.axis == 1:
            return x if self.each == 1 else x.unflatten(1, (-1, self.each))
        x = x.movedim(self.axis, 0) if self.axis else x
        if self.whole and self.each > 1:
            return x.unflatten(0, (-1, steps)).transpose(0, 1) if self.outer else x.unflatten(0, (steps, -1))
        if self.whole:
            return x.transpose(0, 1)
        if self.each == 1:
            return x
        return x.unflatten(0, (-1, self.each)) if self.outer else x.unflatten(0, (self.each, -1)).transpose(0, 1)

    def back(self, rows: Tensor, like: Tensor) -> Tensor:
        """Returns rows in the form of `like`."""
        if self.whole and self.axis == 1:
            return rows.reshape(like.shape)
        turned = self.whole and (self.each == 1 or self.outer)
        turned = turned or (not self.whole and self.each > 1 and not self.outer)
        rows = rows.transpose(0, 1) if turned else rows
        rows = rows.flatten(0, 1) if self.each > 1 else rows
        return rows.movedim(0, self.axis).contiguous() if self.axis or turned else rows

    def features(self, x: Tensor) -> tuple[int, ...]:
        """Returns the sizes of the axes that hold neither samples nor time."""
        if not self.whole:
            return (*x.shape[: self.axis], *x.shape[self.axis + 1 :])
        return tuple(x.shape[2 if self.axis == 1 or self.each == 1 else 1 :])


class Place(StepNeuron):
    """A place in the model's code where a function fires: a neuron without a state of its own.

    modules: those whose code leads there, from the inside out. turn: which of the calls on the path it is, if each
    holds all time steps. unit: the distance from rest to the threshold. calls, steps: number of calls in a pass over so
    many time steps. features: see `Layout`. known: paths at which the function fires no neurons; within: ids of the
    model's modules. rules: those of the model's comparisons.
    """

    inside = True
    slot = None

    def __init__(
        self,
        modules: Sequence[nn.Module],
        function: type[Function],
        path: Path,
        turn: int,
        stairs: Staircase,
        layout: Layout,
        features: tuple[int, ...],
        unit: float,
        calls: int,
        steps: int,
        known: frozenset[Path],
        within: frozenset[int],
        rules: Mapping[Any, Rule],
    ) -> None:
        super().__init__(modules[0])
        self.modules, self.function, self.path, self.turn = modules, function, path, turn
        self.stairs, self.layout, self.features, self.known, self.within = stairs, layout, features, known, within
        self.rules = rules
        self.strict, self.whole, self.calls, self.steps = stairs.strict, layout.whole, calls, steps
        self.widest = stairs.widest
        self.axis = 2 if self.whole else 1  # of the thresholds of a flight: the first behind time and samples
        self.watchers: list[Callable[[Tensor], None]] = []
        self.probes: tuple[Any, Tensor] | None = None  # of `check`, and the form of the membranes that they are for
        self.unit = unit
        self._threshold: tuple[float, Tensor] | None = None  # the unit, as a number and as a tensor

    @property
    def threshold(self) -> Tensor:
        if self._threshold is None or self._threshold[0] != self.unit:
            self._threshold = self.unit, torch.tensor(self.unit, dtype=torch.float64)
        return self._threshold[1]

    def calls_in(self, steps: int) -> int:
        if self.whole:
            return steps
        times, more = divmod(self.calls, self.steps)
        return times * steps if not more else self.calls + steps - self.steps

    @contextmanager
    def seeing(self, see: Callable[[Tensor], None]) -> Iterator[None]:
        self.watchers.append(see)
        try:
            yield
        finally:
            self.watchers.remove(see)

    @contextmanager
    def bound(self, site: Any) -> Iterator[None]:
        with ExitStack() as stack:
            if site is not None:
                handler = handler_of(self.function)
                if not isinstance(handler, _Places):
                    handler = _Places(self.function.__name__, self.within)
                    stack.enter_context(handled(self.function, handler))
                    others = (handler_of(function) for function in PLAIN if function is not self.function)
                    if self.function in PLAIN and not any(isinstance(other, _Places) for other in others):
                        stack.enter_context(Rewriting(self.rules))
                sites = handler.sites.setdefault(self.path, [])
                if any(place is self for place, _ in sites):
                    name = type(self.module).__name__
                    raise UsageError(f"{name} is already bound; leave the other attach or evaluate first")
                sites.append((self, site))
                stack.callback(sites.remove, (self, site))
                stack.callback(handler.later.pop, self.path, None)
            yield

    def takes(self, arguments: tuple[Any, ...]) -> bool:
        """Returns whether a call on the path is one of the place, by its form."""
        x = arguments[self.stairs.membrane]
        return x.ndim > self.layout.axis and self.layout.features(x) == self.features

    def check(self, own: Callable[..., Tensor], arguments: tuple[Any, ...]) -> None:
        """Raises UsageError if the function no longer has its staircase."""
        x = arguments[self.stairs.membrane].detach()
        form = x.shape, x.dtype, x.device
        if self.probes is None or self.probes[0] != form:
            sample = x.narrow(self.layout.axis, 0, self.layout.each) if x.numel() else x
            self.probes = form, self.stairs.probes(x, sample)
        if not self.stairs.holds(own, arguments, self.probes[1]):
            raise UsageError(
                f"{self.function.__name__} has another threshold than in the first batch; make the threshold an "
                "argument of the function, a number or a tensor, or subtract it before the call"
            )

    def fired(self, site: Any, own: Callable[..., Tensor], arguments: tuple[Any, ...]) -> tuple[Tensor, Enter]:
        """Runs the site in place of the function's forward."""
        t = getattr(site, "calls", 0)
        if t == 0:
            self.check(own, arguments)
        steps = site.steps if self.whole else 1
        linked = getattr(site, "links", None) is not None
        with torch.set_grad_enabled(not linked):  # records without a link keep their drives in the graph
            x = self.stairs.standing(arguments)
            rows = self.layout.rows(x, steps)
            site.begin(rows)
            exact = (lambda: self.layout.rows(own(*arguments), steps)) if site.settles else None
            climbed = self.stairs.climbed(rows, exact)
            climbed = None if climbed is None else zero_padding(climbed, t, site.lengths, self.whole)
            drive = self.stairs.drive(rows, climbed, self.axis)
            spikes = site.fire(self.stairs.settled(drive, climbed, self.axis) if site.settles else drive)
        fired = self.stairs.output(spikes, climbed, self.axis)
        output = self.layout.back(fired, x)
        site.end([output])
        for see in self.watchers:
            see(fired)
        return output, partial(self._enter, getattr(site, "link", None), t, arguments, id(output))

    def later(self, site: Any, arguments: tuple[Any, ...]) -> "Later | None":
        """Returns what runs the calls that follow one with these arguments, where nothing is left to decide."""
        plain = self.layout.simple and self.stairs.single and not self.watchers and hasattr(site, "later")
        x, draw = arguments[self.stairs.membrane], site.later() if plain else None
        return None if draw is None or x.dtype != torch.float32 else Later(self, site, draw, x.shape)

    def _enter(self, link: Any, t: int, arguments: tuple[Any, ...], output: int, ctx: Any) -> None:
        set_backward(ctx, _Credit)
        ctx.fired = output  # `model.graph` takes the output for a leaf
        stairs, moved, unit, standing = self.stairs, None, None, None
        other = next((i for i in (stairs.below, stairs.over) if i is not None), None)
        if other is not None:
            moved = arguments[other] if takes_credit(arguments[other]) else None
            unit = None if stairs.over is None else detached(arguments[stairs.over])
            standing = stairs.standing(arguments).detach() if moved is not None and unit is not None else None
        ctx.credit = partial(self._credit, link, t, len(arguments), moved, unit, standing)

    def _credit(
        self,
        link: Any,
        t: int,
        count: int,
        moved: Tensor | None,
        unit: Tensor | None,
        standing: Tensor | None,
        a: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Returns the gradients of a call's arguments from that of its output: the credit of the site, or nothing where
        a pass is cut at spikes. moved: the threshold or unit, if it is learned; standing: membranes over it."""
        found: list[Tensor | None] = [None] * count
        if link is None:
            return tuple(found)
        stairs, slope = self.stairs, link.slope(t)
        if self.layout.simple:
            credit = stairs.credit(a, slope, self.axis)
        else:
            rows = self.layout.rows(a, len(slope) if self.whole else 1)
            credit = self.layout.back(stairs.credit(rows, slope, self.axis), a)
        found[stairs.membrane] = credit = credit if unit is None else credit / unit
        if moved is not None and stairs.below is not None:
            found[stairs.below] = -credit.sum_to_size(moved.shape)
        if moved is not None and stairs.over is not None and standing is not None:
            found[stairs.over] = -(credit * standing).sum_to_size(moved.shape)
        return tuple(found)


class Later:
    """Runs the calls of a place that follow the first one of a pass, of the same form.

    It does what `Place.fired` does for rows [B, ...] and a single threshold, in a fraction of the time. draw: fires.
    """

    def __init__(self, place: Place, site: Any, draw: Callable[[int, Tensor], Tensor], shape: torch.Size) -> None:
        self.place, self.site, self.draw, self.shape = place, site, draw, shape
        self.membrane, self.bare = place.stairs.membrane, place.stairs.bare

    def takes(self, arguments: tuple[Any, ...]) -> bool:
        """Returns whether a call is one of these, by its form."""
        x = arguments[self.membrane]
        return x.shape == self.shape and x.dtype == torch.float32 and self.site.calls < self.site.steps

    def __call__(self, arguments: tuple[Any, ...]) -> tuple[Tensor, Enter]:
        place, site, stairs = self.place, self.site, self.place.stairs
        t, site.calls = site.calls, site.calls + 1
        output = self.draw(t, stairs.drive(stairs.standing(arguments)))
        if not self.bare:
            output = stairs.output(output)
        return output, partial(place._enter, site.link, t, arguments, id(output))


@dataclass
class _Places:
    """The handler of a function in a pass. modules: ids of the model's modules; sites: by path, the places and their
    sites; turns: number of calls so far, by path and features."""

    name: str
    modules: frozenset[int]
    sites: dict[Path, list[tuple[Place, Any]]] = field(default_factory=dict)
    turns: dict[Any, int] = field(default_factory=dict)
    later: dict[Path, Later] = field(default_factory=dict)

    def __call__(self, own: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, Enter | None]:
        here = path(self.modules)
        later = self.later.get(here)
        if later is not None and later.takes(arguments):
            return later(arguments)
        found = [(place, site) for place, site in self.sites.get(here, ()) if place.takes(arguments)]
        if len(found) > 1:
            key = here, found[0][0].features
            turn = self.turns[key] = self.turns.get(key, -1) + 1
            found = [(place, site) for place, site in found if place.turn == turn % len(found)]
        if found:
            place, site = found[0]
            fired = place.fired(site, own, arguments)
            if len(self.sites[here]) == 1 and (later := place.later(site, arguments)) is not None:
                self.later[here] = later
            return fired
        if any(here in place.known for sites in self.sites.values() for place, _ in sites):
            return own(), None
        raise UsageError(
            f"{self.name} fires at a place in the model's code where it did not run in the first batch; let the model "
            "run the same code for every batch"
        )


def takes_credit(argument: Any) -> bool:
    """Returns whether an argument is a tensor in the graph."""
    return isinstance(argument, Tensor) and argument.requires_grad


class _Credit(Function):
    """The backward of a call at a place."""

    @staticmethod
    def backward(ctx: Any, *a: Any) -> Any:
        return ctx.credit(a[0])
