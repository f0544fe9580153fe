"""Firing sites: find them in a model, bind them, let them go again."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ulr_snn.adapters import BlackBox, StepNeuron, adapt, fresh_state, libraries
from ulr_snn.errors import UsageError
from ulr_snn.model.neurons import SpikingNeuron, Timed, own_spread, step_mask
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.noise.random import Drawer, Noise
from ulr_snn.noise.secant import farthest
from ulr_snn.sites.current import CurrentSite
from ulr_snn.sites.records import InPlaceGuard, Links, Record
from ulr_snn.sites.step import StepSite


@dataclass
class Site:
    """The firing site of one neuron layer. Stochastic where `noise` is given, deterministic otherwise."""

    name: str
    index: int
    level: NoiseLevel
    noise: Noise | None
    records: list[Record]  # of all sites, in the order in which they ran
    lengths: Tensor | None
    links: Links | None  # that keep spikes in the graph behind the current; else they are leaves of it
    guard: InPlaceGuard
    calls: int = 0

    def fire_sequence(self, neuron: SpikingNeuron, current: Tensor) -> Tensor:
        """Runs the neuron over time, drawing its spikes once; current [T, B, ...] -> spikes [T, B, ...]."""
        call, self.calls = self.calls, self.calls + 1
        if self.noise is None:
            with torch.no_grad():
                return neuron.fired(current)[0]
        mask = None if neuron.lengths is None else step_mask(neuron.lengths, current)
        name, index = call_name(self.name, self.calls), call_index(self.index, call)
        scale = self.level.scale(name, neuron.threshold, lambda: self._spread(name, neuron, current, mask))
        drawer = Drawer(self.noise, self.level.firing, index, len(current), scale.detach())
        with torch.no_grad():
            fired = neuron.fired(current, drawer)
        record = record_of(name, neuron, current, scale, fired, self.level)
        self.records.append(record)
        return self.guard(record.spikes.requires_grad_() if self.links is None else self.links.spikes(record))

    @torch.no_grad()
    def _spread(self, name: str, neuron: SpikingNeuron, current: Tensor, mask: Tensor | None) -> float:
        """Standard deviation of the membranes that the current charges under deterministic firing, padding left out.
        Their distance from the threshold is noted."""
        drive = neuron.fired(current)[1]
        self.level.take({name: farthest(drive, mask)})
        return own_spread(drive + neuron.threshold, mask)


def record_of(
    name: str,
    neuron: SpikingNeuron,
    current: Tensor,
    scale: Tensor,
    fired: tuple[Tensor, Tensor, Tensor | None],
    level: NoiseLevel,
    before: Tensor | None = None,
) -> Record:
    """Of a layer that has fired (see `SpikingNeuron.fired`). before: spikes of the step before the first, if that is
    not the start."""
    spikes, x, fed_back = fired
    x, through = neuron.x_at(current, spikes, x, fed_back, scale, before)
    mask = None if neuron.lengths is None else step_mask(neuron.lengths, current)
    about = (name, neuron, current.detach(), scale.detach(), x, spikes, [spikes], level.firing, mask)
    over = level.over(name, scale)
    return Record(*about, fed_back, through=through, over=over, arrived=[current])


def call_name(name: str, call: int) -> str:
    """A module that is called several times in one forward pass is as many sites, with noise and feedback of their
    own."""
    return name if call == 1 else f"{name}#{call}"


def call_index(layer: int, call: int) -> int:
    """Which site a call (0, 1, ...) of a layer is, for the noise."""
    return layer + (call << 20)


def site_index(layers: "Layers", site: str) -> int:
    """`call_index` of a site's name."""
    name, _, call = site.partition("#")
    return call_index([name for name, _ in layers].index(name), int(call or 1) - 1)


Layers = list[tuple[str, SpikingNeuron | StepNeuron]]


def spiking_layers(model: nn.Module, boxes: Mapping[str, BlackBox] | None = None) -> Layers:
    """The model's spiking layers by name, in module order, black boxes among them, what is inside those left out.
    Raises UsageError for a layer of another library that cannot be trained."""
    boxes = boxes or {}
    found: Layers = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{box}.") for box in boxes):
            continue
        neuron = boxes.get(name)
        if neuron is None:
            neuron = module if isinstance(module, SpikingNeuron) else adapt(module, name or "model")
        if neuron is not None:
            found.append((name or "model", neuron))
    return found


def user_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of the user's own classes: of no known library."""
    known = {"torch", "ulr_snn", *libraries()}
    return [module for module in model.modules() if type(module).__module__.partition(".")[0] not in known]


def inside(name: str, module: str) -> bool:
    """Whether the name of a module or parameter is that of the module, or of something in it."""
    return name == module or name.startswith(f"{module}.")


