"""Expected gradients, feedback alignment and evolution strategies: their formulas, and that they train."""

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import averaging, currents
from tests.statistics import compare_means, gradient_draws
from ulr_snn import (
    LIF,
    ULR,
    Logistic,
    RecurrentLIF,
    SpikeBudget,
    TimeAverage,
    UsageError,
    WeightNoise,
    compare,
    evaluate,
    train,
)
from ulr_snn.peers import METHODS, EvolutionStrategies, ExpectedGradientBPTT, FeedbackAlignment, SurrogateBPTT
from ulr_snn.peers.evolution import RankOneNoise

STEPS, BATCH, PIXELS, CLASSES = 5, 6, 4, 3


def data(batch: int = BATCH) -> tuple[Tensor, Tensor]:
    x, y = currents(STEPS, batch, PIXELS, CLASSES)
    return x.double(), y


def gradients(model: nn.Module, estimator, batch, loss="ce_count", seed: int = 0) -> list[Tensor]:
    model.zero_grad()
    with estimator.attach(model, loss, seed, True) as attached:
        attached.backward(*batch)
    return [q.grad.clone() for q in model.parameters()]


@pytest.mark.parametrize("make", [LIF, RecurrentLIF])
def test_expected_gradients_are_the_direct_credit_where_nothing_follows_a_spike(make):
    """One layer, no reset, no recurrent weights: ∂L/∂s p' on the same noise, so that both formulas are one."""
    torch.manual_seed(0)
    layer = LIF(reset="none") if make is LIF else RecurrentLIF(6, reset="none")
    model = nn.Sequential(nn.Linear(PIXELS, 6), layer, TimeAverage(), nn.Linear(6, CLASSES)).double()
    if make is RecurrentLIF:
        nn.init.zeros_(layer.recurrent.weight)
    firing = Logistic(scale=0.3)
    ours = gradients(model, ULR(credit="feedback", firing=firing), data())
    theirs = gradients(model, ExpectedGradientBPTT(firing), data())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    other = gradients(model, ExpectedGradientBPTT(Logistic(scale=0.31)), data())
    assert not torch.allclose(ours[0], other[0], rtol=1e-3)


def test_expected_gradients_go_through_time_and_layers():
    """Two steps, two neurons in series, by hand."""
    torch.manual_seed(0)
    first, second = nn.Linear(1, 1).double(), nn.Linear(1, 1).double()
    model = nn.Sequential(first, LIF(beta=0.75), second, LIF(beta=0.75))
    with torch.no_grad():
        first.weight.fill_(0.9), second.weight.fill_(0.7)
    x, y = torch.ones(2, 1, 1).double(), torch.zeros(1)
    summed = lambda outputs, targets: outputs.sum((0, 2))  # noqa: E731
    sigma = 0.5
    peer = ExpectedGradientBPTT(Logistic(scale=sigma))
    model.zero_grad()
    with peer.attach(model, summed, 0, True) as attached:
        out = attached.backward(x, y).outputs[0]
    grad = first.weight.grad.item()

    class Fire(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u, s):
            p = torch.sigmoid((u - 1) / sigma)
            ctx.save_for_backward(p)
            return s

        @staticmethod
        def backward(ctx, g):
            (p,) = ctx.saved_tensors
            return g * p * (1 - p) / sigma, None

    found = []
    for bits in range(4):  # the hidden spikes that were drawn: those that give the outputs that came
        hidden = [torch.tensor(float(bits >> k & 1)).double() for k in range(2)]
        weight = first.weight.detach().clone().requires_grad_()
        u = v = s = z = torch.zeros(()).double()
        total = 0.0
        for t in range(2):
            u = 0.75 * u + weight[0, 0] * x[t, 0, 0] + first.bias.detach()[0] - s
            s = Fire.apply(u, hidden[t])
            v = 0.75 * v + second.weight.detach()[0, 0] * s + second.bias.detach()[0] - z
            z = Fire.apply(v, out[t, 0, 0].double())
            total = total + z
        found.append(torch.autograd.grad(total, weight)[0].item())
    assert min(abs(f - grad) for f in found) < 1e-9 * abs(grad) + 1e-12


def test_feedback_alignment_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(PIXELS, 6), LIF(), nn.Linear(6, CLASSES)).double()
    x, y = data()
    x, peer = x[:1], FeedbackAlignment(SurrogateBPTT(slope=3.0))
    weight, bias, readout, readout_bias = gradients(model, peer, (x, y))
    u = model[0](x)[0].detach()
    spikes = (u > 1).double()
    probability = model[2](spikes).softmax(1).detach()
    e = (probability - nn.functional.one_hot(y, CLASSES)) / BATCH
    torch.testing.assert_close(readout, e.T @ spikes)
    torch.testing.assert_close(readout_bias, e.sum(0))
    slope = (3 / 2) / (1 + (torch.pi / 2 * 3 * (u - 1)) ** 2)
    inputs = torch.cat([x[0], torch.ones(BATCH, 1)], 1)
    for i in range(6):  # B is fixed and random: five equations for its three entries must agree
        products = inputs.T @ (slope[:, i : i + 1] * e)  # [PIXELS + 1, CLASSES]
        found = torch.cat([weight[i], bias[i : i + 1]])
        column = torch.linalg.pinv(products) @ found
        torch.testing.assert_close(products @ column, found)
        assert column.norm() > 0.01
    assert gradients(model, peer, (x, y), seed=1)[0].sub(weight).abs().max() > 1e-4
    again = gradients(model, peer, (x, y))
    assert torch.equal(again[0], weight)


