"""Spikes as bits: 32 neurons to a word."""

import torch
from torch import Tensor

WORD = 32  # neurons of a word


def pack_bits(spikes: Tensor) -> Tensor:
    """Spikes [..., N], 0 or 1 in any dtype, as words [..., ceil(N / 32)] int32: neuron n is bit n % 32 (bit 0 the
    least significant) of word n // 32. Bits beyond N are 0."""
    padded = torch.nn.functional.pad(spikes.to(torch.int32), (0, -spikes.shape[-1] % WORD))
    lane = torch.arange(WORD, dtype=torch.int32, device=spikes.device)
    return (padded.unflatten(-1, (-1, WORD)) << lane).sum(-1, dtype=torch.int32)


def unpack_bits(bits: Tensor, neurons: int, dtype: torch.dtype) -> Tensor:
    """The spikes [..., neurons] of such words [..., ceil(neurons / 32)], 0 or 1 in `dtype`."""
    lane = torch.arange(WORD, dtype=torch.int32, device=bits.device)
    return (bits[..., None] >> lane & 1).flatten(-2)[..., :neurons].to(dtype)
