"""The fused scans on a GPU. They connect `dispatch` to the kernels of `triton.py`."""

from torch import Tensor

from ulr_snn.kernels import triton
from ulr_snn.kernels.state import Draw, State


def scan(
    current: Tensor,
    beta: Tensor,
    threshold: Tensor,
    reset: str,
    draw: Draw | None,
    lengths: Tensor | None,
    state: State | None,
) -> tuple[Tensor | None, Tensor | None, None]:
    """Does what `dispatch.scan` does, by Triton."""
    before = None if state is None else (state.membrane, state.spikes)
    given = current, beta, threshold, reset
    if draw is None:
        found = triton.lif_forward(*given, state=before, lengths=lengths)
    else:
        drawn = draw.scale, draw.law, draw.words, draw.mirrored
        found = triton.lif_forward(*given, *drawn, before, lengths)
    if state is not None:
        state.membrane.copy_(found.state[0])
        state.spikes.copy_(found.state[1])
    return found.spikes, found.x, None


def credit(
    a: Tensor,
    x: Tensor,
    law: str,
    scale: Tensor,
    lengths: Tensor | None,
    spikes: Tensor,
    beta: Tensor,
    threshold: Tensor,
    reset: str,
    later: Tensor,
    totals: bool,
) -> tuple[Tensor | None, Tensor]:
    """Does what `dispatch.credit` does, by Triton."""
    total, currents, carry = triton.reverse_filter(
        a, beta, threshold, reset, x=x, scale=scale, law=law, spikes=spikes, later=later, lengths=lengths,
        with_total=totals,
    )  # fmt: skip
    later.copy_(carry)
    return total, currents


def leaky(c: Tensor, spikes: Tensor | None, beta: Tensor, reset: str) -> Tensor:
    """Does what `dispatch.leaky` does, by Triton."""
    return triton.leaky_filter(c, beta, reset, spikes)[0]
