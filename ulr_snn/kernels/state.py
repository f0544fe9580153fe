"""What scans are given besides currents: how they draw, and where they begin."""

from dataclasses import dataclass

from torch import Tensor

RESETS = ("subtract", "zero", "none")


@dataclass
class State:
    """Where a layer stands between two time steps: its membranes u and spikes, [B, ...]. Scans go on from it, and leave
    it at their last step."""

    membrane: Tensor
    spikes: Tensor


@dataclass(frozen=True)
class Draw:
    """What a scan draws its spikes by. law: a key of `fused.LAWS`; scale: of the noise, broadcast against [...]; words:
    of the noise, [T, B] int32 each, where they are to be drawn; mirrored: [B] bool, rows that see 1 - uniform."""

    law: str
    scale: Tensor
    words: tuple[Tensor, Tensor] | None
    mirrored: Tensor | None
