"""Conversion between spikes and bits, with 32 neurons in a word."""

import numpy as np
import torch
from torch import Tensor

WORD = 32  # neurons in a word


def pack_bits(spikes: Tensor) -> Tensor:
    """Packs spikes [..., N], 0 or 1 in any dtype, into words [..., ceil(N / 32)] int32. Neuron n is bit n % 32 (bit 0
    the least significant) of word n // 32. Bits beyond N are 0."""
    if spikes.device.type == "cpu":  # numpy is three times as fast as torch and needs no temporary memory
        packed = np.packbits(spikes.bool().contiguous().numpy(), axis=-1, bitorder="little")
        packed = np.pad(packed, [(0, 0)] * (spikes.ndim - 1) + [(0, -packed.shape[-1] % (WORD // 8))])
        return torch.from_numpy(packed.view("<i4").astype(np.int32, copy=False))
    return packed_by_torch(spikes)


def packed_by_torch(spikes: Tensor) -> Tensor:
    """Does what `pack_bits` does, in plain torch."""
    padded = torch.nn.functional.pad(spikes.to(torch.int32), (0, -spikes.shape[-1] % WORD))
    lane = torch.arange(WORD, dtype=torch.int32, device=spikes.device)
    return (padded.unflatten(-1, (-1, WORD)) << lane).sum(-1, dtype=torch.int32)


def unpack_bits(bits: Tensor, neurons: int, dtype: torch.dtype) -> Tensor:
    """Unpacks the spikes [..., neurons], 0 or 1 in `dtype`, from the words [..., ceil(neurons / 32)] of `pack_bits`."""
    if bits.device.type == "cpu":
        packed = bits.contiguous().numpy().astype("<i4", copy=False).view(np.uint8)
        return torch.from_numpy(np.unpackbits(packed, axis=-1, count=neurons, bitorder="little")).to(dtype)
    return unpacked_by_torch(bits, neurons, dtype)


def unpacked_by_torch(bits: Tensor, neurons: int, dtype: torch.dtype) -> Tensor:
    """Does what `unpack_bits` does, in plain torch."""
    lane = torch.arange(WORD, dtype=torch.int32, device=bits.device)
    return (bits[..., None] >> lane & 1).flatten(-2)[..., :neurons].to(dtype)
