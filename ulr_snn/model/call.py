"""Calls of a model: with a whole sequence or one time step at a time, without side effects, with checked outputs."""

import inspect
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
from ulr_snn.model.interface import USUAL, Interface
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
        for m in model.modules()
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
def no_side_effects(model: nn.Module) -> Iterator[None]:
    """Restores running statistics, the state of modules of the user's own classes, and the generators afterwards."""
    norms = [m for m in coupled_modules(model) if isinstance(m, _BatchNorm)]
    kept = [dict(norm._buffers) for norm in norms]
    state = generator_state()
    try:
        for norm, buffers in zip(norms, kept, strict=True):
            # An earlier pass's graph may still hold the originals.
            norm._buffers.update({k: None if b is None else b.clone() for k, b in buffers.items()})
        with copies_of_state(model, user_modules(model)):
            yield
    finally:
        set_generator_state(state)
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


SPECIAL = {  # ways to call a model, as `plan` says them
    "batch first": "takes whole sequences with the batch first, [B, T, ...]",
    "static": "takes a static input [B, ...], and repeats or encodes it itself",
}


@dataclass(frozen=True)
class Call:
    """The way in which a model is called, and what is read of its result.

    way: "sequence" for [T, B, ...], "batch first" for [B, T, ...], "step" for a time step [B, ...] a call, "static" for
    an input [B, ...] that the model repeats or encodes itself. inputs: the form of several inputs; view: the form of
    the outputs; carries: a returned state goes into the next call; count: number of outputs in the model's result.
    """

    way: str = "sequence"
    interface: Interface = USUAL
    inputs: View = AS_IS
    view: View = AS_IS
    carries: bool = False
    count: int = 1

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
        if self.way == "step":
            with shape_advice(model):
                return stacked(list(self._steps(model, x)))
        if self.way == "static":
            given = self.inputs.external(x[0])
        elif self.way == "batch first" and not self.inputs.slots:
            given = x.transpose(0, 1)
        else:
            given = self.inputs.external(x)
        with shape_advice(model):
            return self._select(model, called(model, given))

    def _steps(self, model: nn.Module, x: Tensor) -> Iterator[Any]:
        """Yields what is read of the results of a model that takes one time step a call."""
        state: tuple[Any, ...] = ()
        over_time = [slot.over_time for slot in self.inputs.slots]
        for t in range(len(x)):
            given: Any = x[t]
            if over_time:
                given = first_step(self.inputs.external(x[t : t + 1]), over_time)
            result = called(model, given, *state)
            if self.carries and isinstance(result, tuple | list):
                state = tuple(result[1:])
            yield self._select(model, result)

    def _select(self, model: nn.Module, result: Any) -> Any:
        """Returns the part of a result that is read. Raises UsageError if it holds no tensor."""
        found = self.interface.select(result)
        if not tensors(found):
            raise UsageError(
                f"{type(model).__name__} returned {type(found).__name__}; return a tensor [T, B, C] or [B, C]"
            )
        return found


def called(model: nn.Module, given: Any, *state: Any) -> Any:
    """Calls the model with one input, or with a tuple or dict of inputs as its arguments."""
    if isinstance(given, Tensor):
        return model(given, *state) if state else run(model, given)
    if isinstance(given, dict):
        return model(**given)
    return model(*given, *state)


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
    return Call("step" if by_step else "sequence", carries=by_step and carries_state(model)).outputs(model, x)


def carries_state(model: nn.Module) -> bool:
    """Returns whether a model that takes one time step a call takes the state that it returned in the call before. The
    adapter of its library knows. Of a user's own model, the forward then has a second argument whose default is None.
    """
    adapter = adapter_of(model)
    if adapter is not None:
        return adapter.carries_state(model)
    arguments = list(inspect.signature(model.forward).parameters.values())[1:]
    return bool(arguments) and arguments[0].kind is arguments[0].POSITIONAL_OR_KEYWORD and arguments[0].default is None


def check_outputs(outputs: Tensor, steps: int, rows: int) -> None:
    """Raises UsageError unless outputs are [T, B, ...] or [B, C]."""
    shape = tuple(outputs.shape)
    if (outputs.ndim >= 3 and shape[:2] != (steps, rows)) or (
        outputs.ndim < 3 and (outputs.ndim < 2 or shape[0] != rows)
    ):
        raise UsageError(
            f"the model returned shape {shape} for {steps} steps of a batch of {rows}; return [T, B, C] or [B, C]"
        )


def copied(x: Tensor) -> Tensor:
    """Returns a copy of events [T, B, ...] that a model may change in place. Static inputs share their memory."""
    if len(x) > 1 and type(x) is Tensor and x.stride(0) == 0:
        return x[:1].clone().expand_as(x)
    return x.clone()
