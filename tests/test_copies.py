"""Any allowed number of copies steps and learns, with every credit, paired or not; and their number by the variance."""

import pytest
import torch
from torch import Tensor, nn

import ulr_snn
import ulr_snn.credit.structure
from tests.helpers import averaging
from ulr_snn import (
    LIF,
    ULR,
    Adaptive,
    AdaptiveCopies,
    Global,
    Independent,
    Logistic,
    TimeAverage,
    UsageError,
    WeightNoise,
    attach,
)
from ulr_snn.credit.feedback import FeedbackLimits
from ulr_snn.credit.kinds import Feedback, Residual
from ulr_snn.estimators.step_sizes import StepSizes
from ulr_snn.model.forward import Forward
from ulr_snn.sampling.adaptive import CopyBudget


@pytest.mark.parametrize(
    ("credit", "copies", "antithetic"),
    [
        ("feedback", 1, False),
        ("feedback", 3, False),
        ("feedback", 4, True),
        ("global", 1, True),
        ("global", 3, False),
        ("residual", 3, False),
        ("residual", 4, True),
        ("residual", 5, False),
    ],
)
def test_every_number_of_copies(credit: str, copies: int, antithetic: bool, device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), ulr_snn.RecurrentLIF(8), nn.Linear(8, 6), ulr_snn.LIF(), nn.Linear(6, 3))
    model.to(device)
    x = (torch.rand(7, 10, 5, device=device) < 0.5).float()
    y = torch.randint(0, 3, (10,), device=device)
    options = {"maps": "learned", "antithetic": antithetic, "firing": ulr_snn.Logistic(0.3)}
    limits = FeedbackLimits(entries=50)  # the first layer is too wide for its recurrent current
    kinds = {"global": Global(), "feedback": Feedback(limits=limits), "residual": Residual(limits=limits)}
    estimator = ulr_snn.ULR(credit=kinds[credit], copies=copies, **options)
    with ulr_snn.attach(model, estimator) as ulr:
        for _ in range(3):
            estimate = ulr.backward(x, y)
            assert estimate.outputs.shape == (estimate.stats["copies"], 7, 10, 3)
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in model.parameters())
    learned = ulr.state_dict()["feedback"]
    assert bool(learned["outputs"]) == bool(learned["layers"]) == (credit != "global")


