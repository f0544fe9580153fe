"""Splits models that can run in chunks of time: sequences of modules that act on single steps or have known states."""

from dataclasses import dataclass

import torch
from torch import nn

from ulr_snn.errors import UsageError
from ulr_snn.model.call import coupled_modules
from ulr_snn.model.chain import Chain, EachStep, hooked
from ulr_snn.model.entry import Synapse
from ulr_snn.model.events import Frames
from ulr_snn.model.neurons import LIF, Fold, LeakyReadout, RecurrentLIF, TimeAverage
from ulr_snn.sites.binding import user_modules

TIMELESS = (EachStep, nn.Linear, nn.Identity, nn.ReLU, nn.Sigmoid, nn.Tanh)


def modules_in_order(model: nn.Module) -> list[nn.Module]:
    """Returns the modules that a model runs one after another."""
    if isinstance(model, Chain) and model.tail is None:
        return list(model.stages)
    if type(model) is nn.Sequential and not hooked(model):
        return [part for module in model for part in modules_in_order(module)]
    return [model]


@torch.no_grad()
def neurons_of(model: nn.Module, frames: Frames, dtype: torch.dtype) -> int:
    """Counts the neurons of all layers. Raises UsageError for a model that needs all time steps at once."""
    x, count = frames[:1, :2].to(dtype).clone(), 0  # a module may change it in place
    for module in Split.of(model).front:
        x = module(x)
        count += x[0, 0].numel() if isinstance(module, LIF) else 0
    return count


@dataclass(frozen=True)
class Split:
    """A model in three parts.

    front: modules that act on single time steps or have known states; average: the average over time, if any;
    back: modules after the average.
    """

    front: list[nn.Module]
    average: TimeAverage | None
    back: list[nn.Module]

    @classmethod
    def of(cls, model: nn.Module) -> "Split":
        """Splits a model. Raises UsageError for a model that needs all time steps at once."""
        modules = modules_in_order(model)
        cut = next((i for i, module in enumerate(modules) if type(module) is TimeAverage), len(modules))
        if other := next((module for module in modules[:cut] if not local_in_time(module)), None):
            raise UsageError(
                f"{in_words(other)} is not known to see each time step by itself, which chunks of time need; use "
                "memory='auto', or nn.Sequential of Linear, Flatten, Fold and ulr_snn's neurons"
            )
        neurons = [module for module in modules[:cut] if isinstance(module, LIF)]
        if len(set(map(id, neurons))) < len(neurons):
            raise UsageError("chunks of time need a neuron layer of its own at every place; use memory='auto'")
        last = max((i for i, module in enumerate(modules[:cut]) if isinstance(module, LIF)), default=0)
        if any(isinstance(module, LeakyReadout) for module in modules[:last]):
            raise UsageError("chunks of time need a LeakyReadout to come after all spiking layers; use memory='auto'")
        average = next((module for module in modules if isinstance(module, TimeAverage)), None)
        return cls(modules[:cut], average, modules[cut + 1 :])

    @property
    def readouts(self) -> list[LeakyReadout]:
        return [module for module in self.front if isinstance(module, LeakyReadout)]


def in_words(module: nn.Module) -> str:
    """Names a module as the user knows it."""
    if isinstance(module, Chain):
        return f"{type(module.model).__name__}, whose own code runs behind a chain,"
    if isinstance(module, Synapse):
        return "a synapse before a neuron"
    coupled = next((part for part in coupled_modules(module) if part.training), None)
    return type(module).__name__ if coupled is None else f"{type(coupled).__name__} in training mode"


def local_in_time(module: nn.Module) -> bool:
    """True if a module has the same outputs in a chunk of time as in the whole sequence, given its known state."""
    if type(module) is nn.Flatten:
        return module.start_dim >= 2
    if type(module) is nn.Unflatten:
        return isinstance(module.dim, int) and module.dim >= 2
    if type(module) in (LIF, RecurrentLIF):
        return not any(q.requires_grad for q in (module.beta, module.threshold))
    if type(module) is LeakyReadout:
        return not module.beta.requires_grad
    if type(module) is Fold:
        return not coupled_modules(module) and not [m for m in user_modules(module) if m is not module]
    return type(module) in TIMELESS
