"""Objectives without a gradient, costs of activity, and mixes: what they are, and that their gradients are right."""

import warnings

import numpy
import pytest
import torch
from torch import Tensor, nn

import ulr_snn
from tests.helpers import averaging, currents
from tests.statistics import compare_means, gradient_draws
from ulr_snn import LIF, ULR, Fold, Logistic, OutputNoise, SpikeBudget, TimeAverage, UsageError, attach, evaluate, plan
from ulr_snn.estimators.step_sizes import StepSizes
from ulr_snn.losses.named import resolve
from ulr_snn.model.activity import counting
from ulr_snn.peers import METHODS
from ulr_snn.sites.binding import spiking_layers

STEPS, BATCH, PIXELS, CLASSES = 6, 4, 5, 3


def data(batch: int = BATCH) -> tuple[Tensor, Tensor]:
    return currents(STEPS, batch, PIXELS, CLASSES)


def net() -> nn.Sequential:
    return averaging(PIXELS, CLASSES)


def spiking() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(PIXELS, 7), LIF(), nn.Linear(7, CLASSES), LIF())


# -- values ------------------------------------------------------------------------------------------------


def test_zero_one_counts_mistakes():
    outputs = torch.tensor([[[1.0, 0, 0], [0, 2, 0]], [[0, 0, 3], [0, 0, 1.0]]])  # totals: [1, 0, 3], [0, 2, 1]
    assert resolve("zero_one")(outputs, torch.tensor([2, 1]), None).tolist() == [0, 0]
    assert resolve("zero_one")(outputs, torch.tensor([0, 2]), None).tolist() == [1, 1]
    mask = torch.ones(2, 2, 1)
    mask[1, 0] = 0  # the first sample has one step
    assert resolve("zero_one")(outputs, torch.tensor([0, 1]), mask).tolist() == [0, 0]


def test_latency_is_the_time_of_the_first_spike_if_it_is_right():
    outputs = torch.zeros(4, 5, 3)
    outputs[2, 0, 1] = outputs[3, 0, 0] = 1  # right at t = 2; what comes later does not matter
    outputs[1, 1, 2] = outputs[2, 1, 1] = 1  # another output was first
    outputs[0, 2, :2] = 1  # two at once
    outputs[0, 4, 1] = 1  # right at once
    found = resolve("latency")(outputs, torch.ones(5, dtype=torch.long), None)
    assert found.tolist() == [0.5, 1, 1, 1, 0]
    mask = torch.ones(4, 5, 1)
    mask[2:, 0] = 0  # the spike of the first sample is padding
    mask[2:, 4] = 0
    assert resolve("latency")(outputs, torch.ones(5, dtype=torch.long), mask).tolist() == [1, 1, 1, 1, 0]
    with pytest.raises(UsageError, match="without a time axis"):
        resolve("latency")(outputs[0], torch.ones(5, dtype=torch.long), None)


def test_a_function_that_knows_nothing_of_torch():
    def numbers(outputs: Tensor, targets: Tensor) -> list[float]:
        return [float(max(o) != o[t]) for o, t in zip(outputs.sum(0).tolist(), targets.tolist(), strict=True)]

    outputs = torch.randn(STEPS, BATCH, CLASSES)
    torch.testing.assert_close(
        resolve(numbers)(outputs, data()[1], None), resolve("zero_one")(outputs, data()[1], None)
    )


def test_a_function_of_numpy_arrays():
    def mistakes(outputs: Tensor, targets: Tensor) -> numpy.ndarray:
        return (numpy.asarray(outputs).argmax(-1) != numpy.asarray(targets)).astype(float)

    model = net()
    with attach(model, loss=mistakes) as ulr:
        ulr.backward(*data())
        ulr.backward(*data())
    assert all(q.grad is not None for q in model.parameters())


def detached(outputs: Tensor, targets: Tensor) -> Tensor:
    """A cross-entropy that has lost its graph."""
    return torch.tensor(nn.functional.cross_entropy(outputs.sum(0), targets, reduction="none").tolist())


def usual(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.sum(0), targets, reduction="none")


