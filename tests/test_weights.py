"""Weight noise: the formula, its mean, and who gets it."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.statistics import compare_means, gradient_draws
from ulr_snn import LIF, ULR, TimeAverage, UsageError, WeightNoise, attach
from ulr_snn.sites.weights import WeightSites, replaced_parameters, scale_of

STEPS, BATCH, PIXELS = 4, 5, 3


def silent() -> nn.Sequential:
    """Its spikes never change: all that is left to chance is the noise on the readout's weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(PIXELS, 4), LIF(), TimeAverage(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([-500.0, 500.0, 500.0, -500.0]))
    return model.requires_grad_(False)


def data() -> tuple[Tensor, Tensor]:
    return torch.rand(STEPS, BATCH, PIXELS, dtype=torch.float64), torch.arange(BATCH) % 2


def square(outputs: Tensor, targets: Tensor) -> Tensor:
    """A quadratic: noise does not move the gradient of its mean. Autograd does not see it."""
    return ((outputs.detach() - targets[:, None]) ** 2).sum(1)


def estimator(copies: int = 4, antithetic: bool = True, **options) -> ULR:
    return ULR(credit="global", copies=copies, antithetic=antithetic, **options)


@pytest.mark.parametrize("wrong", ["", "sign", "missing 1/scale", "partner as baseline"])
def test_the_gradient_is_the_formula_with_the_same_noise(wrong):
    model, (x, y) = silent(), data()
    model[3].requires_grad_(True)
    with attach(model, estimator(noise={"3": WeightNoise(0.2)}), square, seed=5) as ulr:
        ulr.backward(x, y)
    sites = WeightSites({"3.weight": WeightNoise(0.2), "3.bias": WeightNoise(0.2)}, 5, True)
    with torch.no_grad():
        spikes = model[:3](x)
        draws = [[sites.draw(f"3.{name}", q, 0, k) for name, q in model[3].named_parameters()] for k in range(4)]
        losses = []
        for weight, bias in draws:
            outputs = spikes @ (model[3].weight + 0.2 * weight).T + model[3].bias + 0.2 * bias
            losses.append(((outputs - y[:, None]) ** 2).sum(1))
        expected = [torch.zeros_like(q) for q in model[3].parameters()]
        for k in range(4):
            others = [losses[j] for j in range(4) if j // 2 != k // 2]
            if wrong == "partner as baseline":
                others = [losses[k ^ 1]]
            signal = (losses[k] - torch.stack(others).mean(0)).mean()
            for total, zeta in zip(expected, draws[k], strict=True):
                total += (-1 if wrong == "sign" else 1) * signal * zeta / 4 / (1 if wrong == "missing 1/scale" else 0.2)
    assert torch.equal(draws[1][0], -draws[0][0]) and not torch.equal(draws[2][0], draws[0][0])
    agree = [torch.allclose(q.grad, e, rtol=1e-9) for q, e in zip(model[3].parameters(), expected, strict=True)]
    assert all(agree) if not wrong else not any(agree)


@pytest.mark.slow
@pytest.mark.parametrize(("copies", "antithetic"), [(2, True), (4, True), (3, False)])
def test_its_mean_is_the_gradient_of_a_quadratic(copies, antithetic):
    model, (x, y) = silent(), data()
    model[3].requires_grad_(True)
    outputs = model(x)
    exact = torch.autograd.grad(((outputs - y[:, None]) ** 2).sum(1).mean(), list(model[3].parameters()))
    exact = torch.cat([g.flatten() for g in exact])
    chosen = estimator(copies, antithetic, noise={"3": WeightNoise(0.3)})
    with attach(model, chosen, square, seed=1) as ulr:
        draws = gradient_draws(ulr, (x, y), list(model[3].parameters()), 30 * 20, warm_up=1)
    draws = draws.unflatten(0, (30, 20)).mean(1)
    assert compare_means("unbiased", draws, exact).agrees
    assert not compare_means("unbiased", draws, 1.5 * exact, spending=False).agrees


class Odd(nn.Module):
    """A parameter that acts only where it is rounded, by way of NumPy, and one that does not act at all."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(PIXELS, 4), LIF(), TimeAverage(), nn.Linear(4, 2))
        self.gain, self.idle = nn.Parameter(torch.full((2,), 3.0)), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * torch.from_numpy(self.gain.detach().cpu().numpy().round()).to(x)


def test_who_gets_it():
    """A parameter that something comes of, but no gradient reaches; no other."""
    torch.manual_seed(0)
    model, (x, y) = Odd(), data()
    with attach(model) as ulr:
        with pytest.warns(UserWarning, match="no gradient reaches idle;"):
            ulr.backward(x.float(), y)
        assert list(ulr.structure.weights) == ["gain"]
        assert ulr.backward(x.float(), y).stats["copies"] == 2
    assert [name for name, q in model.named_parameters() if q.grad is None] == ["idle"]


def test_noise_by_name_replaces_the_gradient_of_other_sites():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(PIXELS, 4), LIF(), TimeAverage(), nn.Linear(4, 2)).double()
    x, y = data()
    x = x + 2  # membranes near the threshold
    with attach(model, estimator(noise={"0.weight": WeightNoise(1.0)}), seed=2) as ulr:
        ulr.backward(x, y)
        assert ulr.structure.parameters["0.weight"] == ["weight noise"]
        assert ulr.structure.parameters["0.bias"] == ["1"]
    sites = WeightSites({"0.weight": WeightNoise(1.0)}, 2, True)
    drawn = torch.stack([sites.draw("0.weight", model[0].weight, 0, k).flatten() for k in (0, 2)])
    inside = torch.linalg.lstsq(drawn.T, model[0].weight.grad.flatten()[:, None]).residuals
    assert model[0].weight.grad.any() and torch.allclose(inside, torch.zeros_like(inside))  # in the span of its draws


def test_parameters_are_replaced_wherever_they_are_used_and_put_back():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))
    before = dict(model.named_parameters())
    moved = torch.zeros(2, 2)
    with pytest.raises(ZeroDivisionError), replaced_parameters(model, {"0.weight": moved}):
        assert model[0].weight is moved and model[2][0].weight is moved
        raise ZeroDivisionError
    assert all(q is before[name] for name, q in model.named_parameters())


def test_its_scale():
    assert scale_of(WeightNoise(), torch.tensor([3.0, 4.0])) == pytest.approx(0.1 * 12.5**0.5)
    assert scale_of(WeightNoise(), torch.zeros(3)) == 0.1
    assert scale_of(WeightNoise(0.7), torch.ones(3)) == 0.7


def test_training_goes_on_with_other_optimizers_and_leaves_the_model_as_it_was():
    model, (x, y) = silent(), data()
    model[3].requires_grad_(True)
    kept = copy.deepcopy(model.state_dict())
    with attach(model, estimator(), square) as ulr:
        ulr.backward(x, y)
        ulr.backward(x, y)
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())


def test_a_state_saved_after_the_end_says_which_parameters_have_noise():
    model, (x, y) = silent(), data()
    model[3].requires_grad_(True)
    with attach(model, estimator(), square) as ulr:
        ulr.backward(x, y)
        inside = ulr.state_dict()["weights"]
    assert inside and ulr.state_dict()["weights"] == inside


def test_a_checkpoint_of_an_earlier_version_is_read():
    """It names the rank of weight noise, which `ULR` no longer has."""
    model = nn.Sequential(nn.Linear(6, 5), LIF(), TimeAverage(), nn.Linear(5, 3))
    x, y = torch.rand(4, 8, 6), torch.arange(8) % 3
    estimator = ULR(noise={"0.weight": WeightNoise()})
    with attach(model, estimator) as ulr:
        ulr.backward(x, y)
        state = ulr.state_dict()
    earlier = {name: noise | {"rank": None} for name, noise in state["weights"].items()}
    with attach(model, estimator) as ulr:
        ulr.load_state_dict(state | {"weights": earlier})
        ulr.backward(x, y)
        assert ulr.state_dict()["weights"] == state["weights"]
        with pytest.raises(UsageError, match="weight noise of rank one"):
            ulr.load_state_dict(state | {"weights": {"0.weight": earlier["0.weight"] | {"rank": 1}}})
