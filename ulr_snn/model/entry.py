"""Modules that a current passes before it reaches neurons of `ulr_snn` with the equations of another library."""

from typing import Any

from torch import Tensor, nn

from ulr_snn.kernels.precision import full_precision, widened
from ulr_snn.model.neurons import integrated


class Biased(nn.Module):
    """Adds the bias of a module to rows."""

    def __init__(self, module: nn.Linear) -> None:
        super().__init__()
        self.module = module

    def forward(self, rows: Tensor) -> Tensor:
        return rows + self.module.bias


class Scaled(nn.Module):
    """Multiplies rows by a number, or by a number for each neuron."""

    def __init__(self, factor: float | Tensor) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, rows: Tensor) -> Tensor:
        return self.factor * rows


class Synapse(nn.Module):
    """Sums a current up with a leak, c_t = leak c_{t-1} + I_t [T, B, ...]. The leak is clamped to 0 to 1.

    source: the leak, or an object and the name of its attribute, such as a parameter of a library's neuron.
    """

    def __init__(self, source: Tensor | tuple[Any, str]) -> None:
        super().__init__()
        self.__dict__["source"] = source  # the object is no submodule

    @property
    def leak(self) -> Tensor:
        source = self.__dict__["source"]
        return source if isinstance(source, Tensor) else getattr(*source)

    def forward(self, current: Tensor) -> Tensor:
        with full_precision():
            wide = widened(current)
            return integrated(wide, self.leak.to(wide).clamp(0, 1)).to(current.dtype)
