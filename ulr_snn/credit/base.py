"""The predicted credit of a layer's spikes."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Credit:
    """Predicted derivatives of the loss at a layer, [T, rows, ...] each; None where nothing is known. a: ∂L/∂spike.
    current: ∂L/∂J, which includes the effect by way of the layer's own later steps."""

    a: Tensor | None
    current: Tensor | None


NOTHING = Credit(None, None)
