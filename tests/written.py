"""Models whose neurons are written out, with a function whose surrogate gradient nothing may ask for."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ulr_snn import ULR, attach

STEPS, BATCH, INPUTS, CLASSES = 9, 16, 5, 3


class Unasked(Function):
    """The base of functions whose surrogate gradient nothing may ask for."""

    @staticmethod
    def backward(ctx, *gradients):
        raise AssertionError("a surrogate gradient was asked for")


class Above(Unasked):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x)


class Own(nn.Module):
    """LIF neurons as they are written out in countless repositories, with the equations of `LIF`."""

    def __init__(self, beta: float, reset: str, fire: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.beta, self.reset, self.fire = beta, reset, fire

    def forward(self, x: Tensor) -> Tensor:
        v, spikes, found = torch.zeros_like(x[0]), torch.zeros_like(x[0]), []
        for now in x:
            kept = self.beta * v
            v = kept * (1 - spikes) + now if self.reset == "zero" else kept + now - spikes
            spikes = self.fire(v - 1.0)
            found.append(spikes)
        return torch.stack(found)


def layered(neuron: Callable[[float], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(INPUTS, 8), neuron(0.8), nn.Linear(8, 6), neuron(0.7), nn.Linear(6, CLASSES)
    return nn.Sequential(*layers).double()


def data(steps: int = STEPS, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = 2.0 * (torch.rand(steps, batch, INPUTS, generator=generator, dtype=torch.float64) < 0.5)
    return x, torch.arange(batch) % CLASSES


def gradients(model: nn.Module, estimator: ULR, lengths: Tensor | None = None, times: int = 3) -> list[Tensor]:
    """Those of so many steps; the first measures."""
    with attach(model, estimator, seed=5, total_steps=8) as ulr:
        for _ in range(times):
            ulr.backward(*data(), lengths=lengths)
    return [p.grad for p in model.parameters() if p.grad is not None]
