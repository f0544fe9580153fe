"""Calls of a model: with a whole sequence or one time step at a time, without side effects, with checked outputs."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ulr_snn.adapters import adapter_of, copies_of_state, couples
from ulr_snn.errors import UsageError
from ulr_snn.kernels.stateless import run
from ulr_snn.kernels.walk import modules_in
from ulr_snn.model.chain import own_code
from ulr_snn.model.interface import USUAL, Interface
from ulr_snn.model.reading import VARIABLE, takes
from ulr_snn.model.shape_errors import shape_advice
from ulr_snn.model.trees import mapped, tensors
from ulr_snn.model.view import AS_IS, View
from ulr_snn.sites.binding import user_modules


def coupled_modules(model: nn.Module) -> list[nn.Module]:
    """Returns the modules that couple the rows of a batch or draw noise of their own. These are dropout and batch norm
    in training mode, and batch norm without running statistics in any mode. Copies must not share a batch there,
    because they would distort its statistics."""
    return [
        m
        for m in modules_in(model)
        if (m.training and (isinstance(m, _BatchNorm | _DropoutNd) or couples(m)))
        or (isinstance(m, _BatchNorm) and m.running_mean is None)
    ]


def generator_state() -> tuple[Tensor, Tensor | None]:
    """Returns the state of torch's global generators, on the CPU and on the current CUDA device."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None


def set_generator_state(state: tuple[Tensor, Tensor | None]) -> None:
    """Sets the state of torch's global generators."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


@contextmanager
def same_generators() -> Iterator[None]:
    """Restores torch's global generators afterwards."""
    state = generator_state()
    try:
        yield
    finally:
        set_generator_state(state)


@contextmanager
def no_side_effects(model: nn.Module) -> Iterator[None]:
    """Restores running statistics, the state of modules of the user's own classes, and the generators afterwards."""
    norms = [m for m in coupled_modules(model) if isinstance(m, _BatchNorm)]
    kept = [dict(norm._buffers) for norm in norms]
    try:
        for norm, buffers in zip(norms, kept, strict=True):
            # An earlier pass's graph may still hold the originals.
            norm._buffers.update({k: None if b is None else b.clone() for k, b in buffers.items()})
        with same_generators(), copies_of_state(model, user_modules(own_code(model))):
            yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


STATE = re.compile(r"state|mem|hid|carry|^(h|c|hx|cx|s|v|u|syn|spk|z)\d*$")  # names of arguments that take a state
SPECIAL = {  # ways to call a model, as `plan` says them
    "batch first": "takes whole sequences with the batch first, [B, T, ...]",
    "static": "takes a static input [B, ...], and repeats or encodes it itself",
}


