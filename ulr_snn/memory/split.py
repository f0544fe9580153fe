"""Models that can run in chunks of time: modules one after another, each of which sees every time step by itself or
carries a state that is known."""

from dataclasses import dataclass

import torch
from torch import nn

from ulr_snn.errors import UsageError
from ulr_snn.model.call import coupled_modules
from ulr_snn.model.chain import Chain, EachStep, hooked
from ulr_snn.model.events import Frames
from ulr_snn.model.neurons import LIF, Fold, LeakyReadout, RecurrentLIF, TimeAverage
from ulr_snn.sites.binding import user_modules

TIMELESS = (EachStep, nn.Linear, nn.Identity, nn.ReLU, nn.Sigmoid, nn.Tanh)


def chain(model: nn.Module) -> list[nn.Module]:
    """The modules that a model runs one after another."""
    if isinstance(model, Chain):
        return model.stages
    opens = type(model) is nn.Sequential and not hooked(model)
    return [part for module in model for part in chain(module)] if opens else [model]


@torch.no_grad()
def neurons_of(model: nn.Module, frames: Frames, dtype: torch.dtype) -> int:
    """Those of a sample in all layers. Raises UsageError for a model that has to see all time steps at once."""
    x, found = frames[:1, :2].to(dtype).clone(), 0  # a module may change it in place
    for module in Split.of(model).front:
        x = module(x)
        found += x[0, 0].numel() if isinstance(module, LIF) else 0
    return found


@dataclass(frozen=True)
class Split:
    """A model in front: modules that see each time step by itself, or carry a state that is known; average: over time,
    where there is one; back: what comes after it."""

    front: list[nn.Module]
    average: TimeAverage | None
    back: list[nn.Module]

    @classmethod
    def of(cls, model: nn.Module) -> "Split":
        """Raises UsageError for a model that has to see all time steps at once."""
        modules = chain(model)
        cut = next((i for i, module in enumerate(modules) if type(module) is TimeAverage), len(modules))
        if bad := next((module for module in modules[:cut] if not local_in_time(module)), None):
            raise UsageError(
                f"{type(bad).__name__} is not known to see each time step by itself, which chunks of time need; use "
                "memory='auto', or nn.Sequential of Linear, Flatten, Fold and ulr_snn's neurons"
            )
        neurons = [module for module in modules[:cut] if isinstance(module, LIF)]
        if len(set(map(id, neurons))) < len(neurons):
            raise UsageError("chunks of time need a neuron layer of its own at every place; use memory='auto'")
        last = max((i for i, module in enumerate(modules[:cut]) if isinstance(module, LIF)), default=0)
        if any(isinstance(module, LeakyReadout) for module in modules[:last]):
            raise UsageError("chunks of time need a LeakyReadout to come after all spiking layers; use memory='auto'")
        return cls(modules[:cut], modules[cut] if cut < len(modules) else None, modules[cut + 1 :])

    @property
    def readouts(self) -> list[LeakyReadout]:
        return [module for module in self.front if isinstance(module, LeakyReadout)]


def local_in_time(module: nn.Module) -> bool:
    """Whether a module gives for a chunk of time what it gives there for the whole, from a state that is known."""
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
