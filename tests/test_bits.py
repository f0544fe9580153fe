"""Spikes as bits, by numpy on a CPU and by torch elsewhere."""

import pytest
import torch

from ulr_snn.kernels.bits import pack_bits, packed_by_torch, unpack_bits, unpacked_by_torch

# On a GPU, `pack_bits` and `unpack_bits` are the ways of torch.
WAYS = pytest.mark.parametrize(
    ("pack", "unpack"), [(pack_bits, unpack_bits), (packed_by_torch, unpacked_by_torch)], ids=["numpy", "torch"]
)


@WAYS
def test_layout(pack, unpack, device):
    spikes = torch.zeros(40, device=device)
    spikes[[0, 2, 33]] = 1
    assert pack(spikes).tolist() == [0b101, 0b10]
    assert pack(torch.eye(32, device=device)[31]).tolist() == [-(2**31)]
    assert pack(spikes).dtype == torch.int32


@WAYS
@pytest.mark.parametrize("neurons", [1, 31, 32, 33, 96])
def test_bits_hold_the_spikes(neurons, pack, unpack, device):
    spikes = (torch.rand(5, 2, neurons, generator=torch.Generator().manual_seed(0)) < 0.5).to(device, torch.bfloat16)
    bits = pack(spikes)
    assert bits.shape == (5, 2, -(-neurons // 32))
    assert torch.equal(unpack(bits, neurons, torch.bfloat16), spikes)
    assert unpack(bits, neurons, torch.float32).dtype == torch.float32
    turned = spikes.transpose(0, 1)  # of any layout in memory
    assert torch.equal(pack(turned), bits.transpose(0, 1))
    assert torch.equal(unpack(bits.transpose(0, 1), neurons, torch.bfloat16), turned)