@pytest.mark.parametrize("loss", [detached, {"ce_count": 1.0, detached: 1.0}], ids=["alone", "in a mix"])
def test_a_loss_that_lost_its_gradient_is_told_once(loss):
    says = "the loss detached gives the outputs no gradient, so every step takes 8 forward passes; "
    with attach(spiking(), loss=loss) as ulr:
        with pytest.warns(UserWarning, match=says) as told:
            assert [ulr.backward(*data()).stats["copies"] for _ in range(3)] == [8, 8, 8]
        assert len(told) == 1 and told[0].filename == __file__
    with pytest.warns(UserWarning, match=says) as told:
        ulr_snn.train(spiking(), [data()] * 3, 2, loss=loss, device="cpu", progress=False)
    assert len(told) == 1
    assert sum(note.startswith(says) for note in plan(spiking(), data(), loss=loss).notes) == 1


@pytest.mark.parametrize(
    "loss, estimator",
    [
        (detached, ULR(credit="global")),
        (detached, ULR(noise={"outputs": OutputNoise()})),
        ("zero_one", None),
        ("latency", None),
        ({"ce_count": 1.0, "zero_one": 0.5}, None),
        (usual, None),
    ],
)
def test_nobody_is_told_who_knows(loss, estimator):
    with attach(spiking(), estimator, loss) as ulr, warnings.catch_warnings():
        warnings.simplefilter("error")
        ulr.backward(*data())
    assert not any("no gradient" in note for note in plan(spiking(), data(), estimator, loss).notes)


@pytest.mark.parametrize("loss", ["zero_one", "latency"])
def test_peers_say_what_they_need(loss):
    for name in ("surrogate", "expected", "alignment"):
        with pytest.raises(UsageError, match="the loss has no gradient in the outputs"):
            METHODS[name]().attach(spiking(), loss, 0, True).backward(*data())
    with pytest.raises(UsageError, match="no costs of activity"):
        METHODS["alignment"]().attach(spiking(), {"ce_count": 1.0, SpikeBudget(1): 1.0}, 0, True).backward(*data())
    found = ulr_snn.diagnose(spiking(), data(), loss=loss, draws=4, reference_draws=4, warm_up=1)
    assert {row["estimator"] for row in found.rows} <= {"feedback", "global", "residual"}


def test_the_weight_of_a_loss_does_not_change_step_sizes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(PIXELS, 7), LIF(), nn.Linear(7, CLASSES))
    factors = []
    for loss in ("ce_count", {"ce_count": 0.01}, "zero_one"):
        with attach(model, loss=loss, seed=0) as ulr:
            ulr.learner.step_sizes = StepSizes()
            ulr.backward(*data())
            factors.append(ulr.learning_rates()["2.weight"])
    assert factors == pytest.approx([factors[0]] * 3, rel=0.2)


def test_a_mix_is_the_weighted_sum():
    outputs, (_, y) = torch.randn(STEPS, BATCH, CLASSES), data()
    spikes = torch.tensor([0.0, 10, 20, 40])
    mix = resolve({"ce_count": 2.0, "zero_one": 0.5, SpikeBudget(10): 0.1})
    expected = 2 * resolve("ce_count")(outputs, y) + 0.5 * resolve("zero_one")(outputs, y)
    expected += 0.1 * torch.tensor([0.0, 0, 1, 3])
    torch.testing.assert_close(mix(outputs, y, None, {"spikes": spikes}), expected)


@pytest.mark.parametrize(
    "loss, message",
    [
        ({SpikeBudget(10): 1.0}, "nothing that depends on the outputs"),
        ({"ce_count": "much"}, "weight 'much'"),
        ({"nonsense": 1.0}, "loss='nonsense' is not known"),
    ],
)
def test_wrong_mixes(loss, message):
    with pytest.raises(UsageError, match=message):
        resolve(loss)


def test_wrong_noise_and_budgets():
    with pytest.raises(UsageError, match="limit=0"):
        SpikeBudget(0)
    with pytest.raises(UsageError, match="draws=3"):
        OutputNoise(draws=3)
    with pytest.raises(UsageError, match="goes by the name 'outputs'"):
        ULR(noise={"0": OutputNoise()})
    with pytest.raises(UsageError, match=r"noise=\{'outputs'"):
        attach(net(), ULR(credit="feedback"), "zero_one").backward(*data())


# -- activity ----------------------------------------------------------------------------------------------


