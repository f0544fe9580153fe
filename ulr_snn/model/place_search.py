"""Search for the places where a model's own code fires by a function with a surrogate gradient."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ulr_snn.adapters.intercept import SKIPPED, Enter, Path, handled, modules, path
from ulr_snn.adapters.places import Layout, Place, Staircase
from ulr_snn.errors import UsageError
from ulr_snn.model.call import Call, copied, no_side_effects
from ulr_snn.model.staircase import staircase
from ulr_snn.noise.firing import Logistic
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.sites.binding import Layers, bind, open_modules

SAMPLES = 3, 2  # sizes of the two batches whose comparison shows on which axis the samples lie
AT_REST = 0.1  # share of its spread by which a membrane rests below the threshold, or the spread is its unit

Key = tuple[type[Function], Path]


def find_places(
    model: nn.Module,
    events: Callable[[], Tensor],
    call: Call,
    layers: Layers,
    boxes: Collection[str] = (),
    notes: list[str] | None = None,
) -> list[tuple[str, Place]]:
    """Returns the places where the model's code fires by itself, by name, in the order in which they run. events: makes
    events [T, B, ...] to run the model with. layers: those that fire otherwise. boxes: names of modules that are not
    looked into. notes: receives a line for each function that fires by a rule of its own. Raises UsageError for a place
    that fires in a way that no site can take over."""
    if not open_modules(model):
        return []
    functions = list(own_functions(Function))
    x = events()
    if not functions or not x.is_floating_point():
        return []
    two = [rows(x, count) for count in SAMPLES]
    try:
        first = seen(model, call, two[0], functions, layers)
    except RuntimeError as error:
        if "requires grad" not in str(error):  # code that leaves torch asks for tensors without a graph
            raise
        return []
    if not first.calls:
        return []
    second, empty = (seen(model, call, part, functions, layers) for part in (two[1], torch.zeros_like(two[0])))
    found = [Finding(key, calls, first.modules[key]) for key, calls in first.calls.items()]
    closed = {id(inner) for name, module in model.named_modules() if name in boxes for inner in module.modules()}
    found = [f for f in found if not any(id(module) in closed for module in f.modules)]
    firing = [f for f in found if f.fires(second.calls.get(f.key), len(x), bool(layers))]
    if notes is not None:
        notes += [f.note() for f in found if f.stairs is None and f.two_valued]
    others = set(first.calls) - {f.key for f in firing}
    known = {f.function: frozenset(path for function, path in others if function is f.function) for f in firing}
    names = named(model, firing, {name for name, _ in layers})
    places = [f.place(len(x), empty.calls.get(f.key), known[f.function]) for f in firing]
    return list(zip(names, places, strict=True))


def own_functions(base: type[Function]) -> Iterator[type[Function]]:
    """Yields the functions of autograd with a forward of their own that exist outside of torch and ulr_snn."""
    for function in base.__subclasses__():
        if "forward" in vars(function) and function.__module__.partition(".")[0] not in SKIPPED:
            yield function
        yield from own_functions(function)


def rows(x: Tensor, count: int) -> Tensor:
    """Returns events [T, count, ...] of the first samples, repeated where there are fewer."""
    return x[:, torch.arange(count, device=x.device) % x.shape[1]]


@dataclass
class Seen:
    """The calls of functions in a pass. calls: arguments and output of each call, by function and path; modules: those
    whose code leads there, from the inside out."""

    calls: dict[Key, list[tuple[tuple[Any, ...], Tensor]]] = field(default_factory=dict)
    modules: dict[Key, list[nn.Module]] = field(default_factory=dict)

    def handler(self, function: type[Function]) -> Callable[..., tuple[Any, Enter | None]]:
        """Returns a handler that lets the function run and notes its calls."""

        def noting(own: Callable[[], Any], arguments: tuple[Any, ...]) -> tuple[Any, Enter | None]:
            key = function, path()
            if key not in self.modules:
                self.modules[key] = modules()
            kept = tuple(item.clone() if isinstance(item, Tensor) else item for item in arguments)
            for before, after in zip(arguments, kept, strict=True):
                if isinstance(before, Tensor) and before.is_floating_point():
                    after.requires_grad_(before.requires_grad)
            output = own()
            if isinstance(output, Tensor):
                self.calls.setdefault(key, []).append((kept, output.clone()))
            return output, None

        return noting


def seen(model: nn.Module, call: Call, x: Tensor, functions: list[type[Function]], layers: Layers) -> Seen:
    """Runs a pass without noise and returns what functions did in it."""
    found = Seen()
    with no_side_effects(model), torch.enable_grad(), ExitStack() as stack:
        stack.enter_context(bind(model, NoiseLevel(Logistic()), steps=len(x), layers=layers))
        for function in functions:
            stack.enter_context(handled(function, found.handler(function)))
        call.outputs(model, copied(x))
    return found


@dataclass(eq=False)
class Finding:
    """What a function did at one place. modules: those whose code leads there, from the inside out."""

    key: Key
    calls: list[tuple[tuple[Any, ...], Tensor]]
    modules: list[nn.Module]
    stairs: Staircase | None = None
    layout: Layout | None = None

    @property
    def function(self) -> type[Function]:
        return self.key[0]

    @property
    def path(self) -> Path:
        return self.key[1]

    def fires(self, fewer: list[tuple[tuple[Any, ...], Tensor]] | None, steps: int, layers: bool) -> bool:
        """Returns whether neurons fire here, and how. fewer: the calls with fewer samples. layers: whether other layers
        come before. A function of weights alone, or of the input alone, has no neurons."""
        if fewer is None or len(fewer) != len(self.calls):
            return False
        trained = any(isinstance(a, Tensor) and a.requires_grad for arguments, _ in self.calls for a in arguments)
        self.stairs = staircase(self.function, self.calls) if trained or layers else None
        if self.stairs is None:
            return False
        several = {self.layout_of(a, b, steps) for (_, a), (_, b) in zip(self.calls, fewer, strict=True)}
        if several == {None}:
            return False
        self.layout = several.pop()
        if several or self.layout is None:
            raise UsageError(
                f"{self.function.__name__} fires in {type(self.modules[0]).__name__} with outputs of changing form; "
                "give it a tensor with one row for each sample, in every time step"
            )
        return True

    @property
    def two_valued(self) -> bool:
        """True if the outputs are 0 or one other value, though the arguments have more values."""
        given = torch.cat([a.flatten() for arguments, _ in self.calls for a in arguments if isinstance(a, Tensor)])
        values = torch.cat([output.flatten() for _, output in self.calls]).unique()
        return len(given.unique()) > 4 and len(values) == 2 and bool((values == 0).any())

    def note(self) -> str:
        return (
            f"{self.function.__name__} in {type(self.modules[0]).__name__} gives 0 or one value, by a rule that is not "
            "a threshold, and keeps a gradient of its own"
        )

    def layout_of(self, more: Tensor, fewer: Tensor, steps: int) -> Layout | None:
        """Returns the layout of a call by its shapes with more and with fewer samples; None if it holds no samples."""
        pairs = list(zip(more.shape, fewer.shape, strict=False))
        axes = [axis for axis, (a, b) in enumerate(pairs) if a != b]
        if (
            more.ndim != fewer.ndim
            or len(axes) != 1
            or more.shape[axes[0]] * SAMPLES[1] != fewer.shape[axes[0]] * SAMPLES[0]
        ):
            return None
        axis, each = axes[0], more.shape[axes[0]] // SAMPLES[0]
        once = len(self.calls) == 1 and steps > 1
        whole = once and ((axis == 0 and each == steps) or (axis == 1 and more.shape[0] == steps))
        return Layout(axis, each, whole)

    def place(self, steps: int, empty: list[tuple[tuple[Any, ...], Tensor]] | None, known: frozenset[Path]) -> Place:
        """Returns the place. empty: the calls without events."""
        assert self.stairs is not None
        assert self.layout is not None
        unit = self.unit(empty)
        calls = len(self.calls)
        return Place(self.modules, self.function, self.path, self.stairs, self.layout, unit, calls, steps, known)

    def unit(self, empty: list[tuple[tuple[Any, ...], Tensor]] | None) -> float:
        """Returns the distance from rest to the nearest threshold. Rest is where membranes are after a step without
        events. Membranes that rest at the threshold, as gates do, have their spread as unit."""
        assert self.stairs is not None
        standing = torch.cat(
            [self.stairs.standing(arguments).detach().double().flatten() for arguments, _ in self.calls]
        )
        spread = float(standing.std()) if standing.numel() > 1 else 0.0
        rest = float("nan")
        if empty:
            rest = float(self.stairs.standing(empty[0][0]).detach().double().median())
        distance = min((abs(threshold - rest) for threshold in self.stairs.thresholds), default=0.0)
        if distance > AT_REST * spread:
            return distance
        return spread if 0 < spread < float("inf") else 1.0


def named(model: nn.Module, found: list[Finding], taken: set[str]) -> list[str]:
    """Returns a name for each place: that of the innermost module that has no other place, or that of the innermost
    module and the function's."""
    names = {id(module): name for name, module in model.named_modules()}
    counts: dict[int, int] = {}
    for f in found:
        for module in set(f.modules):
            counts[id(module)] = counts.get(id(module), 0) + 1
    result: list[str] = []
    for f in found:
        known = [module for module in f.modules if id(module) in names]
        own = next((module for module in known if counts[id(module)] == 1), None)
        base = names[id(own)] if own is not None else f"{names[id(known[0])]}.{f.function.__name__}".lstrip(".")
        base = base or "model"
        name, count = base, 1
        while name in taken:
            count += 1
            name = f"{base}_{count}"
        taken.add(name)
        result.append(name)
    return result
