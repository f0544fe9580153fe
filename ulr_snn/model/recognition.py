"""Models of other libraries on the scans of `ulr_snn`'s own neurons, where their structure allows it.

A pass over a few samples is recorded: which modules run in every time step, and what each of them reads. A model is a
chain if every module reads the output of the module before it in the same step. If its neurons also have the equations
of `LIF` or `RecurrentLIF`, the chain runs over the whole sequence in place of the model, with the same parameters,
names and sites. The chain must reproduce the recording. Otherwise the model's own code runs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ulr_snn.adapters import BlackBox, StepNeuron, adapter_of
from ulr_snn.kernels.precision import full_precision
from ulr_snn.model.call import Call, coupled_modules, model_outputs, no_side_effects
from ulr_snn.model.chain import OVER_TIME, Chain, EachStep, NoChain, OverTime, Shape, StepByStep, hooked
from ulr_snn.model.discovery import find_layers
from ulr_snn.model.entry import over_time
from ulr_snn.model.events import Frames
from ulr_snn.model.finding import OF_SHAPES
from ulr_snn.model.neurons import LIF, Fold, SpikingNeuron
from ulr_snn.model.recording import Given, Link, Read, Recorder
from ulr_snn.model.trees import tensors
from ulr_snn.noise.firing import Logistic
from ulr_snn.noise.kinds import CurrentNoise, WeightNoise
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.sites.binding import Layers, bind, inside, spiking_layers

SAMPLES, STEPS = 8, 32  # samples and time steps of a batch that are recorded
TRIAL = 24  # time steps of random currents on which two neurons are compared
EACH_STEP = (nn.Linear, nn.Identity, nn.ReLU, nn.Sigmoid, nn.Tanh, nn.Dropout)  # they take any axes before the features
EACH_ROW = (
    *(*EACH_STEP, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Softplus, nn.Flatten, nn.Unflatten),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    *(nn.GroupNorm, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)  # they treat each row of a batch by itself; batch norm only in evaluation mode


@full_precision()
def recognise(model: nn.Module, call: Call, frames: Frames, dtype: torch.dtype, noise: Mapping[str, Any]) -> Chain:
    """Returns the chain that is equivalent to a model on frames [T, B, ...] like these, or raises NoChain. call: how
    the model is called; noise: see `ULR`."""
    for name, site in noise.items():
        if isinstance(site, CurrentNoise) or (isinstance(site, WeightNoise) and site.per_sample):
            raise NoChain(f"there is noise of its own at {name}")
    if not any(isinstance(neuron, StepNeuron) for _, neuron in spiking_layers(model)):
        raise NoChain("")
    if call.inputs.slots or len(call.view.slots) != 1:
        raise NoChain("it has several inputs, or several of its outputs are read")
    lengths = {len(frames)} if call.way == "static" else {min(STEPS, len(frames)), len(frames)}
    for steps in sorted(lengths):
        try:
            return recorded(model, call, frames[:steps, :SAMPLES].to(dtype), noise)
        except NoChain:
            raise
        except Exception as error:  # the model may need all time steps
            if steps == len(frames) and not isinstance(error, OF_SHAPES):
                raise
            reason = error
    raise NoChain(f"it cannot be recorded, {type(reason).__name__}") from reason


def recorded(model: nn.Module, call: Call, x: Tensor, noise: Mapping[str, Any]) -> Chain:
    """Records a model with events x [T, B, ...] and returns its chain. A single step or sample is taken twice. Raises
    NoChain, and any error of the model."""
    if len(x) == 1 and call.way == "static":
        raise NoChain("it runs a single time step")
    x = x.repeat(2 if len(x) == 1 else 1, 2 if x.shape[1] == 1 else 1, *[1] * (x.ndim - 2)).contiguous()
    return recognised(model, call, x, find_layers(model, lambda: x, call, noise))


def recognised(model: nn.Module, call: Call, x: Tensor, layers: Layers) -> Chain:
    """Returns the chain that equals the model on events x [T, B, ...], T and B at least 2, or raises NoChain."""
    check_modules(model, layers)
    with no_side_effects(model), without_dropout(model):
        return checked(model, call, x, layers)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Turns torch's dropout off within this context. In a chain it draws the masks of all time steps at once."""
    dropping = [module for module in model.modules() if isinstance(module, _DropoutNd) and module.training]
    try:
        for module in dropping:
            module.training = False
        yield
    finally:
        for module in dropping:
            module.training = True


