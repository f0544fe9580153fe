"""A chain: a model's modules one after another over a whole sequence, in place of the model's own time loop."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ulr_snn.kernels.stateless import run
from ulr_snn.model.neurons import LIF

OVER_TIME = {"MeanBackward1": torch.mean, "SumBackward1": torch.sum}


class NoChain(Exception):
    """A model cannot run as a chain; says why."""


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

    @property
    def recurs(self) -> bool:
        """Whether a layer of neurons has recurrent weights."""
        return any(getattr(stage, "recurrent", None) is not None for stage in self.stages)


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


def hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
