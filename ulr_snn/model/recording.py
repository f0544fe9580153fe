"""Recordings of one deterministic pass: which modules run in every time step, and what each of them reads."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.adapters import StepNeuron
from ulr_snn.model.chain import NoChain
from ulr_snn.model.graph import leaves
from ulr_snn.model.trees import tensors
from ulr_snn.sites.binding import Layers, inside


@dataclass
class Given:
    """An output of a module, made a leaf of the graph so that its readers can be recognised."""

    tensor: Tensor
    leaf: Tensor
    version: int

    @classmethod
    def of(cls, output: Tensor) -> "Given":
        """Makes a leaf of an output."""
        leaf = output.detach().requires_grad_()
        return cls(leaf, leaf, leaf._version)

    @classmethod
    def to_model(cls, x: Tensor) -> "Given":
        """Makes a leaf of events. The model gets a copy, which it may change in place."""
        leaf = x.detach().requires_grad_()
        copy = leaf.clone()
        return cls(copy, leaf, copy._version)

    @property
    def unchanged(self) -> bool:
        """True if the tensor is what it was, and a gradient passes it as it is."""
        return self.tensor._version == self.version and not self.leaf._backward_hooks

    def read_by(self, x: Tensor, at: int | None = None) -> bool:
        """Returns whether x is this tensor, or its time step `at`, with nothing but its shape changed."""
        here = self.tensor if at is None else self.tensor[at]
        alike = x.shape == here.shape and x.stride() == here.stride()
        plain = x.numel() == here.numel() and x.is_contiguous() and here.is_contiguous()
        same = x.data_ptr() == here.data_ptr() and (alike or plain) and leaves([x]) == {id(self.leaf)}
        return same and x._version == self.version


@dataclass
class Read:
    """A call of a module. read: its input, at this version; gave: the first tensor of its output."""

    read: Tensor
    version: int
    gave: Given
    output: Any


@dataclass
class Link:
    """A module of the chain with its calls. mode: "step", one call per time step with [B, ...]; "whole", one call with
    [T, B, ...]; "folded", one call with [T * B, ...]. glue: what the output of the module before it passes first."""

    name: str
    module: nn.Module
    mode: str
    calls: list[Read]
    glue: list[nn.Module] = field(default_factory=list)

    def sequence(self, gave: bool) -> Tensor:
        """Returns the outputs (gave) or inputs of all calls, [T * B, ...] or [T, B, ...]."""
        tensors = [(call.gave.tensor if gave else call.read).detach() for call in self.calls]
        return torch.stack(tensors) if self.mode == "step" else tensors[0]

    def features(self, gave: bool, steps: int, rows: int) -> torch.Size:
        """Returns the shape of one sample's output (gave) or input in a time step. Raises NoChain for other shapes."""
        lead = leading(self.mode, steps, rows)
        shapes = {tuple(call.gave.tensor.shape if gave else call.read.shape) for call in self.calls}
        (shape,) = shapes if len(shapes) == 1 else (None,)
        if shape is None or shape[: len(lead)] != lead:
            raise NoChain(f"{self.name} does not see or give a batch of time steps")
        return torch.Size(shape[len(lead) :])


def leading(mode: str, steps: int, rows: int) -> tuple[int, ...]:
    """Returns the axes of time and samples of a module that is called in this mode, see `Link`."""
    return {"step": (rows,), "whole": (steps, rows), "folded": (steps * rows,)}[mode]


def own_tensors(module: nn.Module) -> list[int]:
    """Returns the ids of a module's parameters, and of tensors that stand in their place."""
    return [id(q) for q in (*module._parameters.values(), *vars(module).values()) if isinstance(q, Tensor)]


