"""The expected variance of a choice of noise is that of its scores, and `auto` chooses by it."""

import pytest
import torch
from torch import Tensor, nn

from ulr_snn import LIF, ULR, Fold, Independent, Logistic, RecurrentLIF, UsageError, WeightNoise, attach, plan
from ulr_snn.losses.named import resolve
from ulr_snn.model.batch import Batch
from ulr_snn.model.bound import BoundModel
from ulr_snn.model.forward import Forward
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.sites.records import Record
from ulr_snn.sites.variance import BY_SAMPLE, by_sample, of_firing, of_weights

SCALE = 0.02


def rule(outputs: Tensor, targets: Tensor) -> Tensor:
    """Without a gradient, and of spikes: a distance of counts."""
    return (outputs.detach().sum(0).argmax(1) - targets).abs().to(outputs.dtype)


def net(size: float) -> nn.Sequential:
    """Convolution weights of this size: the larger, the less noise in proportion to them says about the variance."""
    torch.manual_seed(0)
    model = nn.Sequential(
        Fold(nn.Conv1d(1, 2, 3, padding=1)), LIF(), nn.Flatten(2), nn.Linear(24, 3), LIF()
    ).double()  # fmt: skip
    nn.init.uniform_(model[0][0].weight, 0.3 * size, size)
    nn.init.uniform_(model[3].weight, 0.0, 0.1)
    return model


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(6, 16, 1, 12, generator=generator).double(), torch.arange(16) % 3


def scores(model: nn.Module, step: int) -> Record:
    """The first layer's record of a pass."""
    level = NoiseLevel(Logistic(scale=SCALE))
    batch = Batch.of(model, *data(), None, resolve(rule))
    bound = BoundModel.of(model, batch, {})
    return Forward(bound, level, 0, step, Independent()).run(batch, [0]).records[0]


def test_expected_length_of_a_score():
    """Of firing: against one sample after another by the formula; of weights: Σ n / σ²."""
    model = net(0.5)
    record, weights = scores(model, 0), dict(model[0].named_parameters())
    lengths = []
    for row in range(8):
        score = (record.spikes - torch.sigmoid(record.x))[:, row].detach()
        found = torch.autograd.grad((record.x[:, row] * score).sum(), list(weights.values()), retain_graph=True)
        lengths.append(sum(float(g.square().sum()) for g in found))
    assert of_firing(record, weights) == pytest.approx(sum(lengths) / 8, rel=1e-9)
    weight, bias = model[0][0].weight.detach(), model[0][0].bias.detach()
    by_hand = 6 / (0.01 * float(weight.square().mean())) + 2 / (0.01 * float(bias.square().mean()))
    assert of_weights(WeightNoise(), weights) == pytest.approx(by_hand, rel=1e-9)


def gradient_variance(noise: dict, size: float) -> float:
    """trace(cov) of the convolution's gradient, of a loss that has nothing to do with the noise: of scores alone."""
    model = net(size)
    generator = torch.Generator().manual_seed(1)

    def noise_alone(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.randn(len(targets), generator=generator, dtype=outputs.dtype)

    rest = {name: None for name, _ in model.named_parameters() if name.startswith("3")}
    estimator = ULR(credit="global", copies=2, antithetic=False, firing=Logistic(scale=SCALE), noise=noise | rest)
    rows = []
    with attach(model, estimator, noise_alone, seed=3) as ulr:
        for _ in range(200):
            model.zero_grad()
            ulr.backward(*data())
            rows.append(torch.cat([q.grad.flatten() for q in model[0].parameters()]))
    return float(torch.stack(rows).var(0).sum())


@pytest.mark.slow
@pytest.mark.parametrize("size", [0.1, 0.5])
def test_variances_go_by_it(size: float):
    """At equal losses the ratio of the gradients' variances is that of the scores'."""
    weights, expected = dict(net(size)[0].named_parameters()), []
    for step in range(8):
        model = net(size)
        expected.append(of_firing(scores(model, step), dict(model[0].named_parameters())))
    ratio = of_weights(BY_SAMPLE, weights) / (sum(expected) / len(expected))
    measured = gradient_variance({"0": BY_SAMPLE}, size) / gradient_variance({"0": None}, size)
    assert measured == pytest.approx(ratio, rel=0.35)


@pytest.mark.parametrize("size", [0.02, 0.5])
def test_auto_chooses_by_it(size: float):
    model = net(size)
    estimator = ULR(firing=Logistic(scale=SCALE))
    record = scores(model, 0)
    own = dict(model[0].named_parameters())
    by_weights = of_weights(BY_SAMPLE, own) < of_firing(record, own)
    assert by_weights == (size == 0.5)
    with attach(model, estimator, rule, seed=0) as ulr:
        with pytest.warns(UserWarning, match="the loss rule gives the outputs no gradient"):
            ulr.backward(*data())
        assert ulr.structure.credit.name == "global"
        assert set(ulr.structure.weights) == ({"0.0.weight", "0.0.bias"} if by_weights else set())
        state = ulr.state_dict()
    said = {name: source for name, _, source in plan(net(size), data(), estimator, rule).rows}
    assert said["0.0.weight"].startswith("weight noise" if by_weights else "credit at site 1")
    for fixed in (
        ULR(credit="global", firing=estimator.firing),
        ULR(firing=estimator.firing, noise={"0": None, "outputs": None}),
    ):
        with attach(net(size), fixed, rule, seed=0) as ulr:
            ulr.backward(*data())
            assert not ulr.structure.weights
    resumed = net(0.5 if size == 0.02 else 0.02)  # whose own choice would be the other one
    with attach(resumed, estimator, rule, seed=0) as ulr:
        ulr.load_state_dict(state)
        with pytest.warns(UserWarning, match="the loss rule gives the outputs no gradient"):
            ulr.backward(*data())
        assert set(ulr.structure.weights) == ({"0.0.weight", "0.0.bias"} if by_weights else set())


def test_weights_that_no_module_of_its_own_applies_have_no_noise_by_sample():
    model = nn.Sequential(nn.Flatten(2), nn.Linear(12, 3), RecurrentLIF(3), nn.Linear(3, 3), nn.Linear(3, 3)).double()
    model[4].weight = model[3].weight
    named = dict(model.named_parameters())
    assert by_sample(model, {"1.weight": named["1.weight"]})
    for name in ("2.recurrent.weight", "3.weight"):
        assert not by_sample(model, {name: named[name]})
        with pytest.raises(UsageError, match="of which no other module"):
            attach(model, ULR(noise={name: BY_SAMPLE}), rule).backward(*data())


def test_another_loss_after_the_end_is_chosen_for_anew():
    """Noise on weights that a loss without a gradient has asked for is not that of a loss that has one."""
    with attach(net(0.5), ULR(firing=Logistic(scale=SCALE)), rule, seed=0) as ulr:
        with pytest.warns(UserWarning, match="the loss rule gives the outputs no gradient"):
            ulr.backward(*data())
        assert ulr.structure.weights
    ulr.backward(*data(), loss="ce_count")
    assert not ulr.structure.weights
    ulr.backward(*data(), loss=rule)
    assert ulr.structure.weights