def halves_of(groups: int, generator: torch.Generator, mean: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What two halves give of a loss that is linear in a group's normal draw S, L = mean · S, whose score is S: with
    the baselines of the estimator, from the other groups."""
    scores = torch.randn(groups, len(mean), generator=generator, dtype=torch.float64)
    losses = scores @ mean
    signals = losses - (losses.sum() - losses) / (groups - 1)
    terms = signals[:, None] * scores / groups
    return [(terms[0::2].sum(0), terms[1::2].sum(0))]


@pytest.mark.slow
@pytest.mark.parametrize("groups", [2, 4, 8])
def test_variance_and_power_are_those_of_the_estimator(groups: int):
    """Of L = w · S the mean is w; trace(cov) from many draws."""
    generator, mean = torch.Generator().manual_seed(groups), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    budget = Adaptive(least=2, antithetic=False).counter()
    budget.window = 10**9
    gradients = []
    for _ in range(40000):
        halves = halves_of(groups, generator, mean)
        budget.see(None, halves, groups)
        gradients.append(halves[0][0] + halves[0][1])
    drawn = torch.stack(gradients)
    power = float(mean.square().sum())
    covariance = groups * float(drawn.var(0).sum())
    assert budget.powers[None] == pytest.approx(power, rel=0.05)
    assert budget.variances[None] == pytest.approx(covariance, rel=0.05)


def test_copies_bring_the_variance_down_to_what_is_asked():
    budget = Adaptive(variance=0.5, least=4, most=64).counter()
    budget.window = 10**9
    assert budget.copies() == 4
    for variance, power, copies in ((1.0, 1.0, 4), (4.0, 1.0, 16), (7.9, 1.0, 32), (100.0, 1.0, 64), (1.0, -0.1, 64)):
        budget.variances, budget.powers, budget.measured = {None: variance}, {None: power}, {None: 1}
        assert budget.copies() == copies, (variance, power)
    assert budget.copies("another site") == 4


def data() -> tuple[Tensor, Tensor]:
    generator, y = torch.Generator().manual_seed(0), torch.arange(256) % 3
    return torch.rand(5, 256, 4, generator=generator).double() + torch.eye(4).double()[y], y


def net() -> nn.Sequential:
    return averaging(4, 3).double()


def adaptive(variance: float = 1.0, most: int = 32, **options) -> ULR:
    copies = AdaptiveCopies(variance=variance, most=most)
    return ULR(**{"credit": "global", "firing": Logistic(scale=0.4)} | options, copies=copies)


def copies_of(estimator: ULR, steps: int = 12) -> list[int]:
    with attach(net(), estimator, seed=0) as ulr:
        return [ulr.backward(*data()).stats["copies"] for _ in range(steps)]


@pytest.mark.parametrize(
    "options",
    [{}, {"credit": "residual"}, {"antithetic": False}, {"noise": {"5": WeightNoise()}}],
    ids=["global", "residual", "independent", "with weight noise"],
)
def test_more_variance_more_copies(options):
    strict, lenient = copies_of(adaptive(0.2, **options)), copies_of(adaptive(1e4, **options))
    assert set(lenient) == {4}
    assert strict[0] == 4 and max(strict) > 8
    assert all(k % (2 if options.get("antithetic") is False else 4) == 0 for k in strict)


def test_the_gradient_is_that_of_the_same_number_of_copies():
    """Measuring changes nothing else: a step of K copies is that of ULR(copies=K)."""
    model = net()
    with attach(model, adaptive(1e4), seed=0) as ulr:
        ulr.backward(*data())
    found = [q.grad for q in model.parameters()]
    model = net()
    with attach(model, ULR(credit="global", firing=Logistic(scale=0.4), copies=4), seed=0) as ulr:
        ulr.backward(*data())
    for a, q in zip(found, model.parameters(), strict=True):
        assert torch.equal(a, q.grad)


def test_halves_add_up_to_the_gradient(monkeypatch):
    """What is measured by: the two halves together are the gradient of the layers that fire."""
    seen = {}
    monkeypatch.setattr(CopyBudget, "see", lambda self, site, halves, copies: seen.update({site: halves}))
    model = net()
    with attach(model, adaptive(noise={"5.bias": WeightNoise()}), seed=0) as ulr:
        ulr.backward(*data())
    names = ["0.weight", "0.bias", "2.weight", "2.bias", "5.bias"]
    parameters = dict(model.named_parameters())
    assert len(seen[None]) == len(names)
    for name, (a, b) in zip(names, seen[None], strict=True):
        torch.testing.assert_close(a + b, parameters[name].grad)
        assert not torch.allclose(a, b)


def test_layerwise_each_layer_has_its_own():
    with attach(net(), adaptive(0.2, layerwise=True), seed=0) as ulr:
        for _ in range(12):
            if ulr.learner.step == 10:  # no step that measures
                ulr.learner.copies.variances["1"] *= 4
            passes = ulr.forward_passes
            copies = {site: ulr.learner.copies.copies(site) for site in ("1", "3")}
            ulr.backward(*data())
            if ulr.learner.step > 1:
                assert ulr.forward_passes - passes == (1 + sum(k - 1 for k in copies.values())) * 256
        assert set(ulr.learner.copies.measured) == {"1", "3"}
        assert copies["1"] > copies["3"] > 4


def test_resumes():
    with attach(net(), adaptive(0.3), seed=0) as ulr:
        for _ in range(5):
            ulr.backward(*data())
        state, copies = ulr.state_dict(), ulr.learner.copies.copies()
    with attach(net(), adaptive(0.3), seed=0) as ulr:
        assert ulr.learner.copies.copies() != copies
        ulr.load_state_dict(state)
        assert ulr.learner.copies.copies() == copies


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance": 0.0}, "variance=0.0"),
        ({"least": 1}, "2 <= least <= most"),
        ({"least": 8, "most": 4}, "2 <= least <= most"),
        ({"most": 8.0}, "whole numbers"),
        ({"least": 6}, "multiples of 4"),
    ],
)
def test_bounds(options, message):
    with pytest.raises(UsageError, match=message):
        ULR(credit="global", copies=AdaptiveCopies(**options))


@pytest.mark.parametrize("options", [{"credit": "feedback"}, {"credit": "auto"}])
def test_what_it_does_not_go_with(options):
    with pytest.raises(UsageError, match=r"Adaptive copies .* it takes"):
        ULR(copies=AdaptiveCopies(), **options)


MIX = {"ce_count": 1.0, "zero_one": 0.5, ulr_snn.SpikeBudget(3): 0.1}


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({"copies": 4}, "ce_count"),
        ({"copies": 3, "antithetic": False}, "zero_one"),
        ({"copies": 1}, "ce_count"),
        ({"copies": 4, "noise": {"5": WeightNoise()}}, "ce_count"),
        ({"copies": 4, "noise": {"2": WeightNoise(per_sample=True)}}, "ce_count"),
        ({"copies": 4, "antithetic": False, "quasi_monte_carlo": True}, "ce_count"),
        ({"sampling": Independent(4, multi_sample=True)}, "ce_count"),
        ({"credit": Global(reward_to_go=True), "copies": 4}, "ce_rate"),
        ({"copies": 4}, MIX),
    ],
)
def test_copies_in_turn_give_the_same_gradient(options, loss):
    """memory="replay": every copy twice, of which one is held at a time."""
    found = []
    for memory in ("auto", "replay"):
        model = net() if loss != "ce_rate" else nn.Sequential(*list(net())[:4], *list(net())[5:])
        with attach(
            model, ULR(**{"credit": "global", "memory": memory, **options}), loss, seed=0, total_steps=20
        ) as ulr:
            ulr.learner.step_sizes = StepSizes()
            for _ in range(3):
                model.zero_grad()
                estimate = ulr.backward(*data())
            found.append([q.grad for q in model.parameters()])
            found[-1] += [estimate.loss, estimate.outputs, ulr.learner.mean_loss]
            found[-1] += [torch.tensor(sorted(ulr.learning_rates().values()))]
            assert ulr.forward_passes >= (1 if memory == "auto" else 2) * 3 * options.get("copies", 4) * 256
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_copies_in_turn_see_one_dropout_mask():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7), nn.Dropout(0.5), LIF(), TimeAverage(), nn.Linear(7, 3)).double()
    found = []
    for memory in ("auto", "replay"):
        torch.manual_seed(5)
        model.zero_grad()
        with attach(model, ULR(credit="global", memory=memory), seed=0) as ulr:
            ulr.backward(*data())
        found.append([q.grad for q in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_copies_in_turn_are_planned():
    found = str(ulr_snn.plan(net(), data(), ULR(credit="global", memory="replay")))
    assert "memory: the whole sequence at once, of one copy after another, each run twice" in found


@pytest.mark.parametrize("options", [{"copies": AdaptiveCopies()}, {"layerwise": True}])
def test_copies_in_turn_are_refused(options):
    with pytest.raises(UsageError, match="memory='replay' with"):
        ULR(credit="global", memory="replay", **options)


def test_copies_in_turn_are_replayed_with_the_noise_that_they_were_judged_with(monkeypatch):
    """Also where a measurement lets the noise of a layer that began at rest follow its membranes."""
    seen, run = {}, Forward.run

    def recorded(self: Forward, *arguments):
        p = run(self, *arguments)
        seen.setdefault((self.step, *p.copies), []).append(torch.cat([r.x.detach().flatten() for r in p.records]))
        return p

    monkeypatch.setattr(Forward, "run", recorded)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 7), LIF(), nn.Linear(7, 3), LIF()).double()
    with torch.no_grad():
        model[0].weight.mul_(0.2)
    with attach(model, ULR(credit="global", copies=4, memory="replay"), seed=0, total_steps=100) as ulr:
        ulr.backward(*data())
        seen.clear()
        with torch.no_grad():
            model[0].weight.mul_(8)
        start = ulr.learner.level.starts["1"]
        ulr.backward(*data())
        assert ulr.learner.level.starts["1"] > start
    assert len(seen) == 4
    for counted, replayed in seen.values():
        assert torch.equal(counted, replayed)


def test_no_pairs_by_any_false_value():
    assert ULR(credit="global", copies=3, antithetic=0).sampling == Independent(3)
