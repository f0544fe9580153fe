"""Functions that find the firing sites of a model and bind them to it."""

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from ulr_snn.adapters import BlackBox, StepNeuron, adapt, adapted, current_of, fresh_state, libraries
from ulr_snn.adapters.intercept import SKIPPED, runs_again
from ulr_snn.adapters.memories import own_memories
from ulr_snn.errors import UsageError
from ulr_snn.kernels.stateless import quick_convolutions
from ulr_snn.kernels.walk import modules_in
from ulr_snn.model.chain import own_code
from ulr_snn.model.neurons import SpikingNeuron, Timed, spread_without_padding, step_mask
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.noise.random import Drawer, Noise
from ulr_snn.noise.secant import farthest
from ulr_snn.sites.current import CurrentSite
from ulr_snn.sites.records import InPlaceGuard, Links, Record
from ulr_snn.sites.step import StepSite, other_steps


@dataclass
class Site:
    """The firing site of one neuron layer. It fires deterministically if `noise` is None."""

    name: str
    index: int
    level: NoiseLevel
    noise: Noise | None
    records: list[Record]  # of all sites, in the order in which the sites ran
    lengths: Tensor | None
    links: Links | None  # keep spikes in the graph behind the current; None: spikes are autograd leaves
    guard: InPlaceGuard
    steps: int = 0  # time steps of the events; 0: not known
    calls: int = 0

    def fire_sequence(self, neuron: SpikingNeuron, current: Tensor) -> Tensor:
        """Runs the neuron over time and draws its spikes once; current [T, B, ...] -> spikes [T, B, ...]."""
        with torch._C.DisableTorchFunction():  # no public name; `SpikePooling` would look at each operation, at a cost
            return self._fired(neuron, current)

    def _fired(self, neuron: SpikingNeuron, current: Tensor) -> Tensor:
        call, self.calls = self.calls, self.calls + 1
        if self.lengths is not None and self.steps and len(current) != self.steps:
            raise other_steps(self.name)
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
        """Returns the standard deviation of the membranes under deterministic firing, without padding. Stores their
        distance from the threshold."""
        drive = neuron.fired(current)[1]
        self.level.store_distances({name: farthest(drive, mask)})
        return spread_without_padding(drive + neuron.threshold, mask)


def record_of(
    name: str,
    neuron: SpikingNeuron,
    current: Tensor,
    scale: Tensor,
    fired: tuple[Tensor, Tensor, Tensor | None],
    level: NoiseLevel,
    before: Tensor | None = None,
) -> Record:
    """Returns the record of a layer. fired: the result of `SpikingNeuron.fired`. before: spikes of the step before the
    first; None at the start of the sequence."""
    spikes, x, fed_back = fired
    x, through = neuron.x_at(current, spikes, x, fed_back, scale, before)
    mask = None if neuron.lengths is None else step_mask(neuron.lengths, current)
    arguments = (name, neuron, current.detach(), scale.detach(), x, spikes, [spikes], level.firing, mask)
    over = level.secants(name, scale)
    return Record(*arguments, fed_back, through=through, over=over, arrived=[current])


def call_name(name: str, call: int) -> str:
    """Returns the site name of a layer's call (1, 2, ...) in a forward pass. Each call is a site with its own noise and
    feedback."""
    return name if call == 1 else f"{name}#{call}"


def call_index(layer: int, call: int) -> int:
    """Returns the noise's index for a call (0, 1, ...) of a layer."""
    return layer + (call << 20)


def site_index(layers: "Layers", site: str) -> int:
    """Returns the `call_index` for a site's name."""
    name, _, call = site.partition("#")
    return call_index([name for name, _ in layers].index(name), int(call or 1) - 1)


Layers = list[tuple[str, SpikingNeuron | StepNeuron]]


