"""Noise on weights that differs between samples, at the price of a second product (Flipout, arXiv 1803.04386).

The rows b of a pass share one draw ζ. Each row has its own signs for outputs and inputs, r_b and s_b:

    W_b = W + σ ζ ∘ r_b s_b^T,     y_b = W x_b + σ r_b ∘ (ζ (x_b ∘ s_b))

Given the signs, each row's noise is Gaussian like ζ, so that g_W = mean over rows of (L_b - b) ζ ∘ r_b s_b^T / σ is
unbiased. Since signs are independent, the correlation of a sample's loss with the noise of others cancels in the mean.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import Conv1d, Conv2d, Conv3d, _ConvNd

from ulr_snn.errors import UsageError
from ulr_snn.kernels import ranks
from ulr_snn.model.neurons import SpikingNeuron

MODULES = (nn.Linear, Conv1d, Conv2d, Conv3d)


@dataclass(frozen=True)
class Flips:
    """A parameter's draw for one copy. zeta: [out, in, ...] or [out]; outputs: r [rows, out]; inputs: s [rows, in]."""

    zeta: Tensor
    outputs: Tensor
    inputs: Tensor

    def scaled(self, scale: float) -> "Flips":
        """Returns the same draw with σ ζ instead of ζ."""
        return replace(self, zeta=scale * self.zeta)

    def gradient(self, signals: Tensor) -> Tensor:
        """Returns the mean over rows of signal ζ_b, for signals [rows]. A bias has no inputs."""
        if self.zeta.ndim < 2:
            return self.zeta * (signals @ self.outputs) / len(signals)
        rows = torch.einsum("b,bo,bi->oi", signals, self.outputs, self.inputs) / len(signals)
        return self.zeta * rows.view(*rows.shape, *[1] * (self.zeta.ndim - 2))


def check_by_sample(model: nn.Module, parameter: str) -> None:
    """Raises UsageError if noise on this parameter cannot differ between samples."""
    name, _, own = parameter.rpartition(".")
    modules = dict(model.named_modules())
    module, holder = modules.get(name), modules.get(name.rpartition(".")[0])
    grouped = getattr(module, "groups", 1) > 1
    recurrent = isinstance(holder, SpikingNeuron)  # a neuron reads its module's weights and does not call the module
    mine = None if module is None else module._parameters.get(own)
    tied = sum(q is mine for m in modules.values() for q in m._parameters.values() if q is not None)
    if not isinstance(module, MODULES) or own not in ("weight", "bias") or grouped or recurrent or tied > 1:
        raise UsageError(
            f"ULR got WeightNoise(per_sample=True) for {parameter}; it is for weights and biases of linear and "
            "ungrouped convolutional modules of which no other module, and no neuron, makes use"
        )


def flips(zeta: Tensor, rows: int, generator: torch.Generator) -> Flips:
    """Returns a draw ζ with random signs for each row. The signs of all ranks' rows are drawn, the own ones kept."""
    sizes = (len(zeta), zeta.shape[1] if zeta.ndim > 1 else 1)
    every, first = ranks.joined(rows), ranks.first_sample()
    drawn = [torch.randint(0, 2, (every, n), generator=generator, dtype=torch.int8) * 2 - 1 for n in sizes]
    drawn = [signs[first : first + rows] for signs in drawn]
    return Flips(zeta, *(signs.to(zeta.device, zeta.dtype) for signs in drawn))


@contextmanager
def disturbed_by_row(model: nn.Module, found: Mapping[str, Flips], steps: int) -> Iterator[None]:
    """Within this context, modules apply to each row that row's own weights. found: draws by parameter name."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x, (weight, bias) = inputs[0], own[module]
        if weight is not None:
            extra = product(module, x * placed(weight.inputs, x, module, steps), weight.zeta)
            output = output + extra * placed(weight.outputs, output, module, steps)
        if bias is not None:
            output = output + placed(bias.zeta * bias.outputs, output, module, steps)
        return output

    own = {
        model.get_submodule(name): [found.get(f"{name}.{kind}" if name else kind) for kind in ("weight", "bias")]
        for name in {parameter.rpartition(".")[0] for parameter in found}
    }
    with ExitStack() as stack:
        for module in own:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def product(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Returns the module's output for x with this weight and no bias."""
    if not isinstance(module, _ConvNd):
        return F.linear(x, weight)
    over_time = x.ndim > weight.ndim  # SpikingJelly's layers take [T, B, C, ...]
    flat = module._conv_forward(x.flatten(0, 1) if over_time else x, weight, None)
    return flat.unflatten(0, x.shape[:2]) if over_time else flat


def placed(values: Tensor, sequence: Tensor, module: nn.Module, steps: int) -> Tensor:
    """Reshapes values [rows, features] so that they broadcast against a module's input or output. This sequence is
    [T, rows, ...], [T * rows, ...] or [rows, ...], with features last, or before the positions of a convolution."""
    positions = module.weight.ndim - 2 if isinstance(module, _ConvNd) else 0
    rows = len(values)
    if sequence.ndim >= 3 + positions and sequence.shape[:2] == (steps, rows):  # the shape of one step may be equal
        lead = [1, rows]
    elif len(sequence) == steps * rows:
        values, lead = values.repeat(steps, 1), [steps * rows]
    elif sequence.ndim >= 3 + positions and sequence.shape[1] == rows != len(sequence):
        lead = [1, rows]  # over other time steps than the events'
    else:
        lead = [rows]
    between = sequence.ndim - len(lead) - 1 - positions
    return values.view(*lead, *[1] * between, values.shape[1], *[1] * positions)