@pytest.mark.slow
@pytest.mark.parametrize("kind, antithetic", [(WeightNoise, True), (RankOneNoise, True), (WeightNoise, False)])
def test_evolution_strategies_are_unbiased_on_a_quadratic(kind, antithetic):
    """Of a quadratic loss, the gradient of the mean over noise is that of the loss itself, for draws of either kind."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1).double()
    x, y = torch.rand(2, 4, 2).double(), torch.zeros(4)
    square = lambda outputs, targets: outputs.square().sum((0, 2))  # noqa: E731
    exact = torch.autograd.grad(square(model(x), y).mean(), list(model.parameters()))
    exact = torch.cat([g.flatten() for g in exact])
    peer = EvolutionStrategies(256, antithetic, kind(scale=0.3))
    with peer.attach(model, square, 5, True) as attached:
        draws = gradient_draws(attached, (x, y), list(model.parameters()), 140)
    found = compare_means("unbiased", draws, exact)
    assert found.agrees and found.error <= 0.02 * exact.norm(), found
    assert not compare_means("unbiased", 1.1 * draws, exact, spending=False).agrees


def test_draws_of_rank_one():
    from ulr_snn.sites.weights import WeightSites

    sites = WeightSites({"weight": RankOneNoise()}, 0, antithetic=True)
    zeta = sites.draw("weight", torch.zeros(5, 2, 3, 3), 0, 0)
    assert torch.linalg.matrix_rank(zeta.flatten(1)) == 1
    assert torch.equal(sites.draw("weight", torch.zeros(5, 2, 3, 3), 0, 1), -zeta)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method):
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(STEPS, 96, PIXELS, generator=generator)
    y = x.mean(0)[:, :CLASSES].argmax(1)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(PIXELS, 16), LIF(), TimeAverage(), nn.Linear(16, CLASSES))
    before = evaluate(model, [(x, y)], device="cpu")["loss"]
    slow = method in ("evolution", "evolution-rank1", "zeroth-order")
    options = {"epochs": 15 if method == "zeroth-order" else 2, "lr": 2e-2}
    train(model, [(x, y)] * 30, estimator=METHODS[method](), device="cpu", progress=False, **options)
    assert evaluate(model, [(x, y)], device="cpu")["loss"] < before - (0.02 if slow else 0.2)


def test_compare_takes_them_by_name():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(PIXELS, 6), LIF(), nn.Linear(6, CLASSES)).double()
    found = compare(model, [data()], [data()], methods=tuple(METHODS), epochs=1, device="cpu", progress=False)
    assert [row["method"] for row in found.rows] == list(METHODS)
    assert [row["forward_passes"] for row in found.rows] == [BATCH, BATCH, BATCH, 8 * BATCH, 8 * BATCH, BATCH]


def test_models_that_they_do_not_know():
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(UsageError, match="no spiking layer"):
        FeedbackAlignment().attach(nn.Linear(2, 2), "ce_count", 0, True)
    with pytest.raises(UsageError, match="copies=3"):
        EvolutionStrategies(copies=3)


def test_state_goes_on():
    for method in METHODS.values():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(PIXELS, 6), LIF(), nn.Linear(6, CLASSES)).double()
        with method().attach(model, "ce_count", 0, True) as attached:
            attached.backward(*data())
            state = attached.state_dict()
            model.zero_grad()
            attached.backward(*data())
        expected = model[0].weight.grad.clone()
        model.zero_grad()
        with method().attach(model, "ce_count", 0, True) as attached:
            attached.load_state_dict(state)
            attached.backward(*data())
        torch.testing.assert_close(model[0].weight.grad, expected)


def test_evolution_leaves_no_state_from_copy_to_copy():
    class Counter(nn.Module):
        """Fires at every other call of its life, unless somebody puts it back."""

        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, current: Tensor) -> Tensor:
            self.calls += 1
            return (current.detach() > 0).to(current.dtype) * (self.calls % 2)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(PIXELS, 6), Counter(), TimeAverage(), nn.Linear(6, CLASSES)).double()
    with EvolutionStrategies(copies=4).attach(model, "ce_count", 0, True) as attached:
        outputs = attached.backward(*data()).outputs
    assert all(out.std() > 0 for out in outputs)  # every copy saw the first call
    x, y = data()
    with EvolutionStrategies(copies=2).attach(model, "ce_count", 0, True) as attached:
        attached.backward(x, y)
        attached.backward(x[:, :2], y[:2])


def test_plain_networks_train_and_are_validated():
    torch.manual_seed(0)
    model = nn.Sequential(TimeAverage(), nn.Linear(PIXELS, CLASSES)).double()
    train(
        model, [data()], 1, estimator=ULR(noise={"1": WeightNoise()}), val_loader=[data()], device="cpu", progress=False
    )
    train(model, [data()], 1, estimator=ULR(flow={"1": "ulr"}), val_loader=[data()], device="cpu", progress=False)
    found = compare(model, [data()], [data()], methods=("evolution",), epochs=1, device="cpu", progress=False)
    assert found.rows[0]["accuracy"] is not None


def test_a_replaced_layer_is_counted_by_evolution_strategies():
    loss = {"ce_count": 1.0, SpikeBudget(1.0): 1.0}
    model, x, y = averaging(6, 4, (7,)), (torch.rand(5, 3, 6) < 0.5).float(), torch.tensor([0, 1, 3])
    attached = EvolutionStrategies().attach(model, loss, 0, True)
    attached.backward(x, y)
    model[1], attached.step = LIF(0.5), 0
    fresh = EvolutionStrategies().attach(model, loss, 0, True).backward(x, y).loss
    assert torch.equal(attached.backward(x, y).loss, fresh)