class Recorder:
    """Records the calls of a model's innermost modules and neurons in a pass of deterministic firing.

    odd: why calls of a module are none of a chain, by its name. inside: whether a call is under way.
    """

    def __init__(self, model: nn.Module, layers: Layers) -> None:
        self._depth = 0
        self.calls: dict[str, list[Read]] = {}  # by module
        self.odd: dict[str, str] = {}
        self.modules: dict[str, nn.Module] = {}
        self.neurons = {name: neuron for name, neuron in layers if isinstance(neuron, StepNeuron)}
        self._order: list[Read] = []
        self._read: dict[str, tuple[Tensor, int]] = {}  # by module: input of the call in progress, and its version
        self._left: dict[str, list[Any]] = {}  # by neuron: its last output, and the identity of its states then
        for name, module in model.named_modules():
            if name in self.neurons or not (module._modules or any(inside(name, other) for other in self.neurons)):
                self.modules[name] = module
        self._own = {name: own_tensors(module) for name, module in self.modules.items()}

    @property
    def inside(self) -> bool:
        return self._depth > 0

    def thresholds(self) -> dict[str, Tensor]:
        """Returns copies of the neurons' thresholds."""
        return {f"the threshold of {name}": neuron.threshold.detach().clone() for name, neuron in self.neurons.items()}

    def watching(self) -> ExitStack:
        """Records calls until the stack is closed."""
        stack = ExitStack()
        for name, module in self.modules.items():
            before = lambda m, a, k, name=name: self._enter(name, a, k)  # noqa: E731
            after = lambda m, a, k, out, name=name: self._leave(name, out)  # noqa: E731
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True, always_call=True).remove)
        return stack

    def _enter(self, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._depth += 1
        try:
            if not torch.is_grad_enabled():
                raise NoChain(f"{name} runs without gradients")
            if name not in self.neurons and own_tensors(self.modules[name]) != self._own[name]:
                raise NoChain(f"{name} runs with other parameters than its own")
            if not arguments or not isinstance(arguments[0], Tensor):
                raise NoChain(f"{name} is not called with a tensor")
            if name in self.neurons:
                self._check_state(name, [*arguments[1:], *named.values()])
            elif len(arguments) > 1 or named:
                raise NoChain(f"{name} is called with more than a tensor")
        except NoChain as error:
            self.odd.setdefault(name, str(error))
        if name not in self.odd:
            self._read[name] = arguments[0], arguments[0]._version

    def _check_state(self, name: str, passed: list[Any]) -> None:
        """Raises NoChain unless a neuron starts from zero, or from its own states of the last call."""
        passed = [state for state in passed if state is not None]
        if name not in self._left:
            begins = [*passed, *self.neurons[name].states()]
            if any(not isinstance(s, Tensor) or s.requires_grad or bool((s != 0).any()) for s in begins):
                raise NoChain(f"{name} does not begin at zero")
            return
        returned, carried = self._left[name]
        kept = all(any(state is one for one in returned) for state in passed)
        given = bool(passed) or bool(self.neurons[name].states())
        if not (kept and given) or carried != self._states(name, returned):
            raise NoChain(f"the state of {name} is changed between two time steps")

    def _states(self, name: str, returned: tuple[Any, ...]) -> list[tuple[int, int, int]]:
        """Returns keys of the states that a neuron has kept, or has returned after its spikes."""
        return [identity_of(state) for state in (*self.neurons[name].states(), *tensors(returned[1:]))]

    def _leave(self, name: str, output: Any) -> Any:
        self._depth -= 1
        first = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(first, Tensor) or not first.is_floating_point():
            self.odd.setdefault(name, f"{name} gives no tensor")
        if name in self.odd:
            return output
        given = Given.of(first)
        output = (given.leaf, *output[1:]) if isinstance(output, tuple) else given.leaf
        self._order.append(Read(*self._read.pop(name), given, output))
        self.calls.setdefault(name, []).append(self._order[-1])
        if name in self.neurons:
            returned = output if isinstance(output, tuple) else (output,)
            self._left[name] = [returned, self._states(name, returned)]
        return output

    def links(self, steps: int, rows: int) -> list[Link]:
        """Returns a link for each run of a module in a time step, in the order of the runs. Odd modules have none."""
        found: list[Link] = []
        for name, calls in self.calls.items():
            if name in self.odd:
                continue
            if len(calls) == 1:
                mode = "whole" if calls[0].read.shape[:2] == (steps, rows) else "folded"
                found.append(Link(name, self.modules[name], mode, calls))
            elif len(calls) % steps:
                self.odd[name] = f"{name} runs {len(calls)} times in {steps} time steps"
            else:
                every = len(calls) // steps
                found += [Link(name, self.modules[name], "step", calls[i::every]) for i in range(every)]
        place = {id(call): i for i, call in enumerate(self._order)}
        return sorted(found, key=lambda link: place[id(link.calls[0])])


def identity_of(state: Tensor) -> tuple[int, int, int]:
    """Returns a key that changes if the state becomes another tensor or its graph or values change."""
    return id(state), state._version, id(state.grad_fn)
