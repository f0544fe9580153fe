"""Models of other libraries on the scans of `ulr_snn`'s own neurons, where their structure allows it.

A pass over a few samples is recorded: which modules run in every time step, and what each of them reads. If that is a
chain, every module reading what the one before it gave in the same step, and its neurons have the equations of `LIF` or
`RecurrentLIF`, then the chain runs over the whole sequence in place of the model, with the same parameters by the same
names and the same sites. What was recorded has to come out of it again. Else the model's own code runs (steps.py).
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.adapters import BlackBox, StepNeuron
from ulr_snn.kernels.precision import full_precision
from ulr_snn.kernels.stateless import run
from ulr_snn.losses.named import Objective
from ulr_snn.model.discovery import find_layers
from ulr_snn.model.events import Frames
from ulr_snn.model.forward import coupled_modules, first_output, keep_traces, model_outputs, runs_by_step
from ulr_snn.model.graph import leaves
from ulr_snn.model.neurons import LIF, Fold, SpikingNeuron
from ulr_snn.noise.level import CurrentNoise, Logistic, NoiseLevel, WeightNoise
from ulr_snn.sites.binding import Layers, bind, inside, spiking_layers

SAMPLES, STEPS = 8, 32  # of a batch and of its time steps that are recorded
TRIAL = 24  # time steps of random currents by which a neuron's equations are compared
EACH_STEP = (nn.Linear, nn.Identity, nn.ReLU, nn.Sigmoid, nn.Tanh, nn.Dropout)  # whatever axes come before the features
EACH_ROW = (
    *(*EACH_STEP, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Softplus, nn.Flatten, nn.Unflatten),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    *(nn.GroupNorm, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Dropout1d, nn.Dropout2d),
)  # of which each row of a batch is seen by itself, training batch norm and dropout aside
LIFTED = "spikingjelly.activation_based.layer.stateless_wrapper"  # the same, of a whole sequence if they are so set
OVER_TIME = {"MeanBackward1": torch.mean, "SumBackward1": torch.sum}


class NoChain(Exception):
    """A model cannot run as a chain; says why."""


# -- the chain -----------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """A model's stages over a whole sequence [T, B, ...], one after another. Its modules are the model's under the same
    names, with neurons of ours in place of the model's own; names: those that run."""

    def __init__(self, model: nn.Module, stages: list[nn.Module], swapped: dict[int, LIF], names: list[str]) -> None:
        super().__init__()
        self.__dict__.update(tree(model, swapped, {}).__dict__)
        self.__dict__.update(stages=stages, names=names)  # no modules of the tree: their names would double

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = run(stage, x)
        return x


def tree(module: nn.Module, swapped: Mapping[int, LIF], done: dict[int, nn.Module]) -> nn.Module:
    """A module that holds what this one does by the same names, neurons swapped. Parameters and buffers are in the very
    dictionaries of the original, so that what comes in their place is in both."""
    if id(module) in swapped:
        return swapped[id(module)]
    if id(module) not in done:
        done[id(module)] = module
        if module._modules:
            held = done[id(module)] = nn.Module()
            children = {name: child and tree(child, swapped, done) for name, child in module._modules.items()}
            own = {"_parameters": module._parameters, "_buffers": module._buffers, "_modules": children}
            held.__dict__.update(own, training=module.training)
    return done[id(module)]


class EachStep(nn.Sequential):
    """A module that sees a whole sequence [T, B, ...] at once, but each time step of it by itself."""


class Shape(nn.Module):
    """Rows [n, ...] with features of this shape."""

    def __init__(self, features: torch.Size) -> None:
        super().__init__()
        self.features = features

    def forward(self, rows: Tensor) -> Tensor:
        return rows.flatten(1) if len(self.features) == 1 else rows.reshape(len(rows), *self.features)


