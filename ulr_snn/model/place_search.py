"""Search for the places where a model's own code fires by a function with a surrogate gradient."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode  # torch has no public way to see all operations

from ulr_snn.adapters.comparisons import PLAIN
from ulr_snn.adapters.intercept import SKIPPED, Enter, Path, handled, modules, path, runs_again
from ulr_snn.adapters.places import Layout, Place
from ulr_snn.adapters.stairs import Staircase
from ulr_snn.errors import UsageError
from ulr_snn.model.call import Call, copied, no_side_effects
from ulr_snn.model.comparison_search import Comparisons
from ulr_snn.model.staircase import Calls, staircase
from ulr_snn.model.tracing import Node, Tracing
from ulr_snn.noise.firing import Logistic
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.sites.binding import Layers, bind, module_of, open_modules

AT_REST = 0.1  # share of its spread by which a membrane rests below the threshold, or the spread is its unit
OPERATIONS = "aten", "prim", "prims"  # namespaces of torch's own operations

REPLACED = "by a comparison, with noise in place of the gradient of a detour around it"

Key = tuple[type[Function], Path]


def find_places(
    model: nn.Module,
    events: Callable[[], Tensor],
    call: Call,
    layers: Layers,
    boxes: Collection[str] = (),
    notes: list[str] | None = None,
    plain: bool = True,
) -> list[tuple[str, Place]]:
    """Returns the places where the model's code fires by itself, by name, in the order in which they run. events: makes
    events [T, B, ...] to run the model with. layers: those that fire otherwise. boxes: names of modules that are not
    looked into. notes: receives a line for each function that fires by a rule of its own. plain: neurons may fire by a
    comparison without any gradient. Raises UsageError for a place that fires in a way that no site can take over."""
    if not open_modules(model):
        return []
    x = events()
    if not x.is_floating_point():
        return []
    functions, first = first_seen(model, call, layers, rows(x, (0, 1, 2)))
    notes = [] if notes is None else notes
    notes += first.notes
    comparisons = Comparisons.of(first.tracing.nodes, first.returned, plain)
    masks = {key for key in first.calls if key[0] in PLAIN and key not in comparisons.calls}
    for key in masks:
        del first.calls[key]
    if not first.calls:
        return []
    run = partial(seen, model, call, functions, layers)
    second, empty = run(rows(x, (0, 0))), run(torch.zeros_like(rows(x, (0, 1, 2))))
    found = findings(first, second, empty, len(x))
    closed = {id(inner) for name, module in model.named_modules() if name in boxes for inner in module.modules()}
    found = [f for f in found if not any(id(module) in closed for module in f.modules)]
    firing = [f for f in found if f.fires(first.leaves_torch or bool(layers))]
    firing = firing or [f for f in found if f.fires(trained=True)]  # all that is trained lies behind them
    first.check(firing)
    notes += [f.note() for f in found if f.is_unknown]
    others = (set(first.calls) | masks) - {f.key for f in firing}
    known = {f.function: frozenset(path for function, path in others if function is f.function) for f in firing}
    names = named(model, firing, {name for name, _ in layers})
    rules = comparisons.rules({f.key for f in firing})
    pairs = list(zip(names, firing, strict=True))
    notes += [f"{name} fires {REPLACED}" for name, f in pairs if f.key in comparisons.around()]
    return [(name, f.place(len(x), known[f.function], first.within, rules)) for name, f in pairs]


def first_seen(model: nn.Module, call: Call, layers: Layers, x: Tensor) -> tuple[list[type[Function]], "Seen"]:
    """Returns the functions that may fire, and what they did in a pass over x."""
    functions: list[type[Function]] = [*PLAIN, *own_functions(Function)]
    first = seen(model, call, functions, layers, x)
    if set(own_functions(Function)) - set(functions):  # by code that imports others when it first runs
        functions = [*PLAIN, *own_functions(Function)]
        first = seen(model, call, functions, layers, x)
        if made := set(own_functions(Function)) - set(functions):
            raise UsageError(
                f"the model makes {min(f.__name__ for f in made)}, a function of autograd, each time it runs; define "
                "it once, outside of forward"
            )
    return functions, first


def own_functions(base: type[Function]) -> Iterator[type[Function]]:
    """Yields the functions of autograd with a forward of their own that exist outside of torch and ulr_snn."""
    for function in base.__subclasses__():
        if "forward" in vars(function) and function.__module__.partition(".")[0] not in SKIPPED:
            yield function
        yield from own_functions(function)


def rows(x: Tensor, samples: tuple[int, ...]) -> Tensor:
    """Returns events [T, B, ...] of these samples, counted round."""
    return x[:, torch.tensor(samples, device=x.device) % x.shape[1]]


@dataclass
class Seen:
    """The calls of functions in a pass. within: ids of the model's modules; taken: of those that fire otherwise. calls:
    arguments and output of each call, by function and path; modules: those whose code leads there, from the inside out.
    notes: a line for each function that fires in a way that no site can take over. leaves_torch: the model's code asks
    for tensors without a graph. last: key of the last call. returned: what the model returns. checkpointed: keys of
    calls that run again in the backward pass."""

    model: nn.Module
    within: frozenset[int]
    calls: dict[Key, Calls] = field(default_factory=dict)
    modules: dict[Key, list[nn.Module]] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    leaves_torch: bool = False
    taken: frozenset[int] = frozenset()
    last: Key | None = None
    returned: list[Node] = field(default_factory=list)
    checkpointed: set[Key] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.tracing = Tracing(self.within, self._may_fire, lambda: self.last)

    def check(self, firing: list["Finding"]) -> None:
        """Raises UsageError for a place whose code runs again in the backward pass."""
        if again := [f.function.__name__ for f in firing if f.key in self.checkpointed]:
            raise UsageError(
                f"{again[0]} fires in a part of the model that is checkpointed, and would fire anew in the backward "
                "pass; leave torch.utils.checkpoint out"
            )

    def _may_fire(self) -> bool:
        """Returns whether the code that runs may fire by comparisons."""
        if self.leaves_torch or torch._C._are_functorch_transforms_active():  # no public name, as below
            return False
        return not any(id(module) in self.taken for module in modules())

    def handler(self, function: type[Function]) -> Callable[..., tuple[Any, Enter | None]]:
        """Returns a handler that lets the function run and notes its calls."""

        def noting(own: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, Enter | None]:
            if torch._C._are_functorch_transforms_active():  # no public name; as in `kernels.stateless`
                raise UsageError(
                    f"{function.__name__} runs inside of vmap or another transform of torch.func, where its calls "
                    "cannot be seen one by one; write the axis out, as [B, ensemble, ...] with einsum"
                )
            self.last = key = function, path(self.within)
            if key not in self.modules:
                own_modules = [module for module in modules() if id(module) in self.within]
                self.modules[key] = own_modules or [self.model]
                if runs_again():
                    self.checkpointed.add(key)
            kept = tuple(item.clone() if isinstance(item, Tensor) else item for item in arguments)
            for before, after in zip(arguments, kept, strict=True):
                if isinstance(before, Tensor) and before.is_floating_point():
                    after.requires_grad_(before.requires_grad)
            output = own()
            if isinstance(output, Tensor):
                self.calls.setdefault(key, []).append((kept, output.clone()))
            elif isinstance(output, tuple) and any(two_valued([(kept, item)]) for item in output):
                where = type(self.modules[key][0]).__name__
                self.notes.setdefault(
                    f"{function.__name__} in {where} fires, but returns {len(output)} tensors, so that it gets no "
                    "noise; write the step in plain torch, with a function of the membrane alone that gives spikes"
                )
            return output, None

        def unseen(own: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, Enter | None]:
            with self.tracing.mute():
                return noting(own, arguments)

        return unseen


def seen(model: nn.Module, call: Call, functions: list[type[Function]], layers: Layers, x: Tensor) -> Seen:
    """Runs a pass without noise and returns what functions did in it."""
    taken = frozenset(id(inner) for _, neuron in layers for inner in module_of(neuron).modules())
    found = Seen(model, frozenset(map(id, model.modules())), taken=taken)
    try:
        with torch.enable_grad():
            watched(model, call, functions, layers, x, found)
    except RuntimeError as error:
        if "requires grad" not in str(error):  # code that leaves torch asks for tensors without a graph
            raise
        found = Seen(model, found.within, leaves_torch=True)
        with torch.no_grad():
            watched(model, call, functions, layers, x, found)
    return found


def watched(
    model: nn.Module, call: Call, functions: list[type[Function]], layers: Layers, x: Tensor, found: Seen
) -> None:
    """Runs a pass without noise, and notes what functions do in it."""
    with no_side_effects(model), ExitStack() as stack:
        stack.enter_context(bind(model, NoiseLevel(Logistic()), steps=len(x), layers=layers))
        for function in functions:
            stack.enter_context(handled(function, found.handler(function)))
        with found.tracing:
            found.returned = [found.tracing.node(call.outputs(model, copied(x)))]


def findings(first: Seen, second: Seen, empty: Seen, steps: int) -> list["Finding"]:
    """Returns what functions did at each place: of a path, calls of one form are a place, or each call that holds all
    time steps. second: of fewer samples, which are equal; empty: without events."""
    found = []
    for key, calls in first.calls.items():
        fewer = second.calls.get(key, [])
        if len(fewer) != len(calls):
            raise UsageError(
                f"{key[0].__name__} does not run as often with 2 samples as with 3; let the model run the same code "
                "for every batch, and reset a state that it has of an earlier batch"
            )
        groups: dict[Any, list[int]] = {}
        for i, (more, less) in enumerate(zip(calls, fewer, strict=True)):
            layout = layout_of(in_form(more), in_form(less), steps)
            form = None if layout is None else (layout, layout.features(more[1]))
            groups.setdefault(form, []).append(i)
        for form, members in groups.items():
            layout = None if form is None else stepwise(form[0], len(members), steps)
            each = [[i] for i in members] if layout is not None and layout.whole else [members]
            for turn, part in enumerate(each):
                rest = empty.calls.get(key, [])
                at_rest = rest[part[0]][0] if len(rest) == len(calls) else None
                own = [calls[i] for i in part]
                parts = layout is None and any(calls[i][1].shape != fewer[i][1].shape for i in part)
                found.append(Finding(key, own, first.modules[key], layout, turn, at_rest, parts))
    return found


def stepwise(layout: Layout, calls: int, steps: int) -> Layout:
    """Returns the layout of calls of one form: a second axis as long as there are time steps holds features if as many
    calls go with it."""
    alike = layout.whole and layout.axis == 0 and layout.each == 1
    return Layout(0, 1, whole=False) if alike and calls % steps == 0 else layout


def in_form(call: tuple[tuple[Any, ...], Tensor]) -> Tensor:
    """Returns the first argument in the shape of the output, or the output."""
    arguments, output = call
    found = (a for a in arguments if isinstance(a, Tensor) and a.is_floating_point() and a.shape == output.shape)
    return next(found, output)


def layout_of(more: Tensor, fewer: Tensor, steps: int) -> Layout | None:
    """Returns the layout of a call by a tensor of it for 3 samples, and for 2 samples that are equal; None if it holds
    no samples."""
    axes = [axis for axis, (a, b) in enumerate(zip(more.shape, fewer.shape, strict=False)) if a != b]
    if more.ndim != fewer.ndim or len(axes) != 1 or more.shape[axes[0]] * 2 != fewer.shape[axes[0]] * 3:
        return None
    axis, each = axes[0], more.shape[axes[0]] // 3
    whole = axis == 1 and more.shape[0] == steps
    whole = whole or (axis == 0 and each == steps) or (axis == 0 and each == 1 and more.shape[1:2] == (steps,))
    if each == 1 or (whole and axis == 1):
        return Layout(axis, each, whole and steps > 1)
    pairs = fewer.movedim(axis, 0).unflatten(0, (each, 2))  # neighbours are of one entry, if equal
    return Layout(axis, each, whole and steps > 1, outer=not torch.equal(pairs[:, 0], pairs[:, 1]))


@dataclass(eq=False)
class Finding:
    """What a function did at one place. modules: those whose code leads there, from the inside out; turn: see `Place`;
    rest: the arguments of the first call without events; parts: the number of rows follows that of the samples, but not
    in proportion."""

    key: Key
    calls: Calls
    modules: list[nn.Module]
    layout: Layout | None
    turn: int
    rest: tuple[Any, ...] | None
    parts: bool
    stairs: Staircase | None = None

    @property
    def function(self) -> type[Function]:
        return self.key[0]

    @property
    def path(self) -> Path:
        return self.key[1]

    def fires(self, trained: bool) -> bool:
        """Returns whether neurons fire here, and how. trained: parameters lie before, though the graph does not show
        it. A function of weights alone, or of the input alone, has no neurons."""
        if self.layout is None:
            return False
        trained = trained or any(
            isinstance(a, Tensor) and a.requires_grad for arguments, _ in self.calls for a in arguments
        )
        self.stairs = staircase(self.function, self.calls) if trained else None
        return self.stairs is not None

    @property
    def is_unknown(self) -> bool:
        """True if neurons seem to fire here, by an unknown rule or for parts of a batch."""
        known = self.stairs is not None or (not self.parts and staircase(self.function, self.calls) is not None)
        return not known and two_valued(self.calls)

    def note(self) -> str:
        says = f"{self.function.__name__} in {type(self.modules[0]).__name__}"
        if self.parts:
            return (
                f"{says} fires for a part of the batch in a call, and keeps a gradient of its own; give it the whole "
                "batch, without micro-batches in forward"
            )
        return f"{says} gives 0 or one value, by a rule that is not a threshold, and keeps a gradient of its own"

    def place(self, steps: int, known: frozenset[Path], within: frozenset[int], rules: Any) -> Place:
        """Returns the place."""
        assert self.stairs is not None
        assert self.layout is not None
        features = self.layout.features(self.calls[0][0][self.stairs.membrane])
        unit, calls, where = self.unit(self.stairs), len(self.calls), (self.function, self.path, self.turn)
        return Place(self.modules, *where, self.stairs, self.layout, features, unit, calls, steps, known, within, rules)

    def unit(self, stairs: Staircase) -> float:
        """Returns the spacing of a flight, else the distance from rest to the nearest threshold. Rest is where
        membranes are after a step without events. Membranes that rest at the threshold, as gates do, have their spread
        as unit."""
        if stairs.spacing is not None:
            return stairs.spacing
        standing = torch.cat([stairs.standing(arguments).detach().double().flatten() for arguments, _ in self.calls])
        spread = float(standing.std()) if standing.numel() > 1 else 0.0
        rest = float("nan") if self.rest is None else float(stairs.standing(self.rest).detach().double().median())
        distance = min(abs(threshold - rest) for threshold in stairs.thresholds)
        if distance > AT_REST * spread:
            return distance
        return spread if 0 < spread < float("inf") else 1.0


class Operations(TorchDispatchMode):
    """Notes the operations of other libraries, or of the user, that fire. notes: a line for each."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: dict[str, None] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation.namespace not in OPERATIONS and two_valued([(args, result)]):
            name = f"{operation.namespace}::{operation.__name__.partition('.')[0]}"
            self.notes.setdefault(
                f"the operation {name} fires, with a gradient of its own that ulr_snn cannot replace; make it "
                "a torch.autograd.Function"
            )
        return result


