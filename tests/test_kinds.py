"""Credit reaches the first layer of networks with one kind of layer or neuron of another library each."""

import pytest
import torch

from tests.helpers import library_of
from ulr_snn import attach

for library in "spikingjelly", "snntorch", "norse":
    library_of(library)

from benchmarks.kinds import NETWORKS  # noqa: E402
from benchmarks.zoo_networks import ZOO  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_instances")


@pytest.mark.product
@pytest.mark.parametrize("name", NETWORKS)
def test_credit_reaches_the_first_layer(name):
    torch.manual_seed(0)
    model, x = ZOO[name].make(), (torch.rand(5, 8, 2, 16, 16) < 0.3).float()
    with attach(model, loss="ce_count", seed=0) as ulr:
        for _ in range(3):
            estimate = ulr.backward(x, torch.arange(8))
    gradients = [q.grad for q in model.parameters() if q.grad is not None]
    assert estimate.loss.isfinite().all() and all(g.isfinite().all() for g in gradients)
    assert next(model.parameters()).grad.any()