def test_spikes_and_operations_are_counted():
    torch.manual_seed(0)
    model = nn.Sequential(
        Fold(nn.Conv2d(1, 2, 3, padding=1)), LIF(), nn.Flatten(2), nn.Linear(2 * 16, 3), ulr_snn.RecurrentLIF(3)
    )
    x = (torch.rand(STEPS, BATCH, 1, 4, 4) < 0.3).float()
    layers = spiking_layers(model)
    with torch.no_grad(), counting(model, layers, {"spikes", "operations"}, STEPS, BATCH) as counted:
        model(x)
        hidden = model[:2](x)
    counted.clear()
    with torch.no_grad(), counting(model, layers, {"spikes", "operations"}, STEPS, BATCH) as counted:
        last = model(x)
    torch.testing.assert_close(counted["spikes"], hidden.sum((0, 2, 3, 4)) + last.sum((0, 2)))
    reach = torch.tensor([2.0, 3, 3, 2])  # positions that a pixel of a row of four reaches with a kernel of three
    events = (x * torch.outer(reach, reach) * 2).sum((0, 2, 3, 4))
    expected = events + 3 * hidden.sum((0, 2, 3, 4)) + 3 * last.sum((0, 2))
    torch.testing.assert_close(counted["operations"], expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class ByHand(nn.Module):
    """A time loop over modules that take one time step a call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fire, self.last = nn.Linear(5, 5), nn.Identity(), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.last(self.fire(self.first(step))) for step in x])


@pytest.mark.parametrize("steps", [4, 5, 6])
def test_operations_go_to_their_own_samples_whatever_the_sizes(steps):
    """Five samples of five features: one step's shape could be taken for a sequence of five steps."""
    torch.manual_seed(0)
    model, x = ByHand(), torch.rand(steps, 5, 5)
    x[:, 1:] = 0
    nn.init.zeros_(model.first.weight), nn.init.zeros_(model.first.bias)
    lengths = torch.tensor([2, 4, 4, 4, 4])
    with torch.no_grad(), counting(model, [], {"operations"}, steps, 5) as counted:
        model(x)
    torch.testing.assert_close(counted["operations"], 5 * x.sum((0, 2)))
    with torch.no_grad(), counting(model, [], {"operations"}, steps, 5, lengths) as counted:
        model(x)
    torch.testing.assert_close(counted["operations"], 5 * x[:2].sum((0, 2)) * (lengths == 2))


def test_what_an_operation_costs_reaches_weights_that_meet_no_spike():
    """Two linear modules in series: the second one's input depends on the first without a spike between them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), LIF(), nn.Linear(2, 2)).double()
    x, y = torch.rand(2, 4, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    loss = {(lambda outputs, targets: 0.0 * outputs.sum((0, 2))): 1.0, SpikeBudget(1e-6, operations=True): 1e-6}
    noise = dict.fromkeys(("3",))
    with attach(model, ULR(credit="global", copies=2, firing=Logistic(scale=0.5), noise=noise), loss, seed=0) as ulr:
        ulr.backward(x, y)
    direct = 2 * model[0](x).sum((0, 2)).mean()  # two outputs for every entry
    exact = torch.autograd.grad(direct, model[0].bias)[0]
    torch.testing.assert_close(model[0].bias.grad, exact, rtol=0.5, atol=0)


def test_a_budget_with_nothing_to_count_is_an_error():
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.fire = nn.Parameter(torch.rand(PIXELS, CLASSES)), LIF()

        def forward(self, x: Tensor) -> Tensor:
            return self.fire(x @ self.weight)

    with pytest.raises(UsageError, match="has nothing to count"):
        attach(Product(), loss={"ce_count": 1.0, SpikeBudget(1, operations=True): 1.0}).backward(*data())


def test_evaluate_tells_activity():
    model, batch = net(), data()
    found = evaluate(model, [batch], device="cpu", activity=True)
    with torch.no_grad():
        spikes = model[:2](batch[0]).sum() + model[:4](batch[0]).sum()
    assert found["spikes"] == pytest.approx(float(spikes) / BATCH)
    assert "spikes" not in evaluate(model, [batch], device="cpu")
    cost = {"ce_count": 1.0, SpikeBudget(1): 1.0}
    plain = evaluate(model, [batch], device="cpu")["loss"]
    each = model[:2](batch[0]).sum((0, 2)) + model[:4](batch[0]).sum((0, 2))
    assert evaluate(model, [batch], device="cpu", loss=cost)["loss"] == pytest.approx(
        plain + float((each - 1).clamp(min=0).mean())
    )


# -- gradients ---------------------------------------------------------------------------------------------


def tiny(credit: str, noise: OutputNoise | None = None, readout: bool = False):
    """A net of two neurons over two steps, one sample, and an estimator."""
    torch.manual_seed(0)
    layers = [nn.Linear(2, 2), LIF()] + ([TimeAverage(), nn.Linear(2, 2)] if readout else [])
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        model[0].weight *= 1.5
    x, y = torch.rand(2, 1, 2, dtype=torch.float64), torch.tensor([1])
    estimator = ULR(
        credit=credit, copies=8, firing=Logistic(scale=0.4), noise={} if noise is None else {"outputs": noise}
    )
    return model, x, y, estimator


def pattern_probability(model: nn.Module, x: Tensor, pattern: Tensor) -> Tensor:
    """P(spike pattern [2, 1, 2]) of the first layer, logistic noise of scale 0.4, differentiable in its weights."""
    current = model[0](x)
    u, p = torch.zeros_like(current[0]), 1.0
    for t in range(2):
        u = model[1].beta * u + current[t] - (pattern[t - 1] if t else 0)
        fire = torch.sigmoid((u - 1) / 0.4)
        p = p * torch.where(pattern[t] > 0, fire, 1 - fire).prod()
    return p


def patterns() -> list[Tensor]:
    return [torch.tensor([(n >> k) & 1 for k in range(4)]).double().view(2, 1, 2) for n in range(16)]


@pytest.mark.slow
@pytest.mark.parametrize("credit", ["global", "residual"])
def test_a_mix_with_a_budget_is_unbiased(credit):
    loss = {"ce_count": 1.0, "zero_one": 0.7, SpikeBudget(1.5): 0.4}
    model, x, y, estimator = tiny(credit)
    objective = resolve(loss)
    expected = sum(
        pattern_probability(model, x, s) * objective(s, y, None, {"spikes": s.sum((0, 2))}).item() for s in patterns()
    )
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(expected, list(model[0].parameters()))])
    rows = 4096
    batch = x.repeat(1, rows, 1), y.repeat(rows)
    with attach(model, estimator, loss, seed=3) as ulr:
        draws = gradient_draws(ulr, batch, list(model[0].parameters()), 30)
    found = compare_means("unbiased", draws, exact)
    assert found.agrees and found.error <= 0.01 * exact.norm(), found
    assert not compare_means("unbiased", 1.05 * draws, exact, spending=False).agrees


@pytest.mark.slow
@pytest.mark.parametrize("credit", ["global", "residual"])
def test_noise_on_the_outputs_is_unbiased_for_the_smoothed_loss(credit):
    model, x, y, estimator = tiny(credit, OutputNoise(scale=0.5, draws=8), readout=True)

    def smoothed(s: Tensor) -> Tensor:  # P(the wrong class wins) of two: exact for Gaussian noise
        logits = model[3](s.mean(0))[0]
        return torch.special.ndtr((logits[0] - logits[1]) / (0.5 * 2**0.5))

    expected = sum(pattern_probability(model, x, s) * smoothed(s) for s in patterns())
    parameters = list(model.parameters())
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(expected, parameters)])
    rows = 4096
    batch = x.repeat(1, rows, 1), y.repeat(rows)
    with attach(model, estimator, "zero_one", seed=4) as ulr:
        draws = gradient_draws(ulr, batch, parameters, 30)
    found = compare_means("unbiased", draws, exact)
    assert found.agrees and found.error <= 0.01 * exact.norm(), found
    assert not compare_means("unbiased", 1.05 * draws, exact, spending=False).agrees


def test_the_gradient_of_a_budget_is_exact_where_spikes_cost_and_do_nothing_else():
    """One layer without reset, one time step: credit times slope is p' / limit above the limit."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), LIF(reset="none")).double()
    x, y = torch.rand(1, 8, 3, dtype=torch.float64), torch.zeros(8, dtype=torch.long)

    def constant(outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.0 * outputs.sum((0, 2))

    loss = {constant: 1.0, SpikeBudget(1e-6): 1e-6}
    told = pytest.warns(UserWarning, match="the loss constant gives the outputs no gradient")
    with attach(model, ULR(firing=Logistic(scale=0.5)), loss, seed=0) as ulr, told:
        spikes = ulr.backward(x, y).outputs[:, 0]  # [copies, B, 4]
    fire = torch.sigmoid((model[0](x)[0].detach() - 1) / 0.5)
    above = (spikes.sum(-1, keepdim=True) > 0).double()
    assert 0 < above.mean() < 1
    expected = (above * fire * (1 - fire) / 0.5).mean((0, 1))
    torch.testing.assert_close(model[0].bias.grad, expected)


@pytest.mark.slow
@pytest.mark.parametrize("make", [net, spiking])
def test_losses_without_a_gradient_lower(make):
    """The 0-1 loss alone, by noise on the outputs; and mixed with a cross-entropy."""
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(STEPS, 96, PIXELS, generator=generator)
    y = x.mean(0)[:, :CLASSES].argmax(1)
    for loss in ("zero_one", {"ce_count": 0.5, "zero_one": 1.0}):
        model = make()
        before = evaluate(model, [(x, y)], device="cpu", loss=loss)
        ulr_snn.train(model, [(x, y)] * 30, 4, loss=loss, device="cpu", progress=False)
        after = evaluate(model, [(x, y)], device="cpu", loss=loss)
        assert after["loss"] < before["loss"] - 0.15, (loss, before, after)


def test_a_budget_halves_the_spikes():
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(STEPS, 96, PIXELS, generator=generator)
    y = x.mean(0)[:, :CLASSES].argmax(1)
    spikes = []
    for loss in ("ce_count", {"ce_count": 1.0, SpikeBudget(3): 1.0}):
        model = net()
        ulr_snn.train(model, [(x, y)] * 30, 4, loss=loss, device="cpu", progress=False)
        spikes.append(evaluate(model, [(x, y)], device="cpu", activity=True)["spikes"])
    assert spikes[1] < 0.5 * spikes[0], spikes


# -- several samples at inference --------------------------------------------------------------------------


def test_samples_average_probabilities():
    model, (x, y) = net(), data(64)
    found = evaluate(model, [(x, y)], device="cpu", samples=5, estimator=ULR(firing=Logistic(scale=0.5)))
    runs = [
        evaluate(model, [(x, y)], mode="stochastic", device="cpu", estimator=ULR(firing=Logistic(scale=0.5)), seed=s)
        for s in range(3)
    ]
    assert found["bound"] < found["loss"]
    assert 0 < found["disagreement"] < 1 and 0 <= found["calibration_error"] <= 1
    assert min(r["loss"] for r in runs) - 0.1 < found["loss"] < max(r["loss"] for r in runs) + 0.1
    one = evaluate(model, [(x, y)], device="cpu", samples=1, estimator=ULR(firing=Logistic(scale=0.5)))
    assert one["bound"] == pytest.approx(one["loss"], rel=1e-5) and one["disagreement"] == 0
    with pytest.raises(UsageError, match="samples=0"):
        evaluate(model, [(x, y)], device="cpu", samples=0)


def test_calibration_error_of_known_predictions():
    from ulr_snn.losses.metrics import calibration_error

    confidence = torch.tensor([0.95, 0.95, 0.55, 0.55])
    right = torch.tensor([1.0, 1, 1, 0])
    assert calibration_error(confidence, right) == pytest.approx((2 * 0.05 + 2 * 0.05) / 4)


def test_plan_of_mixes():
    mixed = plan(spiking(), data(), loss={"ce_count": 1.0, "latency": 1.0})
    assert (mixed.credit, mixed.copies) == ("feedback", 1)
    assert any("effect of every output spike" in note for note in mixed.notes)

    def counted(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.detach().sum(0).argmax(1) != targets).to(outputs)

    mixed = plan(spiking(), data(), loss={"ce_count": 1.0, counted: 1.0})
    assert (mixed.credit, mixed.copies) == ("feedback", 8)
    assert any("score of every spike" in note for note in mixed.notes)
