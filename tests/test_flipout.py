"""Weight noise of every sample's own: what a pass gives is what each row's weights give, and the mean is right."""

import pytest
import torch
from torch import Tensor, nn

from tests.statistics import compare_means, gradient_draws
from ulr_snn import LIF, ULR, Fold, Logistic, TimeAverage, UsageError, WeightNoise, attach, plan
from ulr_snn.peers import EvolutionStrategies
from ulr_snn.sites.flipout import disturbed_by_row, flips

STEPS, ROWS = 3, 4


def drawn(model: nn.Module, name: str) -> dict:
    generator = torch.Generator().manual_seed(0)
    module = model.get_submodule(name) if name else model
    return {
        (f"{name}." if name else "") + kind: flips(torch.randn_like(q), ROWS, generator)
        for kind, q in module.named_parameters()
    }


@pytest.mark.parametrize("kind", ["linear", "folded", "a step as wide as long", "convolution", "folded convolution"])
def test_every_row_sees_its_own_weights(kind):
    torch.manual_seed(0)
    model, x = {
        "linear": (nn.Sequential(nn.Linear(5, 2)), torch.rand(STEPS, ROWS, 5)),
        "folded": (Fold(nn.Linear(5, 2)), torch.rand(STEPS, ROWS, 5)),
        "a step as wide as long": (nn.Sequential(nn.Linear(ROWS, 2)), torch.rand(STEPS, ROWS, ROWS)[:1].squeeze(0)),
        "convolution": (nn.Sequential(nn.Conv1d(2, 3, 3, padding=1)), torch.rand(ROWS, 2, 6)),
        "folded convolution": (Fold(nn.Conv2d(2, 3, 3, stride=2)), torch.rand(STEPS, ROWS, 2, 6, 5)),
    }[kind]
    found = drawn(model, "0")
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    steps = ROWS if kind == "a step as wide as long" else STEPS
    with torch.no_grad(), disturbed_by_row(model, found, steps):
        together = model(x)
    rows = 0 if kind in ("convolution", "a step as wide as long") else 1
    for b in range(ROWS):
        w, v = found["0.weight"], found["0.bias"]
        signs = torch.outer(w.outputs[b], w.inputs[b])
        with torch.no_grad():
            model[0].weight.copy_(weight + w.zeta * signs.view(*signs.shape, *[1] * (weight.ndim - 2)))
            model[0].bias.copy_(bias + v.zeta * v.outputs[b])
            alone = model(x.narrow(rows, b, 1))
        torch.testing.assert_close(together.narrow(rows, b, 1), alone)
    assert not model[0]._forward_hooks


@pytest.mark.slow
def test_the_mean_is_the_gradient_of_a_quadratic_and_varies_less():
    torch.manual_seed(0)
    model = nn.Linear(4, 4).double()
    x, y = torch.rand(2, 64, 4).double(), torch.zeros(64)

    def square(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.square().sum((0, 2))

    exact = torch.cat([g.flatten() for g in torch.autograd.grad(square(model(x), y).mean(), list(model.parameters()))])
    spread = []
    for per_sample in (False, True):
        peer = EvolutionStrategies(128, True, WeightNoise(scale=0.3, per_sample=per_sample))
        with peer.attach(model, square, 5, True) as attached:
            draws = gradient_draws(attached, (x, y), list(model.parameters()), 150 if per_sample else 24)
        spread.append(float(draws.var(0).sum()))
        if per_sample:
            found = compare_means("unbiased", draws, exact)
            assert found.agrees and found.error <= 0.01 * exact.norm(), found
            assert not compare_means("unbiased", 1.1 * draws, exact, spending=False).agrees
    assert spread[1] < spread[0] / 2, spread


def test_it_trains_a_spiking_net_and_refuses_what_it_cannot_do():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), LIF(), TimeAverage(), nn.Linear(6, 3))
    x, y = torch.rand(STEPS, ROWS, 4), torch.arange(ROWS) % 3
    noise = {"0": WeightNoise(per_sample=True)}
    with attach(model, ULR(noise=noise, firing=Logistic(scale=0.3)), seed=0) as ulr:
        ulr.backward(x, y)
    assert model[0].weight.grad.abs().sum() > 0
    learned = nn.Sequential(nn.Linear(4, 6), LIF(learn_beta=True), TimeAverage(), nn.Linear(6, 3))
    with pytest.raises(UsageError, match=r"per_sample=True\) for 1.beta"):
        plan(learned, (x, y), ULR(noise={"1": WeightNoise(per_sample=True)}))
