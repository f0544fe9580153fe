"""Models of other libraries on the scans of `ulr_snn`'s own neurons, where their structure allows it.

A pass over a few samples is recorded: which modules run in every time step, and what each of them reads. A model is a
chain if every module reads the output of the module before it in the same step. If its neurons also have the equations
of `LIF` or `RecurrentLIF`, the chain runs over the whole sequence in place of the model, with the same parameters,
names and sites. The chain must reproduce the recording. If only the beginning of a model is a chain, and nothing behind
it reads more than its last output, the model's own code runs the rest (`tail.py`). Otherwise it runs the whole model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ulr_snn.adapters import BlackBox, StepNeuron
from ulr_snn.kernels.precision import full_precision
from ulr_snn.model.call import Call, generator_state, no_side_effects, set_generator_state
from ulr_snn.model.chain import Chain, NoChain, OverTime
from ulr_snn.model.discovery import find_layers
from ulr_snn.model.equivalence import check_numbers, equations
from ulr_snn.model.events import Frames
from ulr_snn.model.finding import OF_SHAPES
from ulr_snn.model.graph import leaves
from ulr_snn.model.habits import Watched, changed, holds_nan, options, own_buffers
from ulr_snn.model.links import assembled, check_each_step, check_end, check_link, check_module, check_norms
from ulr_snn.model.neurons import LIF, SpikingNeuron
from ulr_snn.model.recording import Given, Link, Recorder
from ulr_snn.model.tail import Tail
from ulr_snn.model.trees import tensors
from ulr_snn.noise.firing import Logistic
from ulr_snn.noise.kinds import CurrentNoise, WeightNoise
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.sites.binding import Layers, bind, inside, spiking_layers

SAMPLES, STEPS = 8, 32  # samples and time steps of a batch that are recorded
LATER = 512  # time steps of one sample in which the order of calls and the states are compared with the recording


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
            chain = recorded(model, call, frames[:steps, :SAMPLES].to(dtype), noise, whole)
            if call.way != "static" and steps < len(frames):
                check_later(chain, call, frames[:LATER, :1].to(dtype))
            return chain
        except NoChain:
            raise
        except Exception as error:  # the model may need all time steps
            if steps == len(frames) and not isinstance(error, OF_SHAPES):
                raise
            reason = error
    raise NoChain(f"it cannot be recorded, {type(reason).__name__}") from reason


def check_later(chain: Chain, call: Call, x: Tensor) -> None:
    """Raises NoChain unless a model goes on over events x [T, B, ...] as in the first time steps, which were recorded:
    with the modules of the chain in the same order, and with the states of its neurons. This keeps no tensors."""
    model, layers = chain.model, spiking_layers(chain.model)
    recorder = Recorder(model, layers, keeps=False)
    firing = bind(model, NoiseLevel(Logistic()), steps=len(x), layers=layers)
    with no_side_effects(model), torch.no_grad(), firing, recorder.watching():
        call.selected(model, x)
    for name in chain.names:
        if name in recorder.odd:
            raise NoChain(recorder.odd[name])
    whole = [name for name in chain.names if recorder.order.count(name) == chain.names.count(name)]
    order = [name for name in recorder.order if name in chain.names and name not in whole]
    if order != [name for name in chain.names if name not in whole] * len(x):
        raise NoChain("it runs other modules in later time steps")


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
            chain = recording.chain()
        except NoChain as error:
            beginning = None if whole else recording.beginning(str(error))
            if beginning is None:
                raise
            chain = beginning
        chain.passing = recording.passing
        return chain


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
    """A recorded pass of deterministic firing. start: what the model was given; outputs: what is read of its result;
    generator: state of torch's generators before the pass; passing: see `Chain`."""

    model: nn.Module
    call: Call
    x: Tensor
    layers: Layers
    recorder: Recorder
    start: Given
    outputs: Tensor
    generator: Any
    passing: frozenset[tuple[int, str]]

    @classmethod
    def of(cls, model: nn.Module, call: Call, x: Tensor, layers: Layers) -> "Recording":
        """Records a pass over events x [T, B, ...]."""
        recorder, start = Recorder(model, layers), Given.of(x[:1] if call.way == "static" else x)
        start.tensor = start.leaf.clone()  # a model may change its input in place
        start.version = start.tensor._version
        generator, before, chosen = generator_state(), own_buffers(model), options(model)
        firing = bind(model, NoiseLevel(Logistic()), steps=len(x), layers=layers)
        watched = Watched(model, lambda: not recorder.inside)
        with torch.enable_grad(), firing, recorder.watching(), watched:
            (outputs,) = tensors(call.selected(model, start.tensor))
        if idle := [name for name, _ in layers if name not in (*recorder.calls, *recorder.odd)]:
            raise NoChain(f"{idle[0]} does not run")
        if watched.reads:
            raise NoChain("its code reads single numbers, as branches on values do")
        if watched.writes:
            raise NoChain("its code changes parameters or buffers")
        if (name := changed(before, own_buffers(model))) is not None:
            raise NoChain(f"its code changes {name}")
        passing = {key for key, value in options(model).items() if key not in chosen or value != chosen[key]}
        found = cls(model, call, x, layers, recorder, start, outputs, generator, frozenset(passing))
        if not torch.equal(found.again(lambda: call.selected(model, start.leaf.detach().clone())), outputs):
            raise NoChain("its outputs depend on what it has kept of the pass before")
        return found

    @torch.no_grad()
    def again(self, run: Callable[[], Any]) -> Tensor:
        """Returns the outputs of another pass, with the same draws of torch's generators."""
        set_generator_state(self.generator)
        with bind(self.model, NoiseLevel(Logistic()), steps=len(self.x), layers=self.layers):
            (outputs,) = tensors(run())
        return outputs

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
        check_norms(links, len(links))
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
                check_norms(links, i + 1)
                self.check_link(links[i - 1] if i else None, link)
                features, _ = link.features(False, *size), link.features(True, *size)
                neuron = link.name in self.recorder.neurons
                for name in within(link.name):
                    check_module(name, self.model.get_submodule(name), neuron)
                if neuron:
                    equations(self.recorder.neurons[link.name], link, features, self.x)
                    continue
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
        outputs = self.again(lambda: tail(given, known))
        if outputs.shape != expected.shape or not torch.allclose(outputs, expected):
            raise NoChain("the model's own code behind the chain gives other numbers")
        if holds_nan(self.model):
            raise NoChain("the model's own code keeps what it computes of the chain")
        return chain


def within(name: str) -> list[str]:
    """Returns the names of a module and of all modules that hold it, apart from the model."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


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