def checked(model: nn.Module, call: Call, x: Tensor, layers: Layers) -> Chain:
    """Records the model on events x, and returns the chain that gives the same numbers."""
    static = call.way == "static"
    recorder, start = Recorder(model, layers), Given.of(x[:1] if static else x)
    start.tensor = start.leaf.clone()  # a model may change its input in place
    start.version = start.tensor._version
    firing = bind(model, NoiseLevel(Logistic()), steps=len(x), layers=layers)
    with torch.enable_grad(), firing, recorder.watching():
        (outputs,) = tensors(call.selected(model, start.tensor))
    if idle := [name for name, _ in layers if name not in recorder.calls]:
        raise NoChain(f"{idle[0]} does not run")
    steps, rows = x.shape[:2]
    links = recorder.links(steps, rows)
    for i, link in enumerate(links):
        check_link(start, links[i - 1] if i else None, link, static)
    axis = int(call.view.slots[0].axes == "BT")
    kind = check_end(links[-1], outputs, axis)
    stages, swapped, currents = assembled(links, recorder.neurons, x)
    stages += [OverTime(kind)] if kind else []
    chain = Chain(model, stages, swapped, [link.name for link in links])
    fired = [link.sequence(True) for link in links if id(link.module) in swapped]
    check_numbers(chain, x, [*currents, outputs.detach().transpose(0, axis)], fired)
    return chain


def assembled(
    links: list[Link], neurons: Mapping[str, StepNeuron], x: Tensor
) -> tuple[list[nn.Module], dict[int, LIF], list[Tensor]]:
    """Returns the stages of a chain, its neurons of `ulr_snn`, and their recorded currents [T, B, ...]. The neurons are
    keyed by the id of the module whose place they take. Modules that treat each row by itself wait in `row_wise` for
    one `Fold`. Raises NoChain."""
    (steps, rows), features = x.shape[:2], x.shape[2:]
    stages: list[nn.Module] = []
    swapped: dict[int, LIF] = {}
    row_wise: list[nn.Module] = []
    currents = []
    for link in links:
        if link.features(False, steps, rows) != features:
            row_wise.append(Shape(link.features(False, steps, rows)))
        features = link.features(True, steps, rows)
        if link.name in neurons:
            entry, neuron = equations(neurons[link.name], link, features, x)
            currents.append(through(entry, link.sequence(False).reshape(steps, rows, *features)))
            swapped[id(link.module)] = neuron
            before = [module for module in entry if not over_time(module)]
            stages += [*folded([*row_wise, *before]), *entry[len(before) :], neuron]
            row_wise = []
        elif link.mode == "whole":
            check_each_step(link)
            known = type(link.module) is nn.Linear  # a plain Linear keeps its fast paths
            stages += [*folded(row_wise), link.module if known else EachStep(link.module)]
            row_wise = []
        elif link.mode == "step" and isinstance(link.module, _BatchNorm) and coupled_modules(link.module):
            stages += [*folded(row_wise), StepByStep(link.module)]
            row_wise = []
        else:
            row_wise.append(link.module)
    return stages + folded(row_wise), swapped, currents


def folded(modules: list[nn.Module]) -> list[nn.Module]:
    """Returns the modules as one `Fold`, in a list that is empty if there are none."""
    return [Fold(*modules)] if modules else []


def check_modules(model: nn.Module, layers: Layers) -> None:
    """Raises NoChain if the model has a module that cannot be part of a chain."""
    names = {name for name, _ in layers}
    if "model" in names and not model._modules.get("model"):
        raise NoChain("it is a single layer")
    for name, neuron in layers:
        if isinstance(neuron, SpikingNeuron | BlackBox):
            raise NoChain(f"{name} is no neuron of another library")
    if coupled := next((module for module in coupled_modules(model) if type(module) not in EACH_ROW), None):
        raise NoChain(f"{type(coupled).__name__} is in training mode and not one of torch's own")
    for name, module in model.named_modules():
        if hooked(module):
            raise NoChain(f"{name or 'the model'} has hooks")
        if not module._modules and not any(inside(name, site) for site in names) and not row_by_row(module):
            raise NoChain(f"{name or 'the model'} is a {type(module).__name__}")


def row_by_row(module: nn.Module) -> bool:
    """Returns whether a module is known to treat each row of a batch by itself (in evaluation mode)."""
    kind = type(module)
    return kind in EACH_ROW or (per_row(module) and any(base in EACH_ROW for base in kind.__mro__))


def per_row(module: nn.Module) -> bool:
    """Returns whether the adapter of the module's library says that it treats each row by itself."""
    adapter = adapter_of(module)
    return adapter is not None and adapter.per_row(module)


def check_each_step(link: Link) -> None:
    """Raises NoChain unless a module that takes whole sequences treats each time step by itself."""
    module = link.module
    axis = {nn.Flatten: "start_dim", nn.Unflatten: "dim"}.get(type(module))
    later = axis is not None and getattr(module, axis) >= 2
    lifted = per_row(module) and getattr(module, "step_mode", "m") == "m"
    if not (later or lifted or type(module) in EACH_STEP):
        raise NoChain(f"{link.name} is called with a whole sequence")


