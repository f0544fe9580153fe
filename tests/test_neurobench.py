"""NeuroBench and ulr_snn count the same spikes and synaptic operations."""

import pytest
import torch
from torch import nn

from tests.helpers import beside_torchvision
from ulr_snn import LIF, Fold, RecurrentLIF

beside_torchvision("neurobench")
neurobench_run = pytest.importorskip("benchmarks.neurobench_run")


def nets() -> dict[str, nn.Sequential]:
    torch.manual_seed(0)
    stem = Fold(nn.Conv2d(2, 4, 3, stride=2, padding=1)), LIF(0.9, 0.2), Fold(nn.Conv2d(4, 4, 3, groups=2, bias=False))
    return {
        "dense": nn.Sequential(nn.Flatten(2), nn.Linear(128, 20), LIF(0.9, 0.3), nn.Linear(20, 5)),
        "recurrent": nn.Sequential(nn.Flatten(2), nn.Linear(128, 20), RecurrentLIF(20, 0.9, 0.3), nn.Linear(20, 5)),
        "convolutional": nn.Sequential(*stem, LIF(0.9, 0.1), nn.Flatten(2), nn.Linear(16, 5)),
    }


@pytest.mark.parametrize("name", nets())
def test_both_count_the_same(name):
    model, generator = nets()[name], torch.Generator().manual_seed(1)
    x = (torch.rand(6, 10, 2, 8, 8, generator=generator) < 0.3).float()
    loader = [(x[:, :4], torch.arange(4)), (x[:, 4:], torch.arange(6) % 5)]
    theirs = neurobench_run.by_neurobench(model, loader, 10)
    ours = neurobench_run.by_ulr_snn(model, loader)
    assert theirs["operations"] > 0 and 0 < theirs["activation_sparsity"] < 1
    assert ours["operations"] == pytest.approx(theirs["operations"])
    assert ours["footprint"] == theirs["footprint"] and theirs["connection_sparsity"] == 0
    # NeuroBench takes the mean over batches of different sizes, weighted by size.
    assert ours["activation_sparsity"] == pytest.approx(theirs["activation_sparsity"], abs=1e-6)
    assert ours["accuracy"] == pytest.approx(theirs["accuracy"])