@dataclass(frozen=True)
class Call:
    """The way in which a model is called, and what is read of its result.

    way: "sequence" for [T, B, ...], "batch first" for [B, T, ...], "step" for a time step [B, ...] a call, "static" for
    an input [B, ...] that the model repeats or encodes itself. inputs: the form of several inputs; view: the form of
    the outputs; carries: a returned state goes into the next call; states: names of the arguments that take it, if they
    are known; count: number of outputs in the model's result; keeps_time: whether all layers and outputs over time have
    the time steps of the events.
    """

    way: str = "sequence"
    interface: Interface = USUAL
    inputs: View = AS_IS
    view: View = AS_IS
    carries: bool = False
    states: tuple[str, ...] = ()
    count: int = 1
    keeps_time: bool = True

    @property
    def plain(self) -> bool:
        """True if the model takes one sequence [T, B, ...], and its only result is [T, B, C, ...] or [B, C]."""
        one = self.way == "sequence" and not self.inputs.slots and self.interface.output is None and self.count <= 1
        forms = [(slot.over_time, len(slot.shape)) for slot in self.view.slots]
        return one and all(axes > 0 if over_time else axes == 1 for over_time, axes in forms)

    def describe(self) -> list[str]:
        """Says how the model is called and what is read of its result, where that is not the usual, for `plan`."""
        found = [f"model: {text}"] if (text := SPECIAL.get(self.way)) else []
        if self.carries:
            found = ["model: takes one time step a call, with the state that it returned in the call before"]
        if self.count > 1 or self.interface.output is not None:
            which = "the first" if self.interface.output is None else f"output={self.interface.output!r}"
            found.append(f"outputs: the loss reads {which}, of {self.count} that the model returns")
        return found

    def outputs(self, model: nn.Module, x: Tensor) -> Tensor:
        """Returns the model's outputs for x [T, B, ...], as one tensor [T, B, ...] or [B, F]."""
        return self.view.internal(self.selected(model, x))

    def selected(self, model: nn.Module, x: Tensor) -> Any:
        """Returns the part of the model's result that is read. A model that takes one time step a call has its results
        stacked over time."""
        return self.read(model, self.run(model, x), len(x), x.shape[1])

    def run(self, model: nn.Module, x: Tensor) -> list[Any]:
        """Returns the model's result for x [T, B, ...], or its results of all time steps."""
        with shape_advice(model):
            if self.way == "step":
                return list(self._steps(model, x))
            if self.way == "static":
                given = self.inputs.external(x[0])
            elif self.way == "batch first" and not self.inputs.slots:
                given = x.transpose(0, 1)
            else:
                given = self.inputs.external(x)
            return [called(model, given)]

    def read(self, model: nn.Module, results: list[Any], steps: int, rows: int) -> Any:
        """Returns the part of a model's result that is read, or of its results of all time steps, stacked. Lists with a
        tensor for each time step are stacked, too. Raises UsageError if there is no tensor."""
        if self.way != "step":
            results = [joined(results[0], steps, rows, int(self.way == "batch first"))]
        found = [self.interface.select(result) for result in results]
        if not tensors(found[0]):
            raise UsageError(
                f"{type(model).__name__} returned {type(found[0]).__name__}; return a tensor [T, B, C] or [B, C]"
            )
        return stacked(found) if self.way == "step" else found[0]

    def _steps(self, model: nn.Module, x: Tensor) -> Iterator[Any]:
        """Yields the results of a model that takes one time step a call."""
        state: tuple[Any, ...] = ()
        named: dict[str, Any] = {}
        over_time = [slot.over_time for slot in self.inputs.slots]
        for t in range(len(x)):
            given: Any = x[t]
            if over_time:
                given = first_step(self.inputs.external(x[t : t + 1]), over_time)
            result = called(model, given, *state, **named)
            if self.carries and self.states:
                named = state_in(result, self.states, self.interface.output)
            elif self.carries and isinstance(result, tuple | list):
                state = tuple(result[1:])
            yield result


def called(model: nn.Module, given: Any, *state: Any, **named: Any) -> Any:
    """Calls the model with one input, or with a tuple or dict of inputs as its arguments. A model that has a single
    argument gets the tuple or dict itself. Raises UsageError if the model does not take so many inputs."""
    names = inspect.signature(model.forward).parameters.keys() if isinstance(given, dict) else None
    if isinstance(given, Tensor) or (takes(model) == 1 and not (isinstance(given, dict) and given.keys() == names)):
        args, options = (given, *state), named
    elif isinstance(given, dict):
        args, options = (), given | named
    else:
        args, options = (*given, *state), named
    try:
        return run(model, given) if isinstance(given, Tensor) and not (state or named) else model(*args, **options)
    except TypeError as error:
        signature = inspect.signature(model.forward)
        try:
            signature.bind(*args, **options)
        except TypeError:
            count = len(args) + len(options)
            raise UsageError(
                f"{type(model).__name__}.forward{signature} does not take the {count} argument{'s' * (count > 1)} that "
                "a batch makes; give it batches (x, y) with all of its inputs in x"
            ) from error
        raise


