"""The fused scans on a GPU. They connect `dispatch` to the kernels of `triton.py`."""

from torch import Tensor

from ulr_snn.kernels import triton
from ulr_snn.kernels.state import Draw, State


def scan(
    current: Tensor,
    weight: Tensor | None,
    beta: Tensor,
    threshold: Tensor,
    reset: str,
    draw: Draw | None,
    lengths: Tensor | None,
    state: State | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Does what `dispatch.scan` does, by Triton."""
    before = None if state is None else (state.membrane, state.spikes)
    drawn = (1.0, None, None, None) if draw is None else (draw.scale, draw.law, draw.words, draw.mirrored)
    given = beta, threshold, reset, *drawn, before, lengths
    found = triton.lif_forward(current, *given) if weight is None else triton.recurrent_forward(current, weight, *given)
    if state is not None:
        state.membrane.copy_(found.state[0])
        state.spikes.copy_(found.state[1])
    return found.spikes, found.x, found.fed_back


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
    weight: Tensor | None,
    over: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """Does what `dispatch.credit` does, by Triton."""
    given = beta, threshold, reset
    if weight is None:
        found = triton.reverse_filter(a, *given, None, x, scale, law, spikes, None, later, lengths, totals, over)
    else:
        found = triton.recurrent_reverse(a, weight, *given, x, scale, law, spikes, later, lengths, totals, over)
    total, currents, carry = found
    later.copy_(carry)
    return total, currents


def leaky(c: Tensor, spikes: Tensor | None, beta: Tensor, reset: str) -> Tensor:
    """Does what `dispatch.leaky` does, by Triton."""
    return triton.leaky_filter(c, beta, reset, spikes)[0]
