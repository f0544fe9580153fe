"""E[L] and its exact gradient for tiny nets, by enumerating every spike pattern.

Written from the equations of the stochastic neuron and from nothing in the library: plain loops over time and
layers, all patterns side by side, and autograd through the *probabilities of the patterns* (never through a
spike).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor


@dataclass
class Layer:
    """One layer of spiking neurons. current: input of one step [P, ...] -> current [P, *shape]."""

    current: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    beta: Tensor | float = 0.9
    threshold: Tensor | float = 1.0
    reset: str = "subtract"
    recurrent: Tensor | None = None  # V: the current gains V s_{t-1}
    firing: str = "logistic"
    scale: float | None = None  # None: 0.12 of the threshold


def distribution(layer: Layer, membrane: Tensor) -> Tensor:
    """F((u - threshold) / scale)."""
    scale = 0.12 * layer.threshold if layer.scale is None else layer.scale
    x = (membrane - layer.threshold) / scale
    return 1 / (1 + torch.exp(-x)) if layer.firing == "logistic" else 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def all_patterns(
    layers: list[Layer],
    readout: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    observe: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Probability and loss of every spike pattern of one sample x [T, ...], [P] float64.

    readout: spikes of the last layer [T, P, ...] -> outputs; loss: outputs -> [P]. observe: spikes of the last layer at
    earlier steps [t, P, ...] -> input of step t [P, ...]; None: the input is x.
    """
    steps = len(x)
    sizes = [steps * math.prod(layer.shape) for layer in layers]
    bits = sum(sizes)
    assert bits <= 13, f"2^{bits} patterns are too many"
    numbers = torch.arange(2**bits)[:, None]
    patterns = ((numbers >> torch.arange(bits)) & 1).double()
    spikes = [
        part.view(2**bits, steps, *layer.shape) for part, layer in zip(patterns.split(sizes, 1), layers, strict=True)
    ]
    probability = torch.ones(2**bits, dtype=torch.float64)
    membranes = [torch.zeros(2**bits, *layer.shape, dtype=torch.float64) for layer in layers]
    for t in range(steps):
        if observe is None:
            incoming = x[t].double().expand(2**bits, *x[t].shape)
        else:
            incoming = observe(spikes[-1][:, :t].transpose(0, 1))
        for index, layer in enumerate(layers):
            before = spikes[index][:, t - 1] if t > 0 else torch.zeros_like(spikes[index][:, 0])
            u = layer.beta * membranes[index]
            if layer.reset == "zero":
                u = u * (1 - before)
            if layer.reset == "subtract":
                u = u - layer.threshold * before
            u = u + layer.current(incoming)
            if layer.recurrent is not None:
                u = u + before @ layer.recurrent.T
            membranes[index] = u
            p, now = distribution(layer, u), spikes[index][:, t]
            probability = probability * (now * p + (1 - now) * (1 - p)).flatten(1).prod(1)
            incoming = now
    torch.testing.assert_close(probability.sum().item(), 1.0, rtol=1e-12, atol=1e-12)
    return probability, loss(readout(spikes[-1].transpose(0, 1)))


def expected_loss(probability: Tensor, losses: Tensor) -> Tensor:
    """E[L]."""
    return (probability * losses).sum()


def expected_bound(copies: int, probability: Tensor, losses: Tensor) -> Tensor:
    """E[-log mean of exp(-L) over independent copies]."""
    weight, total = probability, torch.exp(-losses)
    for _ in range(copies - 1):
        weight = (weight[:, None] * probability).flatten()
        total = (total[:, None] + torch.exp(-losses)).flatten()
    return -(weight * (total / copies).log()).sum()


expected_bound_of_two = partial(expected_bound, 2)
expected_bound_of_four = partial(expected_bound, 4)


def exact_gradient(
    layers: list[Layer],
    readout: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    parameters: list[Tensor],
    objective: Callable[[Tensor, Tensor], Tensor] = expected_loss,
    observe: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The exact gradient of E[L], or another objective of all patterns' probabilities and losses, all parameters
    flattened into one vector."""
    value = objective(*all_patterns(layers, readout, loss, x, observe))
    gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])