def joined(result: Any, steps: int, rows: int, axis: int) -> Any:
    """Returns a result in which lists with a tensor [rows, ...] for each time step are stacked along an axis."""
    if isinstance(result, list) and len(result) == steps > 1 and all(isinstance(item, Tensor) for item in result):
        shapes = {tuple(item.shape) for item in result}
        if len(shapes) == 1 and next(iter(shapes))[:1] == (rows,):
            return torch.stack(result, axis)
    if type(result) in (list, tuple):
        return type(result)(joined(item, steps, rows, axis) for item in result)
    if type(result) is dict:
        return {key: joined(item, steps, rows, axis) for key, item in result.items()}
    return result


def state_in(result: Any, names: tuple[str, ...], output: Any) -> dict[str, Any]:
    """Returns the state in the result of a time step, by the names of the arguments that take it: the parts of these
    names, or all that follows the output."""
    if isinstance(result, dict):
        return {name: result[name] for name in names if name in result}
    if not isinstance(result, tuple | list) or len(result) < 2:
        return {}
    rest = list(result)
    del rest[output if isinstance(output, int) else 0]
    if len(rest) == 1 and len(names) > 1 and type(rest[0]) in (tuple, list):
        rest = list(rest[0])
    return dict(zip(names, rest, strict=False))


def first_step(inputs: Any, over_time: list[bool]) -> Any:
    """Returns several inputs with the first time step of each that is over time."""
    flags = iter(over_time)
    return mapped(inputs, lambda part: part[0] if next(flags) else part)


def stacked(results: list[Any]) -> Any:
    """Returns the results of all time steps, stacked tensor by tensor."""
    columns = iter(zip(*(tensors(result) for result in results), strict=True))
    return mapped(results[0], lambda _: torch.stack(next(columns)))


def model_outputs(model: nn.Module, x: Tensor, by_step: bool = False) -> Tensor:
    """Returns the first tensor of the model's result. by_step: the model takes one time step a call, and its outputs
    are stacked over time."""
    carries = by_step and carries_state(model)
    return Call("step" if by_step else "sequence", carries=carries, states=state_arguments(model)).outputs(model, x)


def carries_state(model: nn.Module) -> bool:
    """Returns whether a model that takes one time step a call takes the state that it returned in the call before. The
    adapter of its library knows, or the arguments of its forward show."""
    adapter = adapter_of(model)
    return bool(state_arguments(model)) if adapter is None else adapter.carries_state(model)


def state_arguments(model: nn.Module) -> tuple[str, ...]:
    """Returns the arguments of a forward of the user's own that take a state, by their names; their default is None.
    Raises UsageError for such an argument without a default."""
    if adapter_of(model) is not None:
        return ()
    arguments = list(inspect.signature(model.forward).parameters.values())[1:]
    found = [argument for argument in arguments if STATE.search(argument.name) and argument.kind not in VARIABLE]
    if needed := [argument.name for argument in found if argument.default is argument.empty]:
        raise UsageError(
            f"{type(model).__name__}.forward needs the state {needed[0]!r}; give it the default None, for the first "
            "step"
        )
    return tuple(argument.name for argument in found if argument.default is None)


def check_outputs(outputs: Tensor, steps: int, rows: int, padded: bool = False) -> None:
    """Raises UsageError unless outputs are [T, B, ...] or [B, C]. padded: T has to be the number of steps."""
    shape = tuple(outputs.shape)
    if outputs.is_complex() or outputs.is_meta:
        held = "complex numbers" if outputs.is_complex() else "a tensor on the meta device"
        raise UsageError(f"the model returned {held}; return real numbers with values, [T, B, C] or [B, C]")
    over_time = shape[1:2] == (rows,) and (not padded or len(outputs) == steps)
    if not over_time if outputs.ndim > 2 else outputs.ndim < 2 or shape[0] != rows:
        raise UsageError(
            f"the model returned shape {shape} for {steps} steps of a batch of {rows}; return [T, B, C] or [B, C]"
        )


def copied(x: Tensor) -> Tensor:
    """Returns a copy of events [T, B, ...] that a model may change in place. Static inputs share their memory."""
    if len(x) > 1 and type(x) is Tensor and x.stride(0) == 0:
        return x[:1].clone().expand_as(x)
    return x.clone()
