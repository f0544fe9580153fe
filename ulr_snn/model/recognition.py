"""Models of other libraries on the scans of `ulr_snn`'s own neurons, where their structure allows it.

A pass over a few samples is recorded: which modules run in every time step, and what each of them reads. A model is a
chain if every module reads the output of the module before it in the same step. If its neurons also have the equations
of `LIF` or `RecurrentLIF`, the chain runs over the whole sequence in place of the model, with the same parameters,
names and sites. The chain must reproduce the recording. If only the beginning of a model is a chain, and nothing behind
it reads more than its last output, the model's own code runs the rest (`tail.py`). Otherwise it runs the whole model.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ulr_snn.adapters import BlackBox, StepNeuron, adapter_of
from ulr_snn.kernels.precision import full_precision
from ulr_snn.model.call import (
    Call,
    coupled_modules,
    generator_state,
    no_side_effects,
    set_generator_state,
)
from ulr_snn.model.chain import OVER_TIME, Chain, EachStep, NoChain, OverTime, Shape, StepByStep, hooked
from ulr_snn.model.discovery import find_layers
from ulr_snn.model.entry import over_time
from ulr_snn.model.equivalence import check_numbers, equations, through
from ulr_snn.model.events import Frames
from ulr_snn.model.finding import OF_SHAPES
from ulr_snn.model.glue import between
from ulr_snn.model.graph import leaves
from ulr_snn.model.neurons import LIF, Fold, SpikingNeuron
from ulr_snn.model.recording import Given, Link, Read, Recorder
from ulr_snn.model.tail import Tail
from ulr_snn.model.trees import tensors
from ulr_snn.noise.firing import Logistic
from ulr_snn.noise.kinds import CurrentNoise, WeightNoise
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.sites.binding import Layers, bind, inside, spiking_layers

SAMPLES, STEPS = 8, 32  # samples and time steps of a batch that are recorded
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
def recognise(
    model: nn.Module, call: Call, frames: Frames, dtype: torch.dtype, noise: Mapping[str, Any], whole: bool = False
) -> Chain:
    """Returns the chain that is equivalent to a model on frames [T, B, ...] like these, or raises NoChain. call: how
    the model is called; noise: see `ULR`; whole: the chain must be all of the model."""
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
            return recorded(model, call, frames[:steps, :SAMPLES].to(dtype), noise, whole)
        except NoChain:
            raise
        except Exception as error:  # the model may need all time steps
            if steps == len(frames) and not isinstance(error, OF_SHAPES):
                raise
            reason = error
    raise NoChain(f"it cannot be recorded, {type(reason).__name__}") from reason


def recorded(model: nn.Module, call: Call, x: Tensor, noise: Mapping[str, Any], whole: bool) -> Chain:
    """Records a model with events x [T, B, ...] and returns its chain. A single step or sample is taken twice. Raises
    NoChain, and any error of the model."""
    notes: list[str] = []
    if len(x) == 1 and call.way == "static":
        raise NoChain("it runs a single time step")
    x = x.repeat(2 if len(x) == 1 else 1, 2 if x.shape[1] == 1 else 1, *[1] * (x.ndim - 2)).contiguous()
    layers = find_layers(model, lambda: x, call, noise, notes)
    return recognised(model, call, x, layers, whole or bool(notes))


def recognised(model: nn.Module, call: Call, x: Tensor, layers: Layers, whole: bool = False) -> Chain:
    """Returns the chain that equals the model on events x [T, B, ...], T and B at least 2, or raises NoChain."""
    check_neurons(model, layers)
    why = unfit(model, layers)
    steps = [neuron for _, neuron in layers if isinstance(neuron, StepNeuron) and not neuron.scans]
    if why and (whole or all(isinstance(neuron.ours(x), str) for neuron in steps)):
        raise NoChain(why)
    with no_side_effects(model), without_dropout(model):
        recording = Recording.of(model, call, x, layers)
        try:
            if why:
                raise NoChain(why)
            return recording.chain()
        except NoChain as error:
            beginning = None if whole else recording.beginning(str(error))
            if beginning is None:
                raise
            return beginning


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


@dataclass
class Recording:
    """A recorded pass of deterministic firing. events: what the model was given; outputs: what is read of its result;
    generator: state of torch's generators before the pass."""

    model: nn.Module
    call: Call
    x: Tensor
    layers: Layers
    recorder: Recorder
    start: Given
    outputs: Tensor
    generator: Any

    @classmethod
    def of(cls, model: nn.Module, call: Call, x: Tensor, layers: Layers) -> "Recording":
        """Records a pass over events x [T, B, ...]."""
        recorder, start = Recorder(model, layers), Given.of(x[:1] if call.way == "static" else x)
        start.tensor = start.leaf.clone()  # a model may change its input in place
        start.version = start.tensor._version
        generator, firing = generator_state(), bind(model, NoiseLevel(Logistic()), steps=len(x), layers=layers)
        with torch.enable_grad(), firing, recorder.watching():
            (outputs,) = tensors(call.selected(model, start.tensor))
        if idle := [name for name, _ in layers if name not in (*recorder.calls, *recorder.odd)]:
            raise NoChain(f"{idle[0]} does not run")
        return cls(model, call, x, layers, recorder, start, outputs, generator)

    @property
    def axis(self) -> int:
        """The axis of time in the outputs."""
        return int(self.call.view.slots[0].axes == "BT")

    @property
    def links(self) -> list[Link]:
        return self.recorder.links(*self.x.shape[:2])

    def check_link(self, before: Link | None, link: Link) -> None:
        """Raises NoChain unless a link reads what the link before it gives."""
        check_link(self.start, before, link, self.call.way == "static")

    def chain(self) -> Chain:
        """Returns the chain that is all of the model. Raises NoChain."""
        links = self.links
        for reason in self.recorder.odd.values():
            raise NoChain(reason)
        for i, link in enumerate(links):
            self.check_link(links[i - 1] if i else None, link)
        kind = check_end(links[-1], self.outputs, self.axis)
        stages, swapped, currents = assembled(links, self.recorder.neurons, self.x)
        stages += [OverTime(kind)] if kind else []
        chain = Chain(self.model, stages, swapped, [link.name for link in links])
        self.check_numbers(chain, links, swapped, [*currents, self.outputs.detach().transpose(0, self.axis)])
        return chain

    def check_numbers(self, chain: Chain, links: list[Link], swapped: dict[int, LIF], expected: list[Tensor]) -> None:
        """Raises NoChain unless the stages of a chain give the expected numbers."""
        fired = [link.sequence(True) for link in links if id(link.module) in swapped]
        check_numbers(chain, self.x, expected, fired)

    def beginning(self, why: str) -> Chain | None:
        """Returns a chain of the first modules with the rest of the model behind it; None if there is no such chain
        that has a neuron of its own. why: why the model as a whole is no chain."""
        links, neurons = self.links, self.recorder.neurons
        if self.start.tensor._version != self.start.version:
            return None
        for count in range(self.reach(links), 0, -1):
            own = [link for link in links[:count] if link.name in neurons and not neurons[link.name].scans]
            if not own:
                return None
            if self.hidden(links, count):
                with suppress(Exception):  # what the rest of a model does with blanks is its own
                    return self.with_tail(links, count, why)
        return None

    def reach(self, links: list[Link]) -> int:
        """Returns how many of the first links are those of a chain."""
        size = self.x.shape[:2]
        for i, link in enumerate(links):
            try:
                self.check_link(links[i - 1] if i else None, link)
                features, _ = link.features(False, *size), link.features(True, *size)
                if link.name in self.recorder.neurons:
                    equations(self.recorder.neurons[link.name], link, features, self.x)
                    continue
                check_module(link.name, link.module)
                if link.mode == "whole":
                    check_each_step(link)
            except NoChain:
                return i
        return len(links)

    def hidden(self, links: list[Link], count: int) -> bool:
        """Returns whether nothing behind the first links reads what they give, except of the last of them."""
        inner = {id(call.gave.leaf) for link in links[: count - 1] for call in link.calls}
        later = [call.read for link in links[count:] for call in link.calls]
        return not inner & leaves([self.outputs, *later])

    def with_tail(self, links: list[Link], count: int, why: str) -> Chain:
        """Returns the chain of so many first links with the rest of the model behind it. Raises NoChain, and any error
        of the rest."""
        size = self.x.shape[0], self.x.shape[1]
        tail = Tail(self.model, self.call, links, count, size, self.axis)
        links = links[:count]
        stages, swapped, currents = assembled(links, self.recorder.neurons, self.x)
        chain = Chain(self.model, stages, swapped, [link.name for link in links], tail, why)
        known = links[-1].sequence(True).reshape(*size, *links[-1].features(True, *size))
        self.check_numbers(chain, links, swapped, [*currents, known])
        given, expected = self.start.leaf.detach().clone(), self.outputs.detach().transpose(0, self.axis)
        with torch.no_grad(), bind(self.model, NoiseLevel(Logistic()), steps=len(self.x), layers=self.layers):
            set_generator_state(self.generator)
            outputs = tail(given, known)
        if outputs.shape != expected.shape or not torch.allclose(outputs, expected):
            raise NoChain("the model's own code behind the chain gives other numbers")
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
        row_wise += link.glue
        if link.glue:
            features = through(link.glue, x.new_zeros(2, *features)).shape[1:]
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