def operations_that_fire(model: nn.Module, events: Callable[[], Tensor], call: Call) -> list[str]:
    """Returns a line for each operation of no library of torch that fires in a pass."""
    x = rows(events(), (0, 1, 2))
    with no_side_effects(model), torch.no_grad(), Operations() as found:
        call.outputs(model, copied(x))
    return list(found.notes)


@torch.no_grad()
def two_valued(calls: Sequence[tuple[tuple[Any, ...], Any]]) -> bool:
    """Returns whether the outputs of calls are 0 or one other value, though the arguments have more values."""
    given = [a.flatten() for arguments, _ in calls for a in arguments if isinstance(a, Tensor)]
    outputs = [output.flatten() for _, output in calls if isinstance(output, Tensor) and not output.is_complex()]
    if not given or not outputs:
        return False
    values = torch.cat(outputs).unique()
    return len(torch.cat(given).unique()) > 4 and len(values) == 2 and bool((values == 0).any())


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
        own = next((module for module in f.modules if counts[id(module)] == 1), None)
        base = names[id(own)] if own is not None else f"{names[id(f.modules[0])]}.{f.function.__name__}".lstrip(".")
        base = base or "model"
        name, count = base, 1
        while name in taken:
            count += 1
            name = f"{base}_{count}"
        taken.add(name)
        result.append(name)
    return result