def spiking_layers(model: nn.Module, boxes: Mapping[str, BlackBox] | None = None) -> Layers:
    """Returns the model's spiking layers by name, in module order. Black boxes are among them, modules inside a black
    box are not. Raises UsageError for a layer of another library that cannot be trained."""
    boxes = boxes or {}
    found: Layers = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{box}.") for box in boxes):
            continue
        neuron: SpikingNeuron | StepNeuron | None = boxes.get(name)
        if neuron is None:
            neuron = module if isinstance(module, SpikingNeuron) else adapt(module, name or "model")
        if neuron is not None:
            found.append((name or "model", neuron))
    return found


def module_of(neuron: SpikingNeuron | StepNeuron) -> nn.Module:
    """Returns the module of a spiking layer in the user's model."""
    return neuron if isinstance(neuron, SpikingNeuron) else neuron.module


@contextmanager
def seeing_spikes(layers: Layers, see: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """Within this context, calls `see(name, module, spikes)` after each call of each layer."""
    with ExitStack() as stack:
        for name, neuron in layers:
            module = module_of(neuron)
            watched = neuron if isinstance(neuron, StepNeuron) else StepNeuron(module)
            stack.enter_context(watched.seeing(partial(see, name, module)))
        yield


def user_modules(model: nn.Module) -> list[nn.Module]:
    """Returns the modules whose classes come from no known library."""
    known = {"torch", "ulr_snn", *libraries()}
    return [module for module in modules_in(model) if type(module).__module__.partition(".")[0] not in known]


def open_modules(model: nn.Module) -> list[nn.Module]:
    """Returns the modules that may get noise, though no layer in them is known: a user's, and those of libraries that
    are no neurons known to their adapters."""
    others = [m for m in model.modules() if type(m).__module__.partition(".")[0] not in SKIPPED]
    return [module for module in others if not isinstance(adapted(module), StepNeuron)]


def inside(name: str, module: str) -> bool:
    """Returns whether the name of a module or parameter is `module` or lies in `module`."""
    return name == module or name.startswith(f"{module}.")


def unknown(model: nn.Module) -> list[str]:
    """Returns the names of a model's inner `user_modules` that contain no known spiking layer."""
    own = {id(module) for module in user_modules(model)}
    names = [name for name, module in model.named_modules() if name and id(module) in own]
    spiking = [name for name, _ in spiking_layers(model)]
    return [name for name in names if not any(inside(site, name) for site in spiking)]


def check_layers(
    model: nn.Module, layers: Layers, others: Collection[object] = (), notes: Collection[str] = ()
) -> None:
    """Raises UsageError if nothing can get noise. others: anything besides layers that may get noise; notes: see
    `BoundModel`."""
    if not layers and not others:
        if notes:
            raise UsageError(f"{type(model).__name__} has no layer that gets noise: {next(iter(notes))}")
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
    """Binds a firing site to every spiking layer, and the lengths [B] to every module that runs over time.

    Yields the list of their records. The list ends empty if a layer was measured in the pass (see `StepSite`).

    steps: number of time steps, for layers that run step by step. layers: the model's layers; None: they are looked up.
    links: keep spikes in the graph behind their currents; None: spikes are autograd leaves. guard: see `InPlaceGuard`.
    """
    guard = guard or InPlaceGuard(copies=True)
    records: list[Any] = []
    calibrated = set(level.starts)
    layers = spiking_layers(model) if layers is None else layers
    sites: list[Site | StepSite] = []
    for index, (name, neuron) in enumerate(layers):
        own = None if name in level.noiseless or never_fires(neuron) else noise
        if isinstance(neuron, SpikingNeuron) or (neuron.scans and own is not None):
            sites.append(Site(name, index, level, own, records, lengths, links, guard, steps))
        else:
            arguments = name, index, level, own, records, neuron, neuron.calls_in(steps), lengths, guard
            sites.append(CurrentSite(*arguments) if isinstance(neuron, BlackBox) else StepSite(*arguments, links=links))
    with bind_sites(model, sites, lengths, layers):
        yield records
    measured = [i for i, record in enumerate(records) if isinstance(record, StepSite) and record.measured]
    if not measured:
        for site in sites:
            if isinstance(site, StepSite):
                site.finish()
        records[:] = [record.record() if isinstance(record, StepSite) else record for record in records]
        return
    first, *later = records[measured[0] :]
    first.finish()
    for record in later:  # a layer without noise fed them, so their calibration in this pass does not count
        name = record.site if isinstance(record, Record) else record.name
        if name not in calibrated:
            level.starts.pop(name, None)
    records.clear()


def never_fires(neuron: SpikingNeuron | StepNeuron) -> bool:
    """Returns whether a threshold is infinite. Such neurons are readouts."""
    threshold = torch.as_tensor(neuron.threshold)
    if threshold.numel() == 1 and not threshold.is_meta:  # as most are
        return not math.isfinite(threshold.item())
    return not bool(torch.isfinite(threshold).all())


_turns: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # not attributes, since models are copied and saved
_turns_made = Lock()
_seen: WeakSet[nn.Module] = WeakSet()  # models of which a pass with noise and a graph has run


def _after_fork() -> None:
    """Frees all locks in a forked child, which lacks the threads that held them."""
    global _turns_made
    _turns.clear()
    _turns_made = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def turn(model: nn.Module) -> Any:
    """Returns the reentrant lock of a model. A thread holds it while it has sites, modes or flows set in the model's
    modules."""
    with _turns_made:
        return _turns.setdefault(model, RLock())


@contextmanager
def seeing_sequences(module: nn.Module, site: StepSite) -> Iterator[None]:
    """Within this context, a site takes each sequence before its module runs over it."""

    def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        sequence = current_of(arguments, named)
        if sequence is not None:
            site.takes(sequence)

    hook = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def firing_once(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within this context, a layer that would fire anew in the backward pass raises a UsageError."""

    def check(module: nn.Module, _: Any) -> None:
        if runs_again():
            raise UsageError(
                f"a {type(module).__name__} fires in a part of the model that is checkpointed, and would fire anew in "
                "the backward pass; leave torch.utils.checkpoint out, or put only layers that do not fire into it"
            )

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(check).remove)
        yield


@contextmanager
def bind_sites(
    model: nn.Module, sites: Sequence[Any], lengths: Tensor | None, layers: Layers | None = None
) -> Iterator[None]:
    """Within this context, each spiking layer has its site: an object with `fire_sequence(neuron, current)` or an
    `adapters.Step`. Other threads wait. Raises UsageError if this thread has already bound the model."""
    neurons = [neuron for _, neuron in (spiking_layers(model) if layers is None else layers)]
    timed = [module for module in modules_in(model) if isinstance(module, Timed)]
    modules = [module_of(neuron) for neuron in neurons]
    slots = [neuron.slot if isinstance(neuron, StepNeuron) else "site" for neuron in neurons]
    with turn(model), turn(own_code(model)), ExitStack() as stack:
        if any(slot and module.__dict__.get(slot) is not None for module, slot in zip(modules, slots, strict=True)):
            raise UsageError(f"{type(model).__name__} is already bound; leave the other attach or evaluate first")
        stack.enter_context(fresh_state(model))
        stack.enter_context(quick_convolutions(own_code(model)))
        stack.enter_context(own_memories(user_modules(own_code(model))))
        for neuron, module, slot, site in zip(neurons, modules, slots, sites, strict=True):
            if isinstance(neuron, StepNeuron):
                stack.enter_context(neuron.bound(site))
                if isinstance(site, StepSite) and neuron.by_sequence and not neuron.whole:
                    stack.enter_context(seeing_sequences(module, site))
            if site is not None and slot:
                module.__dict__[slot] = site
                stack.callback(module.__dict__.pop, slot, None)
        noisy = any(getattr(site, "noise", site) is not None for site in sites) and torch.is_grad_enabled()
        if noisy and model not in _seen:
            stack.enter_context(firing_once(modules))
        for module in timed:
            module.lengths = lengths
            stack.callback(module.__dict__.pop, "lengths", None)
        yield
        if noisy:
            _seen.add(model)
