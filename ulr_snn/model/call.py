"""Calls of a model: with a whole sequence or one time step at a time, without side effects, with checked outputs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ulr_snn.adapters import adapter_of, copies_of_state, couples
from ulr_snn.errors import UsageError
from ulr_snn.kernels.stateless import run
from ulr_snn.model.neurons import SpikingNeuron
from ulr_snn.model.shape_errors import shape_advice
from ulr_snn.noise.firing import Logistic
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.sites.binding import bind, spiking_layers, user_modules

# Errors that modules raise for a wrong shape. Any other error is a mistake in the model itself.
OF_SHAPES = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


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
        with ExitStack() as stack:
            for module in user_modules(model):
                stack.enter_context(copies_of_state(module))
            yield
    finally:
        set_generator_state(state)
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


def runs_by_step(model: nn.Module, x: Tensor) -> bool:
    """Returns whether the model takes one time step [B, ...] a call, and not a sequence x [T, B, ...]. The model is
    called with a sequence first. An error that says nothing about shapes is raised at once."""
    layers = spiking_layers(model)
    if layers and all(isinstance(neuron, SpikingNeuron) for _, neuron in layers):
        return False
    x = x[:, :2] if len(x) > 1 else x[:, :2].repeat(2, *[1] * (x.ndim - 1))  # a single step would not tell them apart
    try:
        with no_side_effects(model), torch.no_grad(), bind(model, NoiseLevel(Logistic()), steps=len(x)):
            check_outputs(model_outputs(model, x.clone()), len(x), x.shape[1])
        return False
    except (RecursionError, torch.OutOfMemoryError):
        raise
    except OF_SHAPES as whole:
        try:
            with no_side_effects(model), torch.no_grad(), bind(model, NoiseLevel(Logistic()), steps=len(x)):
                model_outputs(model, x.clone(), by_step=True)
        except OF_SHAPES as stepwise:
            if str(stepwise) != str(whole) and not isinstance(whole, UsageError):
                whole.add_note(f"called with a time step at a time, it raises {type(stepwise).__name__}: {stepwise}")
            raise whole from None
        return True


def model_outputs(model: nn.Module, x: Tensor, by_step: bool = False) -> Tensor:
    """Returns the model's output, or its first item if it is a tuple or list like `(spikes, membranes)`. by_step: the
    model takes one time step a call, and its outputs are stacked over time."""
    if by_step:
        return torch.stack(list(each_step(model, x)))
    with shape_advice(model):
        return first_output(model, run(model, x))


def each_step(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Yields the outputs of a model that takes one time step a call. A returned state goes into the next call."""
    adapter = adapter_of(model)
    state: tuple[Any, ...] = ()
    carries = adapter is not None and adapter.carries_state(model)
    for step in x:
        outputs = model(step, *state)
        if carries and isinstance(outputs, tuple) and len(outputs) == 2:
            state = outputs[1:]
        yield first_output(model, outputs)


def first_output(model: nn.Module, outputs: Any) -> Tensor:
    """Returns the outputs, or the first item of a tuple or list. Raises UsageError for anything but a tensor."""
    if isinstance(outputs, tuple | list) and outputs:
        outputs = outputs[0]
    if not isinstance(outputs, Tensor):
        raise UsageError(
            f"{type(model).__name__} returned {type(outputs).__name__}; return a tensor [T, B, C] or [B, C]"
        )
    return outputs


def check_outputs(outputs: Tensor, steps: int, rows: int) -> None:
    """Raises UsageError unless outputs are [T, B, ...] or [B, C]."""
    shape = tuple(outputs.shape)
    if (outputs.ndim >= 3 and shape[:2] != (steps, rows)) or (
        outputs.ndim < 3 and (outputs.ndim < 2 or shape[0] != rows)
    ):
        raise UsageError(
            f"the model returned shape {shape} for {steps} steps of a batch of {rows}; return [T, B, C] or [B, C]"
        )
