"""The prediction of what a spike does to the loss."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Credit:
    """a: prediction of ∂L/∂spike; current: of ∂L/∂J, all that the layer's own later steps add to it included; both
    [T, rows, ...], None where nothing is known."""

    a: Tensor | None
    current: Tensor | None


NOTHING = Credit(None, None)
