"""Inputs of the scans besides currents: the state before the first step, and the noise."""

from dataclasses import dataclass

from torch import Tensor

RESETS = ("subtract", "zero", "none")


@dataclass
class State:
    """The state of a layer between two time steps: membranes u and spikes, [B, ...]. A scan starts from this state and
    overwrites it with the state after the last step."""

    membrane: Tensor
    spikes: Tensor


@dataclass(frozen=True)
class Draw:
    """The noise with which a scan draws spikes."""

    law: str  # a key of `dispatch.LAWS`
    scale: Tensor  # scale of the noise, broadcast against [...]
    words: tuple[Tensor, Tensor] | None  # random words, [T, B] int32 each; None: spikes are known
    mirrored: Tensor | None  # [B] bool, rows that see 1 - uniform
