"""Advice on common wrong inputs, with the layer's name: events that are not flat, sequences, (spikes, state)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ulr_snn.errors import UsageError
from ulr_snn.model.neurons import SpikingNeuron
from ulr_snn.sites.binding import spiking_layers

BETWEEN = "torch", "ulr_snn.credit.pooling", "ulr_snn.kernels"  # they run in the place of torch's functions
CONVOLUTIONS = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}  # with the number of input dimensions


@contextmanager
def shape_advice(model: nn.Module) -> Iterator[None]:
    """Raises UsageError if a module of torch refuses its input, with advice if nn.Flatten(2) or Fold would fix it, or
    if it is the (spikes, state) of a layer. Other errors stay as they are. So do errors of shape in models with layers
    of other libraries, because it is not known whether these models are meant to take all time steps at once."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        module, x = refused(error.__traceback__)
        own = all(isinstance(neuron, SpikingNeuron) for _, neuron in spiking_layers(model))
        if isinstance(x, tuple) and not own:
            got = "the (spikes, state) of a layer"
            advice = "give snnTorch's layers init_hidden=True, or put Norse's into a SequentialState"
        elif isinstance(x, tuple):
            got, advice = f"a tuple of {len(x)}", "give it one tensor; a batch is (x, y), and a loader gives batches"
        elif isinstance(x, Tensor) and own and (found := remedy(module, x)):
            advice, got = found, f"a sequence of samples of shape {tuple(x.shape[2:])}"
        elif isinstance(x, Tensor) and own and (sizes := misfit(module, x)):
            got, advice = f"{sizes[0]} features of an input {tuple(x.shape)}", f"give it {sizes[1]}"
        elif isinstance(x, Tensor) and own:
            got, advice = f"an input {tuple(x.shape)}, which it does not take", " ".join(str(error).split())[:150]
        else:
            raise
        name = next((name for name, other in model.named_modules() if other is module), "") or "the model"
        raise UsageError(f"{name} ({type(module).__name__}) got {got}; {advice}") from error


def remedy(module: nn.Module | None, x: Tensor) -> str | None:
    """Returns advice on how to make this input fit the module, or None."""
    if type(module) is nn.Linear and x.ndim > 3 and math.prod(x.shape[2:]) == module.in_features != x.shape[-1]:
        return "flatten them by nn.Flatten(2) before it"
    sequences = isinstance(module, _ConvNd) and x.ndim == CONVOLUTIONS.get(type(module), -1) + 1
    if isinstance(module, _ConvNd) and sequences and x.shape[2] == module.in_channels:
        return f"wrap it as Fold(nn.{type(module).__name__}(...))"
    return None


def misfit(module: nn.Module | None, x: Tensor) -> tuple[int, int] | None:
    """Returns the number of features (or channels) that an input has, and that the module takes, if these differ."""
    if type(module) is nn.Linear and x.ndim:
        found, takes = x.shape[-1], module.in_features
    elif isinstance(module, _ConvNd) and x.ndim == CONVOLUTIONS.get(type(module)):
        found, takes = x.shape[1], module.in_channels
    else:
        return None
    return None if found == takes else (found, takes)


def refused(traceback: TracebackType | None) -> tuple[nn.Module | None, Any]:
    """Returns the module of torch that raised the error and its input, or None if the error came from elsewhere.
    torch's errors name no module, so the local variables of the traceback are read."""
    module = x = None
    while traceback is not None:
        frame = traceback.tb_frame
        owner, where = frame.f_locals.get("self"), frame.f_globals.get("__name__", "")
        if where.startswith("torch.nn.modules") and type(owner).__module__.startswith("torch.nn.modules"):
            module, x = owner, frame.f_locals.get("input", x if owner is module else None)
        elif not where.startswith(BETWEEN):  # the error came from other code
            module = x = None
        traceback = traceback.tb_next
    return module, x