def unknown(model: nn.Module) -> list[str]:
    """Names of the modules inside a model that are of the user's own classes, and hold no known spiking layer."""
    own = {id(module) for module in user_modules(model)}
    spiking = [name for name, _ in spiking_layers(model)]
    return [
        name
        for name, module in model.named_modules()
        if name and id(module) in own and not any(inside(site, name) for site in spiking)
    ]


def check_layers(model: nn.Module, layers: Layers, others: Collection[str] = ()) -> None:
    """Raises UsageError where nothing gets noise: neither layers nor others, parameters."""
    if not layers and not others:
        raise UsageError(
            f"{type(model).__name__} has no spiking layer that ulr_snn knows, and no module that cuts the graph; use "
            f"ulr_snn.LIF, ulr_snn.RecurrentLIF, or a layer of {', '.join(libraries())}"
        )


@contextmanager
def bind(
    model: nn.Module,
    level: NoiseLevel,
    noise: Noise | None = None,
    lengths: Tensor | None = None,
    steps: int = 0,
    layers: Layers | None = None,
    links: Links | None = None,
    guard: InPlaceGuard | None = None,
) -> Iterator[list[Record]]:
    """Binds a firing site to every spiking layer, and the lengths [B] to every module that runs over time. Gives
    the list that their records go to; it stays empty as long as a layer is measured (see `StepSite`).

    steps: of the events, for layers that run step by step. layers: those of the model, where they are known. links:
    that keep spikes in the graph behind what they were drawn from; else they are leaves of it. guard: see there.
    """
    guard = guard or InPlaceGuard(copies=True)
    records: list[Any] = []
    layers = spiking_layers(model) if layers is None else layers
    sites = []
    for index, (name, neuron) in enumerate(layers):
        own = None if name in level.quiet or never_fires(neuron) else noise
        if isinstance(neuron, SpikingNeuron) or (neuron.scans and own is not None):
            sites.append(Site(name, index, level, own, records, lengths, links, guard))
        else:
            kind = CurrentSite if isinstance(neuron, BlackBox) else partial(StepSite, links=links)
            sites.append(kind(name, index, level, own, records, neuron, steps, lengths, guard))
    with bind_sites(model, sites, lengths, layers):
        yield records
    stepwise = [site for site in sites if isinstance(site, StepSite)]
    measured = [i for i, site in enumerate(records) if isinstance(site, StepSite) and site.measured]
    if not measured:
        for site in stepwise:
            site.finish()
        records[:] = [r.record() if isinstance(r, StepSite) else r for r in records]
        return
    first, *later = records[measured[0] :]
    first.finish()
    for site in later:  # what comes after a layer that is measured does not see what it will see
        level.starts.pop(site.site if isinstance(site, Record) else site.name, None)
    records.clear()


def never_fires(neuron: SpikingNeuron | StepNeuron) -> bool:
    """Whether a threshold is infinite: such neurons are readouts."""
    return not bool(torch.isfinite(torch.as_tensor(neuron.threshold)).all())


_turns: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # no attributes: models are copied and saved
_turns_made = Lock()


def turn(model: nn.Module) -> Any:
    """The lock of a model. A thread holds it while sites, modes or flows of its own are set in the model's modules; the
    same thread may take it again."""
    with _turns_made:
        return _turns.setdefault(model, RLock())


@contextmanager
def bind_sites(
    model: nn.Module, sites: Sequence[Any], lengths: Tensor | None, layers: Layers | None = None
) -> Iterator[None]:
    """For a while, gives each spiking layer its site, one with `fire_sequence(neuron, current)` or an
    `adapters.Step`, and lets go again. Other threads wait. Raises UsageError where this one has bound the model."""
    layers = [neuron for _, neuron in (spiking_layers(model) if layers is None else layers)]
    timed = [module for module in model.modules() if isinstance(module, Timed)]
    modules = [neuron if isinstance(neuron, SpikingNeuron) else neuron.module for neuron in layers]
    places = ["current_site" if isinstance(neuron, BlackBox) else "site" for neuron in layers]
    with turn(model), ExitStack() as stack:
        if any(module.__dict__.get(place) is not None for module, place in zip(modules, places, strict=True)):
            raise UsageError(f"{type(model).__name__} is already bound; leave the other attach or evaluate first")
        stack.enter_context(fresh_state(model))
        for neuron, module, place, site in zip(layers, modules, places, sites, strict=True):
            if isinstance(neuron, StepNeuron):
                stack.enter_context(neuron.bound(site))
            if site is not None:
                module.__dict__[place] = site
                stack.callback(module.__dict__.pop, place, None)
        for module in timed:
            module.lengths = lengths
            stack.callback(module.__dict__.pop, "lengths", None)
        yield
