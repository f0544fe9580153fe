"""λ by measured variance and bias: it finds what is best, and weighs the scores' gradient with it."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from ulr_snn import LIF, ULR, Logistic, TimeAverage, UsageError, attach
from ulr_snn.credit.shrinkage import Shrinkage

RESIDUAL = ULR(credit="residual", copies=4, firing=Logistic(scale=0.4))
SHRUNK = dataclasses.replace(RESIDUAL, shrink=True)


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
def test_lambda_is_the_share_of_the_mean_in_the_power(noise):
    generator, found = torch.Generator().manual_seed(0), Shrinkage()
    assert found.factor("w") == 0
    mean = torch.randn(500, generator=generator)
    factors = []
    for step in range(1000):
        found.see("w", mean + noise * torch.randn(500, generator=generator))
        factors.append(found.factor("w") if step > 200 else 0.0)
    power = float(mean.square().sum())
    assert sum(factors[201:]) / len(factors[201:]) == pytest.approx(power / (power + 500 * noise**2), abs=0.02)


def test_no_mean_gives_zero():
    found, generator = Shrinkage(), torch.Generator().manual_seed(1)
    for _ in range(500):
        found.see("w", torch.randn(500, generator=generator))
    assert found.factor("w") < 0.02


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 7), LIF(), nn.Linear(7, 6), LIF(), TimeAverage(), nn.Linear(6, 3)).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.rand(5, 8, 4, generator=generator).double(), torch.arange(8) % 3


def gradients(estimator: ULR, factor: float | None, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    if factor is not None:
        monkeypatch.setattr(Shrinkage, "factor", lambda self, name: factor)
    model = net()
    with attach(model, estimator, seed=0) as ulr:
        for _ in range(3):
            model.zero_grad()
            ulr.backward(*data())
    return [q.grad for q in model.parameters()]


def test_the_gradient_lies_between_the_two(monkeypatch):
    whole = gradients(RESIDUAL, None, monkeypatch)
    one, none, half = (gradients(SHRUNK, factor, monkeypatch) for factor in (1.0, 0.0, 0.5))
    for w, a, b, c in zip(whole, one, none, half, strict=True):
        torch.testing.assert_close(w, a)
        torch.testing.assert_close((a + b) / 2, c)
    assert not torch.allclose(one[0], none[0])


def test_state_goes_on():
    model = net()
    with attach(model, SHRUNK, seed=0) as ulr:
        for _ in range(4):
            ulr.backward(*data())
        state, before = ulr.state_dict(), ulr.shrinkage.factor("0.weight")
    with attach(net(), SHRUNK, seed=0) as ulr:
        ulr.load_state_dict(state)
        assert ulr.shrinkage.factor("0.weight") == before
        assert torch.equal(ulr.shrinkage.last["0.weight"], state["shrinkage"]["last"]["0.weight"])


def test_it_is_for_residual_credit():
    with pytest.raises(UsageError, match="shrink with credit='global'"):
        ULR(credit="global", shrink=True)