class OverTime(nn.Module):
    """Mean or sum over time, padding included: [T, B, ...] -> [B, ...]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, sequence: Tensor) -> Tensor:
        return OVER_TIME[self.kind](sequence, 0)


# -- recording -----------------------------------------------------------------------------------------------


@dataclass
class Given:
    """A tensor that a module gave: a leaf of the graph, of which what reads it is made."""

    tensor: Tensor
    leaf: Tensor
    version: int

    @classmethod
    def of(cls, output: Tensor) -> "Given":
        leaf = output.detach().requires_grad_()
        return cls(leaf, leaf, leaf._version)

    def read_by(self, x: Tensor, at: int | None = None) -> bool:
        """Whether x is this tensor, or its time step `at`, with nothing but its shape changed."""
        here = self.tensor if at is None else self.tensor[at]
        alike = x.shape == here.shape and x.stride() == here.stride()
        plain = x.numel() == here.numel() and x.is_contiguous() and here.is_contiguous()
        same = x.data_ptr() == here.data_ptr() and (alike or plain) and leaves([x]) == {id(self.leaf)}
        return same and x._version == self.version


@dataclass
class Call:
    """A call of a module. read: its input; gave: its output."""

    read: Tensor
    version: int
    gave: Given | None = None


@dataclass
class Link:
    """A module of the chain. mode: "step", called once a time step with [B, ...]; "whole", once with [T, B, ...];
    "folded", once with [T * B, ...]."""

    name: str
    module: nn.Module
    mode: str
    calls: list[Call]

    def sequence(self, gave: bool) -> Tensor:
        """What its calls gave, or read, [T * B, ...] or [T, B, ...]."""
        tensors = [(call.gave.tensor if gave else call.read).detach() for call in self.calls]
        return torch.stack(tensors) if self.mode == "step" else tensors[0]

    def features(self, gave: bool, steps: int, rows: int) -> torch.Size:
        """Shape of a time step of one sample, in or out. Raises NoChain for what is no batch of them."""
        lead = {"step": (rows,), "whole": (steps, rows), "folded": (steps * rows,)}[self.mode]
        shapes = {tuple(call.gave.tensor.shape if gave else call.read.shape) for call in self.calls}
        (shape,) = shapes if len(shapes) == 1 else (None,)
        if shape is None or shape[: len(lead)] != lead:
            raise NoChain(f"{self.name} does not see or give a batch of time steps")
        return torch.Size(shape[len(lead) :])


class Recorder:
    """Sees the calls of a model's innermost modules and neurons in a pass of deterministic firing."""

    def __init__(self, model: nn.Module, layers: Layers) -> None:
        neurons = dict(layers)
        self.calls: dict[str, list[Call]] = {}  # by module
        self._order: list[Call] = []
        self.modules: dict[str, nn.Module] = {}
        self.neurons: dict[str, StepNeuron] = neurons
        self._left: dict[str, list[Any]] = {}  # by neuron: what it returned and carries, as it stood then
        for name, module in model.named_modules():
            if name in neurons or not (module._modules or any(inside(name, neuron) for neuron in neurons)):
                self.modules[name] = module

    def watching(self) -> ExitStack:
        stack = ExitStack()
        for name, module in self.modules.items():
            before = lambda m, a, k, name=name: self._enter(name, a, k)  # noqa: E731
            after = lambda m, a, k, out, name=name: self._leave(name, out)  # noqa: E731
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        return stack

    def _enter(self, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not arguments or not isinstance(arguments[0], Tensor):
            raise NoChain(f"{name} is not called with a tensor")
        if name in self.neurons:
            self._check_state(name, [*arguments[1:], *named.values()])
        elif len(arguments) > 1 or named:
            raise NoChain(f"{name} is called with more than a tensor")
        self._order.append(Call(arguments[0], arguments[0]._version))
        self.calls.setdefault(name, []).append(self._order[-1])

    def _check_state(self, name: str, passed: list[Any]) -> None:
        """Raises NoChain unless a neuron goes on from what it left, or begins at zero."""
        passed = [state for state in passed if state is not None]
        if name not in self._left:
            if any(not isinstance(s, Tensor) or s.requires_grad or bool((s != 0).any()) for s in passed):
                raise NoChain(f"{name} does not begin at zero")
            return
        returned, carried = self._left[name]
        kept = all(any(state is one for one in returned) for state in passed)
        if not kept or carried != [standing(state) for state in self.neurons[name].states()]:
            raise NoChain(f"the state of {name} is changed between two time steps")

    def _leave(self, name: str, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(first, Tensor) or not first.is_floating_point():
            raise NoChain(f"{name} gives no tensor")
        given = self.calls[name][-1].gave = Given.of(first)
        output = (given.leaf, *output[1:]) if isinstance(output, tuple) else given.leaf
        if name in self.neurons:
            returned = output if isinstance(output, tuple) else (output,)
            self._left[name] = [returned, [standing(state) for state in self.neurons[name].states()]]
        return output

    def links(self, steps: int, rows: int) -> list[Link]:
        """The modules that ran, in their order, those that ran several times a step as often. Raises NoChain."""
        found: list[Link] = []
        for name, calls in self.calls.items():
            if len(calls) == 1:
                mode = "whole" if calls[0].read.shape[:2] == (steps, rows) else "folded"
                found.append(Link(name, self.modules[name], mode, calls))
            elif len(calls) % steps:
                raise NoChain(f"{name} runs {len(calls)} times in {steps} time steps")
            else:
                every = len(calls) // steps
                found += [Link(name, self.modules[name], "step", calls[i::every]) for i in range(every)]
        place = {id(call): i for i, call in enumerate(self._order)}
        return sorted(found, key=lambda link: place[id(link.calls[0])])


def standing(state: Tensor) -> tuple[int, int, int]:
    """What tells that a state is the very tensor that it was, with its graph and its values."""
    return id(state), state._version, id(state.grad_fn)


# -- recognition ---------------------------------------------------------------------------------------------


def recognised(model: nn.Module, x: Tensor, by_step: bool, layers: Layers) -> Chain:
    """The chain that gives what the model gives for events x [T, B, ...], T and B at least 2. Raises NoChain."""
    check_modules(model, layers)
    recorder, start = Recorder(model, layers), Given.of(x)
    start.tensor = start.leaf.clone()  # a model may change its input in place
    start.version = start.tensor._version
    firing = bind(model, NoiseLevel(Logistic()), steps=len(x), layers=layers)
    with keep_traces(model), torch.enable_grad(), firing, recorder.watching():
        outputs = model_outputs(model, start.tensor, by_step)
    if idle := [name for name, _ in layers if name not in recorder.calls]:
        raise NoChain(f"{idle[0]} does not run")
    steps, rows = x.shape[:2]
    links = recorder.links(steps, rows)
    for before, link in zip([None, *links], links, strict=False):
        check_link(start, before, link, steps)
    kind = check_end(links[-1], outputs, steps)
    stages, swapped, currents = assembled(links, recorder.neurons, x)
    stages += [OverTime(kind)] if kind else []
    chain = Chain(model, stages, swapped, [link.name for link in links])
    fired = [link.sequence(True) for link in links if id(link.module) in swapped]
    check_numbers(chain, x, [*currents, outputs.detach()], fired)
    return chain


def assembled(
    links: list[Link], neurons: Mapping[str, StepNeuron], x: Tensor
) -> tuple[list[nn.Module], dict[int, LIF], list[Tensor]]:
    """Stages of a chain; our neurons in it, by the id of the module whose place they take; the current [T, B, ...] of
    each as it was recorded. Modules that see each row by itself wait in `row_wise` for one `Fold`. Raises NoChain."""
    steps, rows, *features = x.shape
    stages: list[nn.Module] = []
    swapped: dict[int, LIF] = {}
    row_wise: list[nn.Module] = []
    currents = []
    for link in links:
        if link.features(False, steps, rows) != torch.Size(features):
            row_wise.append(Shape(link.features(False, steps, rows)))
        features = link.features(True, steps, rows)
        if link.name in neurons:
            entry, neuron = equations(neurons[link.name], link, features, x)
            currents.append(through(entry, link.sequence(False).reshape(steps, rows, *features)))
            swapped[id(link.module)] = neuron
            stages += [*folded([*row_wise, *entry]), neuron]
            row_wise = []
        elif link.mode == "whole":
            check_each_step(link)
            known = type(link.module) is nn.Linear  # to all that look at stages
            stages += [*folded(row_wise), link.module if known else EachStep(link.module)]
            row_wise = []
        else:
            row_wise.append(link.module)
    return stages + folded(row_wise), swapped, currents


def folded(modules: list[nn.Module]) -> list[nn.Module]:
    return [Fold(*modules)] if modules else []


def check_modules(model: nn.Module, layers: Layers) -> None:
    """Raises NoChain for what no chain is made of, whatever the order."""
    names = {name for name, _ in layers}
    if "model" in names and not model._modules.get("model"):
        raise NoChain("it is a single layer")
    for name, neuron in layers:
        if isinstance(neuron, SpikingNeuron | BlackBox):
            raise NoChain(f"{name} is no neuron of another library")
    if coupled := coupled_modules(model):
        raise NoChain(f"{type(coupled[0]).__name__} in training mode sees one time step at a time")
    for name, module in model.named_modules():
        if hooked(module):
            raise NoChain(f"{name or 'the model'} has hooks")
        if not module._modules and not any(inside(name, site) for site in names) and not row_by_row(module):
            raise NoChain(f"{name or 'the model'} is a {type(module).__name__}")


def hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def row_by_row(module: nn.Module) -> bool:
    """Whether a module is known to see each row of a batch by itself (in evaluation mode)."""
    kind = type(module)
    return kind in EACH_ROW or (kind.__module__ == LIFTED and any(base in EACH_ROW for base in kind.__mro__))


def check_each_step(link: Link) -> None:
    module = link.module
    later = {nn.Flatten: "start_dim", nn.Unflatten: "dim"}.get(type(module))
    later = later is not None and getattr(module, later) >= 2
    lifted = type(module).__module__ == LIFTED and module.step_mode == "m"
    if not (later or lifted or type(module) in EACH_STEP):
        raise NoChain(f"{link.name} is called with a whole sequence")


def check_link(start: Given, before: Link | None, link: Link, steps: int) -> None:
    """Raises NoChain unless each call of a module reads what the module before it gave for the same time step."""
    whole = before is None or before.mode != "step"
    source = start if before is None else before.calls[0].gave
    if whole and link.mode == "step":
        at = len(source.tensor) == steps
        fits = at and all(source.read_by(call.read, t) for t, call in enumerate(link.calls))
    elif whole:
        fits = source.read_by(link.calls[0].read)
    elif link.mode == "step":
        fits = all(b.gave.read_by(call.read) for b, call in zip(before.calls, link.calls, strict=True))
    else:
        fits = stacks(link.calls[0].read.grad_fn, before.calls)
    unchanged = all(call.read._version == call.version for call in link.calls)
    if not fits or not unchanged:
        what = "the events" if before is None else f"{before.name} gives in the same time step"
        raise NoChain(f"{link.name} reads something else than {'' if before is None else 'what '}{what}")


def stacks(node: Any, calls: list[Call]) -> bool:
    """Whether a node of the graph stacks what these calls gave, in their order, along a first axis."""
    if type(node).__name__ != "StackBackward0" or node._saved_dim != 0:
        return False
    parents = [getattr(parent, "variable", None) for parent, _ in node.next_functions]
    return len(parents) == len(calls) and all(v is c.gave.leaf for v, c in zip(parents, calls, strict=True))


def check_end(last: Link, outputs: Tensor, steps: int) -> str | None:
    """What is done over time with what the last module gives: nothing, or a key of `OVER_TIME`. Raises NoChain."""
    node, kind = outputs.grad_fn, None
    if type(node).__name__ in OVER_TIME and tuple(node._saved_dim) == (0,) and not node._saved_keepdim:
        kind, node = type(node).__name__, node.next_functions[0][0]
    if last.mode == "step":
        fits = stacks(node, last.calls)
    elif kind is not None:
        fits = last.mode == "whole" and getattr(node, "variable", None) is last.calls[0].gave.leaf
    else:
        fits = last.calls[0].gave.read_by(outputs)
    if not fits:
        raise NoChain(f"its outputs are something else than what {last.name} gives in every time step")
    return kind


# -- what was recorded comes out of it again -------------------------------------------------------------------


def equations(neuron: StepNeuron, link: Link, features: torch.Size, like: Tensor) -> tuple[list[nn.Module], LIF]:
    """A neuron of ours with the equations of this one, and what comes before it, row by row. Raises NoChain unless both
    do the same with the recorded currents and with random ones."""
    found = neuron.ours(like)
    if isinstance(found, str):
        raise NoChain(f"{link.name} ({type(link.module).__name__}): {found}")
    entry, ours = found
    size = float(neuron.threshold.detach().abs().mean())
    generator = torch.Generator().manual_seed(0)
    random = 2 * size * torch.randn(TRIAL, 2, *features, generator=generator).to(like)
    alone = bind(link.module, NoiseLevel(Logistic()), steps=TRIAL, layers=[(link.name, neuron)])
    with keep_traces(link.module), torch.no_grad(), alone:
        theirs = first_output(link.module, model_outputs(link.module, random, link.mode == "step"))
    steps = (len(like), like.shape[1])
    recorded = [link.sequence(gave).reshape(*steps, *features) for gave in (False, True)]
    for current, spikes in ((random, theirs), recorded):
        if not fires_alike(entry, ours, current, spikes, size):
            raise NoChain(f"{link.name} ({type(link.module).__name__}) fires otherwise than {ours}")
    return entry, ours


@torch.no_grad()
def fires_alike(entry: list[nn.Module], ours: LIF, current: Tensor, spikes: Tensor, size: float) -> bool:
    """Whether our neuron, given these spikes so far, would fire the next ones, as far as rounding lets it be told."""
    if spikes.shape != current.shape:
        return False
    drive = ours.fired(through(entry, current), known=spikes)[1]
    near = 1e3 * torch.finfo(drive.dtype).eps * (drive.abs().amax() + size)
    return bool((((drive > 0).to(spikes) == spikes) | (drive.abs() <= near)).all())


@torch.no_grad()
def through(modules: list[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


@torch.no_grad()
def check_numbers(chain: Chain, x: Tensor, expected: list[Tensor], fired: list[Tensor]) -> None:
    """Raises NoChain unless the currents of its neurons and its outputs are those expected, given what was fired."""
    close = {"rtol": 1e-3, "atol": 1e-4} if x.dtype != torch.float64 else {"rtol": 1e-9, "atol": 1e-9}
    expected, fired = iter(expected), iter(fired)

    def check(found: Tensor) -> None:
        number = next(expected)
        if found.shape != number.shape or not torch.allclose(found, number, **close):
            raise NoChain("the chain gives other numbers than the model")

    for stage in chain.stages:
        if isinstance(stage, LIF):
            check(x)
            x = next(fired).reshape(x.shape)
        else:
            x = stage(x)
    check(x)


# -- which of the two runs --------------------------------------------------------------------------------------


@dataclass
class Engine:
    """Which code runs a model. running: the model itself, or the chain in its place; why: not the chain."""

    model: nn.Module
    noise: Mapping[str, Any]
    own_code: bool = False  # whether the model's own code is to run in any case
    running: nn.Module = field(init=False)
    why: str = ""
    _chain: Chain | None = None
    _seen: Any = None

    def __post_init__(self) -> None:
        self.running = self.model

    def changes(self, frames: Frames, dtype: torch.dtype, objective: Objective) -> bool:
        """Looks at the model, if it is not as it was when it was last looked at; whether another one runs now. frames:
        events [T, B, ...] of a batch; dtype: of the model."""
        seen, before = self._look(frames, dtype), self.running
        if seen != self._seen:
            self._seen, self.why = seen, ""
            try:
                self._chain = self._recognise(frames, dtype)
            except NoChain as error:
                self._chain, self.why = None, str(error)
        counted = "operations" in objective.counts and self._recurs
        self.running = self.model if self._chain is None or counted or self.own_code else self._chain
        return self.running is not before

    def _look(self, frames: Frames, dtype: torch.dtype) -> Any:
        """What a chain depends on, other than parameters and buffers."""
        modules = [(id(m), m.training, hooked(m)) for m in self.model.modules()]
        options = [neuron.options() for _, neuron in spiking_layers(self.model) if isinstance(neuron, StepNeuron)]
        return modules, options, frames.device, dtype

    @property
    def _recurs(self) -> bool:
        return self._chain is not None and any(getattr(m, "recurrent", None) is not None for m in self._chain.stages)

    @full_precision()
    def _recognise(self, frames: Frames, dtype: torch.dtype) -> Chain:
        for name, site in self.noise.items():
            if isinstance(site, CurrentNoise) or (isinstance(site, WeightNoise) and site.per_sample):
                raise NoChain(f"there is noise of its own at {name}")
        if not any(isinstance(neuron, StepNeuron) for _, neuron in spiking_layers(self.model)):
            raise NoChain("")
        for steps in sorted({min(STEPS, len(frames)), len(frames)}):
            try:
                return self._recorded(frames[:steps, :SAMPLES].to(dtype))
            except NoChain:
                raise
            except Exception as error:  # it may ask for all time steps; else it is the model's own, which it will raise
                reason = error
        raise NoChain(f"it cannot be recorded, {type(reason).__name__}") from reason

    def _recorded(self, x: Tensor) -> Chain:
        """Of events x [T, B, ...], the only ones twice. Raises NoChain, and what the model raises."""
        x = x.repeat(2 if len(x) == 1 else 1, 2 if x.shape[1] == 1 else 1, *[1] * (x.ndim - 2)).contiguous()
        by_step = runs_by_step(self.model, x)
        return recognised(self.model, x, by_step, find_layers(self.model, x, by_step, self.noise))

    def line(self) -> list[str]:
        """For the plan, of models that have layers of other libraries."""
        if self.running is self._chain is not None:
            return [f"engine: runs as a chain {' -> '.join(self._chain.names)}, neurons as scans over time"]
        if not self.why:
            return []
        return [f"engine: the model's own code, as it is ({self.why})"]