def check_link(start: Given, before: Link | None, link: Link, static: bool) -> None:
    """Raises NoChain unless each call of a module reads the output of the module before it for the same time step.
    static: the first module reads the same input in all time steps."""
    if before is None or before.mode != "step":
        source = start if before is None else before.calls[0].gave
        if link.mode == "step":
            times = [0 if static and before is None else t for t in range(len(link.calls))]
            at = len(source.tensor) > max(times)
            fits = at and all(source.read_by(call.read, t) for t, call in zip(times, link.calls, strict=True))
        else:
            fits = source.read_by(link.calls[0].read)
    elif link.mode == "step":
        fits = all(b.gave.read_by(call.read) for b, call in zip(before.calls, link.calls, strict=True))
    else:
        fits = stacks(link.calls[0].read.grad_fn, before.calls)
    unchanged = all(call.read._version == call.version for call in link.calls)
    if not fits or not unchanged:
        what = "the events" if before is None else f"{before.name} gives in the same time step"
        raise NoChain(f"{link.name} reads something else than {'' if before is None else 'what '}{what}")


def stacks(node: Any, calls: list[Read], axis: int = 0) -> bool:
    """Returns whether a node of the graph stacks the outputs of these calls, in their order, along this axis."""
    if type(node).__name__ != "StackBackward0" or node._saved_dim != axis:
        return False
    parents = [getattr(parent, "variable", None) for parent, _ in node.next_functions]
    return len(parents) == len(calls) and all(v is c.gave.leaf for v, c in zip(parents, calls, strict=True))


def check_end(last: Link, outputs: Tensor, axis: int) -> str | None:
    """Returns the reduction over time of the last module's outputs, a key of `OVER_TIME`, or None. axis: that of time
    in the outputs. Raises NoChain."""
    node: Any = outputs.grad_fn  # torch does not declare what nodes save
    kind = None
    if type(node).__name__ in OVER_TIME and tuple(node._saved_dim) in ((0,), (1,)) and not node._saved_keepdim:
        kind, axis, node = type(node).__name__, node._saved_dim[0], node.next_functions[0][0]
    if last.mode == "step":
        fits = stacks(node, last.calls, axis)
    elif axis:
        fits = False
    elif kind is not None:
        fits = last.mode == "whole" and getattr(node, "variable", None) is last.calls[0].gave.leaf
    else:
        fits = last.calls[0].gave.read_by(outputs)
    if not fits:
        raise NoChain(f"its outputs are something else than what {last.name} gives in every time step")
    return kind


def equations(neuron: StepNeuron, link: Link, features: torch.Size, like: Tensor) -> tuple[list[nn.Module], LIF]:
    """Returns a neuron of `ulr_snn` with the equations of this one, and the modules that its current passes before.
    Raises NoChain unless both neurons fire alike on the recorded currents and on random ones."""
    found = neuron.ours(like)
    if isinstance(found, str):
        raise NoChain(f"{link.name} ({type(link.module).__name__}): {found}")
    entry, ours = found
    size = float(neuron.threshold.detach().abs().mean())
    generator = torch.Generator().manual_seed(0)
    random = 2 * size * torch.randn(TRIAL, 2, *features, generator=generator).to(like)
    alone = bind(link.module, NoiseLevel(Logistic()), steps=TRIAL, layers=[(link.name, neuron)])
    with no_side_effects(link.module), torch.no_grad(), alone:
        theirs = model_outputs(link.module, random, link.mode == "step")
    steps = (len(like), like.shape[1])
    recorded = [link.sequence(gave).reshape(*steps, *features) for gave in (False, True)]
    for current, spikes in ((random, theirs), recorded):
        if not fires_alike(entry, ours, current, spikes, size):
            raise NoChain(f"{link.name} ({type(link.module).__name__}) fires otherwise than {ours}")
    return entry, ours


@torch.no_grad()
def fires_alike(entry: list[nn.Module], ours: LIF, current: Tensor, spikes: Tensor, size: float) -> bool:
    """Returns whether our neuron, given the earlier spikes, fires each next one, up to rounding."""
    if spikes.shape != current.shape:
        return False
    drive = ours.fired(through(entry, current), known=spikes)[1]
    near = 1e3 * torch.finfo(drive.dtype).eps * (drive.abs().amax() + size)
    return bool((((drive > 0).to(spikes) == spikes) | (drive.abs() <= near)).all())


@torch.no_grad()
def through(modules: list[nn.Module], x: Tensor) -> Tensor:
    """Applies modules one after another."""
    for module in modules:
        x = module(x)
    return x


@torch.no_grad()
def check_numbers(chain: Chain, x: Tensor, expected: list[Tensor], fired: list[Tensor]) -> None:
    """Raises NoChain unless the chain has the expected currents and outputs, given the spikes that were fired."""
    relative, absolute = (1e-3, 1e-4) if x.dtype != torch.float64 else (1e-9, 1e-9)
    numbers, spikes = iter(expected), iter(fired)

    def check(found: Tensor) -> None:
        number = next(numbers)
        if found.shape != number.shape or not torch.allclose(found, number, relative, absolute):
            raise NoChain("the chain gives other numbers than the model")

    for stage in chain.stages:
        if isinstance(stage, LIF):
            check(x)
            x = next(spikes).reshape(x.shape)
        else:
            x = stage(x)
    check(x)
