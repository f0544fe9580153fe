"""Search for black boxes, modules of no known kind that need noise on their current, by one pass and its replay."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.adapters import BlackBox, State, current_of, derived, detached, replaced, with_current
from ulr_snn.adapters.memories import once
from ulr_snn.adapters.places import Place
from ulr_snn.errors import UsageError
from ulr_snn.model.call import Call, copied, generator_state, no_side_effects, set_generator_state
from ulr_snn.model.chain import own_code
from ulr_snn.model.graph import leaves
from ulr_snn.model.place_search import find_places, operations_that_fire
from ulr_snn.noise.firing import Logistic
from ulr_snn.noise.kinds import CurrentNoise
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.sites.binding import Layers, bind, open_modules, spiking_layers, unknown, user_modules

DRAWS = 4  # changes of the input by which a black box is probed

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments


def find_layers(
    model: nn.Module,
    events: Callable[[], Tensor],
    call: Call,
    noise: Mapping[str, Any],
    notes: list[str] | None = None,
    plain: bool = True,
) -> Layers:
    """Returns all layers of a model that get noise, by name, in module order. events: makes events [T, B, ...] to probe
    modules with. noise: see `ULR`. notes: receives a line for every other module that cuts the graph or fires with a
    gradient of its own. plain: modules that fire by a comparison without any gradient are no black boxes."""
    find_memories(model, events, call)
    noted: list[str] = []
    asked = any(isinstance(site, CurrentNoise) for site in noise.values())
    layers = layers_of(model, events, call, noise, noted, plain=plain and not asked)
    kinds = {type(neuron) for _, neuron in layers}
    if BlackBox in kinds and Place in kinds:  # credit of places does not reach a box, but that of boxes does
        again: list[str] = []
        others = layers_of(model, events, call, noise, again, plain=False)
        if Place not in {type(neuron) for _, neuron in others}:
            layers, noted = others, again
    if notes is not None:
        notes += noted
    return layers


def layers_of(
    model: nn.Module,
    events: Callable[[], Tensor],
    call: Call,
    noise: Mapping[str, Any],
    notes: list[str],
    plain: bool,
) -> Layers:
    """Returns all layers of a model that get noise; see `find_layers`. plain: also neurons that fire by a comparison
    without any gradient."""
    noise = {name: CurrentNoise() for name, module in model.named_modules() if name and derived(module)} | dict(noise)
    boxes = {name for name, site in noise.items() if isinstance(site, CurrentNoise)}
    places = find_places(model, events, call, spiking_layers(model), boxes, notes, plain)
    placed = {id(module) for _, place in places for module in place.modules}
    free = [name for name, module in model.named_modules() if name and id(module) not in placed]
    names = boxes | (set(free) & set(unknown(model)))
    if not names:
        return noted_layers(model, events, call, [*spiking_layers(model), *places], notes)
    x = events()
    watched = {name: Watch(module) for name, module in model.named_modules() if name in names}
    with no_side_effects(model), torch.enable_grad(), ExitStack() as stack:
        stack.enter_context(bind(model, NoiseLevel(Logistic()), steps=len(x)))
        for watch in watched.values():
            stack.enter_context(watch.watching())
        call.outputs(model, copied(x))
    with no_side_effects(model):
        found = black_boxes(watched, x, noise, notes)
    return noted_layers(model, events, call, [*spiking_layers(model, found), *places], notes)


def noted_layers(
    model: nn.Module, events: Callable[[], Tensor], call: Call, layers: Layers, notes: list[str]
) -> Layers:
    """Returns the layers. If there are none, notes receives a line for each operation that fires."""
    if not layers and open_modules(model):
        notes += operations_that_fire(model, events, call)
    return layers


def find_memories(model: nn.Module, events: Callable[[], Tensor], call: Call) -> None:
    """Runs a pass with a graph, the first time for a model with code of its own, which shows the states that it keeps
    (see `adapters.memories`)."""
    if not user_modules(own_code(model)) or not once(own_code(model)):
        return
    x = events()[:, :2]
    x = x + torch.zeros((), dtype=x.dtype, device=x.device, requires_grad=x.is_floating_point())
    running = bind(model, NoiseLevel(Logistic()), steps=len(x))
    try:
        with no_side_effects(model), torch.enable_grad(), running:
            call.outputs(model, x)
    except RuntimeError as error:
        if "requires grad" not in str(error):  # code that leaves torch keeps no graph
            raise


def black_boxes(
    watched: Mapping[str, "Watch"], x: Tensor, noise: Mapping[str, Any], notes: list[str]
) -> dict[str, BlackBox]:
    """Returns the modules that get noise on their current, by name. These are the modules that `noise` names, and the
    innermost modules that cut the graph between parameters and an output that depends on the input. Raises UsageError
    if a named module does not run over time."""
    cuts = [name for name, watch in watched.items() if watch.cuts]
    boxes: dict[str, BlackBox] = {}
    for name, watch in watched.items():
        asked = isinstance(noise.get(name), CurrentNoise)
        innermost = name in cuts and not any(other.startswith(f"{name}.") for other in cuts)
        says = f"{name} ({type(watch.module).__name__})"
        runs = watch.runs_over_time(len(x), x.shape[1])
        if asked and not runs:
            how = "it must see [T, B, ...] once, or [B, ...] at every step"
            raise UsageError(f"{says} got noise, but {watch.calls_in_words()}; {how}")
        if not asked and watch.fires_by_its_own_gradient():
            use = f"ULR(noise={{{name!r}: CurrentNoise()}})"
            notes.append(f"{says} fires, with a gradient of its own; {use} puts noise in its place")
        elif asked or (innermost and watch.trained and runs):
            depends, elementwise = watch.probed()
            if asked or depends:
                site = noise[name] if asked else CurrentNoise()
                boxes[name] = BlackBox(watch.module, site, watch.runs_whole(len(x), x.shape[1]), elementwise)
        elif innermost:
            why = watch.calls_in_words() if watch.trained else "no parameter lies before it"
            notes.append(f"{says} cuts the graph and gets no noise on its current: {why}")
    return boxes


class Watch:
    """Records the calls of a module in one pass, and whether the graph leads from its inputs to its outputs. trained:
    the input depends on parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.trained, self.leaves_torch = module, False, False
        self.calls: list[Arguments] = []
        self.outputs: list[Tensor] = []
        self._probes: set[int] = set()
        self._kept: list[Tensor] = []
        self._began: State | None = None  # of the module, before its first call

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches the module for a while."""
        own = self.module.forward
        before = self.module.__dict__.get("forward")
        self.module.__dict__["forward"] = partial(self._forward, own)
        try:
            yield
        finally:
            del self.module.__dict__["forward"]
            if before is not None:
                self.module.__dict__["forward"] = before

    def _forward(self, own: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        current = current_of(arguments, named)
        if current is None:
            return own(*arguments, **named)
        self._began = self._began or State(self.module)
        self.trained = self.trained or current.requires_grad
        self.calls.append((tuple(map(kept, arguments)), {name: kept(item) for name, item in named.items()}))
        result = None
        if not self.leaves_torch:
            probe = torch.zeros((), dtype=current.dtype, device=current.device, requires_grad=True)
            self._probes.add(id(probe))
            self._kept.append(probe)
            try:
                watched, by_name = with_current(current + probe, arguments, named)
                result = own(*watched, **by_name)
            except RuntimeError as error:
                if "requires grad" not in str(error):
                    raise
                # There is no public way to know that the module asks for tensors without a graph, as numpy() does.
                self.leaves_torch = True
        if self.leaves_torch:
            with torch.no_grad():
                result = own(*map(detached, arguments), **{name: detached(item) for name, item in named.items()})
        replaced(result, partial(noted, self.outputs))
        return result

    @property
    def cuts(self) -> bool:
        """True if no output of any call depends differentiably on an input."""
        return bool(self.outputs) and not self._probes & leaves(self.outputs)

    def runs_over_time(self, steps: int, batch: int) -> bool:
        """Returns whether the module takes all steps in one call, or one step in each of as many calls."""
        shapes = [current_in(call).shape for call in self.calls]
        return self.runs_whole(steps, batch) or (len(shapes) == steps and all(shape[0] == batch for shape in shapes))

    def runs_whole(self, steps: int, batch: int) -> bool:
        """Returns whether the module takes all steps in one call."""
        return len(self.calls) == 1 and tuple(current_in(self.calls[0]).shape[:2]) == (steps, batch)

    def calls_in_words(self) -> str:
        """Describes the calls for a message."""
        if not self.calls:
            return "it does not run"
        shapes = {tuple(current_in(call).shape) for call in self.calls}
        return f"it is called {len(self.calls)} times with {' and '.join(str(list(shape)) for shape in shapes)}"

    def fires_by_its_own_gradient(self) -> bool:
        """Returns whether the graph leads through the module, and its outputs for varied inputs are 0 or one value."""
        if self.cuts or not self.outputs or not self.calls or any(output.is_complex() for output in self.outputs):
            return False
        values = torch.cat([output.detach().flatten() for output in self.outputs]).unique()
        inputs = torch.cat([current_in(call).flatten() for call in self.calls]).unique()
        return len(inputs) > 4 and len(values) == 2 and bool((values == 0).any())

    def probed(self) -> tuple[bool, bool]:
        """Returns whether outputs change with the input at all, and whether each changes only with the input of its own
        place. The calls are replayed with large changes in the currents of a random half of the neurons."""
        generator = torch.Generator().manual_seed(0)
        first = self._replay()
        features = current_in(self.calls[0])
        shape = features.shape[2:] if len(self.calls) == 1 and features.ndim > 2 else features.shape[1:]
        depends = False
        elementwise = all(o.shape == current_in(c).shape for o, c in zip(first, self.calls, strict=True))
        for draw in range(DRAWS):
            chosen = (torch.rand(shape, generator=generator) < 0.5).to(features.device)
            chosen = chosen if chosen.any() else torch.ones_like(chosen)
            size = (4 + 4 * features.abs().max()) * (1 - 2 * (draw % 2))
            changed = [(a != b) for a, b in zip(self._replay(chosen, size), first, strict=True)]
            depends = depends or any(bool(c.any()) for c in changed)
            elementwise = elementwise and not any(bool((c & ~chosen).any()) for c in changed)
        return depends, elementwise

    def _replay(self, chosen: Tensor | None = None, size: Tensor | float = 0.0) -> list[Tensor]:
        """Returns the outputs of all calls, with the currents of the chosen neurons moved by `size`."""
        outputs: list[Tensor] = []
        state = generator_state()
        with torch.no_grad(), BlackBox(self.module, CurrentNoise(), whole=False).bound(None):
            if self._began is not None:  # the parent may have reset the module's state before it ran
                self._began.restore()
            for call in self.calls:
                current = current_in(call)
                moved = current if chosen is None else torch.where(chosen, current + size, current)
                arguments, named = with_current(moved.clone(), *call)
                result = self.module.forward(*arguments, **named)
                replaced(result, lambda spikes: noted(outputs, spikes.detach().clone()))
        set_generator_state(state)
        return outputs


def current_in(call: Arguments) -> Tensor:
    """Returns the current among the arguments of a call that has one."""
    current = current_of(*call)
    assert current is not None
    return current


def noted(outputs: list[Tensor], spikes: Tensor) -> Tensor:
    """Appends spikes to the outputs and returns them."""
    outputs.append(spikes)
    return spikes


def kept(item: Any) -> Any:
    """Returns a copy of a tensor, and anything else as it is."""
    return item.detach().clone() if isinstance(item, Tensor) else item