def check_neurons(model: nn.Module, layers: Layers) -> None:
    """Raises NoChain for a model that is a single layer, or has other layers than those of libraries."""
    if any(name == "model" for name, _ in layers) and not model._modules.get("model"):
        raise NoChain("it is a single layer")
    for name, neuron in layers:
        if isinstance(neuron, SpikingNeuron | BlackBox):
            raise NoChain(f"{name} is no neuron of another library")


def unfit(model: nn.Module, layers: Layers) -> str:
    """Returns which module keeps a model from being a chain; nothing if there is none."""
    names = {name for name, _ in layers}
    try:
        for name, module in model.named_modules():
            check_module(name, module, neuron=any(inside(name, site) for site in names))
    except NoChain as error:
        return str(error)
    return ""


def check_module(name: str, module: nn.Module, neuron: bool = False) -> None:
    """Raises NoChain for a module that cannot be part of a chain. neuron: it is one, or part of one."""
    if hooked(module):
        raise NoChain(f"{name or 'the model'} has hooks")
    if module._modules or neuron:
        return
    if type(module) not in EACH_ROW and coupled_modules(module):
        raise NoChain(f"{type(module).__name__} is in training mode and not one of torch's own")
    if not row_by_row(module):
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
    """Raises NoChain unless each call of a module reads the output of the module before it for the same time step, at
    most through functions that `glue.py` knows. static: the first module reads the same input in all time steps."""
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
        fits = fits or find_glue(before, link)
    else:
        fits = stacks(link.calls[0].read.grad_fn, before.calls)
    unchanged = all(call.read._version == call.version for call in link.calls)
    if not fits or not unchanged:
        what = "the events" if before is None else f"{before.name} gives in the same time step"
        raise NoChain(f"{link.name} reads something else than {'' if before is None else 'what '}{what}")


def find_glue(before: Link, link: Link) -> bool:
    """Finds the functions through which a module reads, at every time step, what the module before it gives. Returns
    whether there are such."""
    found = [between(b.gave.leaf, call.read) for b, call in zip(before.calls, link.calls, strict=True)]
    if not found[0] or any(repr(modules) != repr(found[0]) for modules in found):
        return False
    link.glue = found[0]
    return True


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
