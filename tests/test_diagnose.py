"""diagnose: its figures against gradients that are known, and what it leaves alone."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from tests.helpers import averaging, currents, png_size
from ulr_snn import ULR, Diagnosis, Logistic, Online, UsageError, diagnose
from ulr_snn.diagnose import Moments
from ulr_snn.estimators.base import Estimate
from ulr_snn.losses.named import resolve
from ulr_snn.model.batch import Batch

STEPS, BATCH, PIXELS, CLASSES = 6, 32, 5, 3
FIRING = Logistic(scale=0.4)


def data() -> tuple[Tensor, Tensor]:
    return currents(STEPS, BATCH, PIXELS, CLASSES)


def net() -> nn.Sequential:
    return averaging(PIXELS, CLASSES)


class Known:
    """An estimator of a known mean and covariance: a direction times `factor`, plus independent noise."""

    def __init__(self, factor: float, noise: float) -> None:
        self.factor, self.noise = factor, noise

    def attach(self, model, loss, seed, time_first, total_steps=None, *, progress=None, rates=False):
        return _Attached(model, self, torch.Generator().manual_seed(seed))


class _Attached:
    forward_passes = 0

    def __init__(self, model, known, generator) -> None:
        self.model, self.known, self.generator = model, known, generator

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass

    def backward(self, x, targets, loss=None, lengths=None):
        self.forward_passes += 3 * len(targets)
        for i, q in enumerate(self.model.parameters()):
            drawn = torch.randn(q.shape, generator=self.generator)
            q.grad = self.known.factor * torch.full_like(q, 1.0 + i) + self.known.noise * drawn
        batch = Batch.of(self.model, x, targets, lengths, resolve("ce_count"))
        return Estimate(torch.zeros(len(targets)), torch.zeros(1), {}, batch)


def test_figures_of_known_estimators():
    estimators = {"right": Known(2.0, 0.0), "wrong": Known(-1.0, 0.0), "noisy": Known(1.0, 3.0)}
    model = net()
    found = diagnose(model, data(), estimators, reference=Known(1.0, 0.5), draws=400, reference_draws=400)
    for layer in ("all layers", "0", "2", "5"):
        assert found.row("right", layer)["cosine"] == pytest.approx(1, abs=0.02)
        assert found.row("wrong", layer)["cosine"] == pytest.approx(-1, abs=0.02)
        assert found.row("right", layer)["variance"] == pytest.approx(0, abs=1e-9)
    size = sum(q.numel() for q in model.parameters())
    power = sum((1 + i) ** 2 * q.numel() for i, q in enumerate(model.parameters()))
    noisy = found.row("noisy")
    assert noisy["cosine"] == pytest.approx(1, abs=0.05)
    assert noisy["variance"] == pytest.approx(9 * size / power, rel=0.05)
    assert noisy["step_cosine"] == pytest.approx(1 / math.sqrt(1 + 9 * size / power), rel=0.05)
    assert noisy["passes"] == 3
    assert found.advice.startswith("right points best")


@pytest.mark.slow
def test_unbiased_estimators_agree_and_the_model_stays_as_it_is():
    model = net()
    before, batch = copy.deepcopy(model.state_dict()), data()
    big = batch[0].repeat(1, 8, 1), batch[1].repeat(8)
    estimators = {
        "residual": ULR(credit="residual", firing=FIRING),
        "global": ULR(credit="global", firing=FIRING),
        "feedback": ULR(firing=FIRING),
    }
    reference = ULR(credit="residual", copies=8, firing=FIRING)
    found = diagnose(model, big, estimators, reference=reference, draws=64, reference_draws=128)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(q.grad is None for q in model.parameters()) and model.training
    assert found.row("residual")["cosine"] == pytest.approx(1, abs=0.03)
    assert found.row("global")["cosine"] == pytest.approx(1, abs=0.05)
    assert found.row("residual")["variance"] < found.row("global")["variance"]
    assert found.row("feedback")["variance"] < found.row("residual")["variance"]
    assert 0.9 < found.row("feedback")["cosine"] < 1.02
    assert [found.row(name)["passes"] for name in estimators] == [4, 8, 1]


def test_the_default_knows_surrogates_and_draws(tmp_path):
    found = diagnose(net(), data(), draws=4, reference_draws=4, warm_up=2)
    assert [row["estimator"] for row in found.rows[::4]] == ["feedback", "residual", "global", "surrogate"]
    assert found.row("surrogate")["variance"] is None or found.row("surrogate")["variance"] < 1e-9
    lines = str(found).splitlines()
    assert lines[0].startswith("| estimator | layer | cosine") and len(lines) == 2 + 16 + 2
    found.plot(tmp_path / "diagnosis.png")
    assert min(png_size(tmp_path / "diagnosis.png")) > 300


def test_noise_alone_is_reported():
    found = diagnose(net(), data(), {"noise": Known(0.0, 1.0)}, reference=Known(0.0, 1.0), draws=8, reference_draws=8)
    assert found.advice.startswith("The reference is mostly noise")
    unresolved = {"estimator": "a", "layer": "0", "cosine": None, "variance": None, "step_cosine": None, "passes": 1.0}
    assert "unresolved" in str(Diagnosis([unresolved], ""))


def test_online_learning_is_of_the_net_that_it_is_given():
    model, batch = averaging(6, 4, (7,)), currents(5, 4, 6, 4)
    with pytest.raises(UsageError, match="estimators of different nets"):
        diagnose(model, batch, {"online": Online(firing=Logistic(3.0)), "ulr": ULR()}, loss="ce_rate")


def test_halves_leave_no_bias():
    moments = Moments()
    for g in ([1.0, 0.0], [3.0, 2.0], [2.0, 1.0], [0.0, 5.0]):
        moments.add({"layer": torch.tensor(g, dtype=torch.float64)})
    assert moments.power("layer") == pytest.approx((1.5 * 1.5) + (0.5 * 3.5))
    expected = torch.tensor([[1.0, 0], [3, 2], [2, 1], [0, 5]]).double().var(0).sum()
    assert moments.variance("layer") == pytest.approx(float(expected))


def test_too_few_draws():
    with pytest.raises(UsageError, match="draws=2"):
        diagnose(net(), data(), draws=2)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("change", [prune.identity, nn.utils.weight_norm])
def test_states_in_a_graph_are_copied(change):
    class Keeping(nn.Sequential):
        def forward(self, x):
            self.last = [super().forward(x)]
            return self.last[0]

    model = Keeping(*net())
    change(model[0], "weight")
    model(data()[0])  # torch copies neither this output nor the weight
    found = diagnose(model, data(), {"feedback": ULR()}, draws=4, reference_draws=4, warm_up=0)
    assert found.row("feedback", "0")["passes"] == 1 and model.last[0].grad_fn is not None
