"""Chains: a model's modules run one after another over a whole sequence, in place of the model's own time loop."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ulr_snn.kernels.layout import channels_last, free_layout, shown, stored
from ulr_snn.kernels.stateless import run
from ulr_snn.model.neurons import LIF

OVER_TIME = {"MeanBackward1": torch.mean, "SumBackward1": torch.sum}


class NoChain(Exception):
    """Raised with the reason if a model cannot run as a chain."""


class Chain(nn.Module):
    """Runs a model's stages one after another, each over a whole sequence [T, B, ...]. It has the model's modules under
    the same names, with neurons of `ulr_snn` in place of the model's own.

    names: the modules that run. tail: the rest of the model if the stages are only its beginning, see `tail.Tail`; it
    takes the events and the outputs of the last stage. model: the model itself. why: why the stages are not all of it.
    """

    stages: list[nn.Module]
    names: list[str]
    tail: Callable[[Tensor, Tensor], Tensor] | None
    model: nn.Module
    why: str

    def __init__(
        self,
        model: nn.Module,
        stages: list[nn.Module],
        swapped: dict[int, LIF],
        names: list[str],
        tail: Callable[[Tensor, Tensor], Tensor] | None = None,
        why: str = "",
    ) -> None:
        super().__init__()
        self.__dict__.update(tree(model, swapped, {}).__dict__)
        # not as submodules, which would have two names each
        self.__dict__.update(stages=stages, names=names, tail=tail, model=model, why=why)

    def forward(self, x: Tensor) -> Tensor:
        known = x
        for stage in self.stages:
            known = run(stage, known)
        if self.tail is None:
            return known
        with free_layout(False):  # the model's own code may view pictures
            return self.tail(x, known.contiguous())

    @property
    def recurs(self) -> bool:
        """True if a layer of neurons has recurrent weights."""
        return any(getattr(stage, "recurrent", None) is not None for stage in self.stages)


def own_code(model: nn.Module) -> nn.Module:
    """Returns the module whose own code runs: the user's model behind a chain with a tail, else the module itself."""
    return model.model if isinstance(model, Chain) and model.tail is not None else model


def tree(module: nn.Module, swapped: Mapping[int, LIF], done: dict[int, nn.Module]) -> nn.Module:
    """Returns a module with the same submodules by the same names, but with swapped neurons. Both modules share the
    dictionaries of parameters and buffers, so that a replaced parameter is replaced in both. Modules without swapped
    neurons stay."""
    if id(module) in swapped:
        return swapped[id(module)]
    if id(module) not in done:
        done[id(module)] = module
        if any(id(part) in swapped for part in module.modules()):
            held = done[id(module)] = nn.Module()
            children = {name: child and tree(child, swapped, done) for name, child in module._modules.items()}
            own = {"_parameters": module._parameters, "_buffers": module._buffers, "_modules": children}
            held.__dict__.update(own, training=module.training)
    return done[id(module)]


class EachStep(nn.Sequential):
    """Runs a module that takes a whole sequence [T, B, ...] and treats each time step by itself."""


class StepByStep(nn.Sequential):
    """Runs modules at one time step [B, ...] of a sequence [T, B, ...] after another, as batch norm in training mode,
    which normalises each time step by itself."""

    def forward(self, sequence: Tensor) -> Tensor:
        last = channels_last(sequence, 2)  # which torch.stack does not keep
        found = [super(StepByStep, self).forward(shown(x, last)) for x in stored(sequence, last)]
        last = last and channels_last(found[0])
        return shown(torch.stack([stored(x, last) for x in found]), last)


class Shape(nn.Module):
    """Reshapes the features of rows [n, ...]."""

    def __init__(self, features: torch.Size) -> None:
        super().__init__()
        self.features = features

    def forward(self, rows: Tensor) -> Tensor:
        return rows.flatten(1) if len(self.features) == 1 else rows.reshape(len(rows), *self.features)


class OverTime(nn.Module):
    """Takes the mean or sum over time, padding included: [T, B, ...] -> [B, ...]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, sequence: Tensor) -> Tensor:
        return OVER_TIME[self.kind](sequence, 0)


def hooked(module: nn.Module) -> bool:
    """Returns whether a module has hooks of its own."""
    backward = module._backward_hooks or module._backward_pre_hooks
    return bool(module._forward_hooks or module._forward_pre_hooks or backward)
