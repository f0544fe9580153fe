"""A model may change the spikes that it is given in place, as residual nets do (`out += identity`)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ulr_snn import LIF, ULR, UsageError, attach

STEPS, BATCH, INPUTS, WIDTH = 5, 6, 4, 7


class Residual(nn.Module):
    """Two layers and a sum of their spikes. whole: layers take all time steps at once."""

    def __init__(self, layer: Callable[[], nn.Module], whole: bool, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.through, self.out = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.first, self.second = layer(), layer()
        self.whole, self.in_place = whole, in_place

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x) if self.whole else torch.stack([self.step(now) for now in x])

    def step(self, x: Tensor) -> Tensor:
        before = self.first(self.into(x))
        before = before.mul_(0.5) if self.in_place else before * 0.5
        after = self.second(self.through(before))
        if self.in_place:
            after += before
        else:
            after = after + before
        return self.out(after)


def ours() -> nn.Module:
    return LIF(0.8, 0.5, reset="zero")


def snntorch() -> nn.Module:
    return pytest.importorskip("snntorch").Leaky(beta=0.8, threshold=0.5, init_hidden=True)


def spikingjelly(mode: str) -> nn.Module:
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    return neuron.LIFNode(tau=2.0, v_threshold=0.3, step_mode=mode)


LAYERS = {
    "ours": (ours, True),
    "snnTorch": (snntorch, False),
    "SpikingJelly": (lambda: spikingjelly("m"), True),
    "SpikingJelly, steps": (lambda: spikingjelly("s"), False),
}


def batch() -> tuple[Tensor, Tensor]:
    return 3 * torch.rand(STEPS, BATCH, INPUTS, generator=torch.Generator().manual_seed(1)), torch.arange(BATCH) % 3


def gradients(estimator: ULR, model: nn.Module) -> list[Tensor]:
    """Of the first steps."""
    with attach(model, estimator, "ce_count", seed=0) as ulr:
        found = []
        for _ in range(3):
            model.zero_grad()
            ulr.backward(*batch())
            found += [q.grad.clone() for q in model.parameters()]
        return found


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("options", [{}, {"maps": "learned"}, {"credit": "global"}, {"credit": "residual"}], ids=str)
def test_spikes_changed_in_place_have_the_gradient_of_a_sum(layer, options):
    expected = gradients(ULR(**options), Residual(*LAYERS[layer], in_place=False))
    for a, b in zip(gradients(ULR(**options), Residual(*LAYERS[layer], in_place=True)), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layer", ["ours", "SpikingJelly"])  # of single steps torch says so
def test_what_begins_after_the_first_step_is_refused(layer):
    model = Residual(*LAYERS[layer], in_place=False)
    with attach(model, loss="ce_count", seed=0) as ulr:
        ulr.backward(*batch())
        model.in_place = True
        with pytest.raises(UsageError, match=r"changed the spikes of a layer in place.*write spikes = spikes \+ x"):
            ulr.backward(*batch())
