"""Neurons in plain torch, which fire by a comparison, with a detour for a gradient or with none."""

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

from tests.written import CLASSES, INPUTS, Above, Own, data, gradients, layered
from ulr_snn import ULR, Independent, Logistic, TimeAverage, UsageError, attach, evaluate, plan, train

Fire = Callable[[Tensor], Tensor]


def hard(v: Tensor) -> Tensor:
    return (v > 0).to(v)


def soft(v: Tensor) -> Tensor:
    return torch.sigmoid(4 * v)


def filled(v: Tensor) -> Tensor:
    spikes = torch.zeros_like(v)
    spikes[v > 0] = 1.0
    return spikes


def without_graph(v: Tensor) -> Tensor:
    with torch.no_grad():
        difference = hard(v) - soft(v)
    return soft(v) + difference


def without_graph_before(v: Tensor) -> Tensor:
    with torch.no_grad():
        spikes = (v + 1 >= 1.0000000001).to(v)
    return soft(v) + (spikes - soft(v)).detach()


def by_data(v: Tensor) -> Tensor:
    found = soft(v)
    return found + (hard(v) - found).data


def piecewise(v: Tensor) -> Tensor:
    found = torch.where(v.abs() < 0.5, v + 0.5, (v > 0.5).to(v))
    return (hard(v) - found).detach() + found


def chosen(v: Tensor) -> Tensor:
    found = soft(v)
    return torch.where(v > 0, 1 + found - found.detach(), found - found.detach())


PLAIN: dict[str, Fire] = {
    "to": hard,
    "float": lambda v: (v > 0).double(),
    "gt": lambda v: v.gt(0.0).type_as(v),
    "torch.gt": lambda v: torch.ones((), dtype=v.dtype) * torch.gt(v, 0),
    "reversed": lambda v: (0 < v).type(v.dtype),  # noqa: SIM300
    "tensors": lambda v: (torch.zeros_like(v) < v).to(v.dtype),
    "below": lambda v: 1 - (v <= 0).to(v),
    "not": lambda v: (~(v <= 0)).to(v),
    "threshold": lambda v: (v + 1 > 1.0).to(v),
    "heaviside": lambda v: torch.heaviside(v, torch.zeros((), dtype=v.dtype)),
    "sign": lambda v: (torch.sign(v) + 1) / 2,
    "relu of sign": lambda v: torch.relu(v.sign()),
    "clamp of sign": lambda v: v.sign().clamp(0, 1),
    "where": lambda v: torch.where(v > 0, torch.ones((), dtype=v.dtype), 0.0),
    "where of tensors": lambda v: torch.where(v > 0, torch.ones_like(v), torch.zeros_like(v)),
    "masked fill": lambda v: torch.zeros_like(v).masked_fill(v > 0, 1.0),
    "index": filled,
}
DETOURS: dict[str, Fire] = {
    "soft first": lambda v: soft(v) + (hard(v) - soft(v)).detach(),
    "soft last": lambda v: (hard(v) - soft(v)).detach() + soft(v),
    "three": lambda v: hard(v).detach() - soft(v).detach() + soft(v),
    "difference": lambda v: soft(v) - soft(v).detach() + hard(v),
    "hard first": lambda v: hard(v) + soft(v) - soft(v).detach(),
    "product": lambda v: soft(v) * (hard(v) / soft(v)).detach(),
    "no graph": without_graph,
    "no graph before": without_graph_before,
    "detached before": lambda v: (hard(v.detach()) - soft(v)).detach() + soft(v),
    "data": by_data,
    "where": chosen,
    "piecewise": piecewise,
    "identity": lambda v: v + (hard(v) - v).detach(),
    "clamp": lambda v: (hard(v) - v.clamp(0, 1)).detach() + v.clamp(0, 1),
    "hardtanh": lambda v: (hard(v) - nn.functional.hardtanh(v)).detach() + nn.functional.hardtanh(v),
    "of sign": lambda v: ((v.sign() + 1) / 2 - v.tanh()).detach() + v.tanh(),
    "of where": lambda v: (torch.where(v > 0, torch.ones_like(v), 0.0) - soft(v)).detach() + soft(v),
    "of heaviside": lambda v: soft(v) + (torch.heaviside(v, torch.zeros_like(v)) - soft(v)).detach(),
    "of two": lambda v: soft(v) + (((v > 0) & (v >= 0)).to(v) - soft(v)).detach(),
}
FIRES = {f"plain, {name}": fire for name, fire in PLAIN.items()} | {f"detour, {n}": fire for n, fire in DETOURS.items()}


def net(fire: Fire, reset: str = "subtract") -> nn.Sequential:
    return layered(lambda beta: Own(beta, reset, fire))


@cache
def expected(credit: str) -> list[Tensor]:
    return gradients(net(Above.apply), ULR(credit=credit, firing=Logistic(0.4)))


@pytest.mark.parametrize("name", FIRES)
def test_each_form_of_a_threshold_has_the_gradient_of_a_function_that_fires(name):
    """Equal draws; nothing of the detour is left."""
    credit = "global" if name in ("plain, where", "detour, three") else "feedback"
    found = gradients(net(FIRES[name]), ULR(credit=credit, firing=Logistic(0.4)))
    assert len(found) == len(expected(credit))
    for a, b in zip(found, expected(credit), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9 * float(b.abs().max()))


class Written(nn.Module):
    """A layer between two weights. step: (membranes, current) -> (spikes, membranes)."""

    def __init__(self, step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step, self.a, self.b = step, nn.Linear(INPUTS, 6), nn.Linear(6, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        v, found = torch.zeros(x.shape[1], 6, dtype=x.dtype), []
        for now in x:
            spikes, v = self.step(v, self.a(now))
            found.append(self.b(spikes))
        return torch.stack(found)


def by_function(reset: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def step(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
        v = 0.9 * v + current
        spikes = Above.apply(v - 1.0)
        return spikes, reset(v, spikes)

    return step


def by_truth(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    v = 0.9 * v + current
    fired = v > 1.0
    return fired.to(v), torch.where(fired, torch.zeros_like(v), v)


def twice(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    """Compares the same membranes twice: this is one draw."""
    v = 0.9 * v + current
    spikes = (v > 1.0).to(v)
    return spikes, v * (v <= 1.0)


def in_the_next_step(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    v = 0.9 * v * (1 - (v > 1.0).to(v)) + current
    return (v > 1.0).to(v), v


def softly_reset(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    """Spikes and reset each have a detour."""
    v = 0.9 * v + current
    spikes, mild = (v > 1.0).to(v), soft(v - 1.0)
    reset, mildly = v * (1 - spikes), v * (1 - mild)
    return mild + (spikes - mild).detach(), mildly + (reset - mildly).detach_()


RESETS = {"truth": by_truth, "twice": twice, "next step": in_the_next_step, "soft": softly_reset}


@pytest.mark.parametrize("name", RESETS)
def test_a_reset_reads_the_spikes_that_were_drawn(name):
    model, like = Written(RESETS[name]), Written(by_function(lambda v, s: v * (1 - s)))
    assert len(plan(model, data()).sites) == 1
    for estimator in (ULR(firing=Logistic(0.4)), ULR(credit="global", copies=2, firing=Logistic(0.4))):
        for a, b in zip(*(gradients(m, estimator) for m in (model, like)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9 * float(b.abs().max()))
        model.zero_grad()
        like.zero_grad()


def test_evaluation_is_that_of_the_models_own_forward():
    """Bit for bit, rounding of the detour included, and also in a pass that keeps a graph."""
    x, y = data()[0].float(), data()[1]
    for name in ("detour, three", "detour, product", "plain, sign", "detour, where"):
        model = net(FIRES[name], "zero").float()
        with torch.no_grad():
            own = model(x)
        assert (
            evaluate(model, [(x, y)], loss=lambda o, _, own=own: (o - own).abs().amax((0, 2)), device="cpu")["loss"]
            == 0
        )
        kept = {name: q.clone() for name, q in model.named_parameters()}
        train(model, [(x, y)] * 2, epochs=2, progress=False, device="cpu")
        assert not torch.equal(model.get_parameter("0.weight"), kept["0.weight"])
        with torch.no_grad():
            own = model(x)
        assert not any(hasattr(q, mark) for q in model.parameters() for mark in ("ulr_node", "ulr_decided"))
        assert (
            evaluate(model, [(x, y)], loss=lambda o, _, own=own: (o - own).abs().amax((0, 2)), device="cpu")["loss"]
            == 0
        )


def masks(v: Tensor) -> Tensor:
    """A membrane bounded below, and a slope that is none of the spikes'."""
    v = torch.where(v < -0.5, torch.full_like(v, -0.5), v)
    v = v * (v > -0.4) - 0.4 * (v <= -0.4).to(v)
    return Above.apply(v)


def test_masks_of_membranes_and_inputs_stay_as_they_are():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net(masks)

        def forward(self, x: Tensor) -> Tensor:
            x = (x > 0.5).to(x) * (torch.rand_like(x) < 2).to(x)
            for layer in self.net:
                x = layer(x)
            return x * (x > -100).to(x)

    found = plan(Masked(), data())
    assert len(found.sites) == 2 and not found.untrained and not found.notes
    assert all("logistic" in noise for _, noise, _ in found.sites)


def test_a_reset_by_a_comparison_beside_a_function_stays_as_it_is():
    """As in DIET-SNN, with a learned threshold."""

    class Threshold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.threshold = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            v, found = torch.zeros_like(x[0]), []
            for now in x:
                above = v / self.threshold - 1.0
                reset = self.threshold * (above > 0).to(v)
                found.append(Above.apply(above))
                v = 0.9 * v + now - reset
            return torch.stack(found)

    assert [site for site, *_ in plan(layered(lambda _: Threshold()), data()).sites] == ["1", "3"]

    class OnOneLine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = INPUTS, 9, 8, 7, 6, 4
            self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
            self.thresholds = nn.ParameterList([torch.ones(()) for _ in self.layers])
            self.out = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            v: list[Tensor] = [x.new_zeros(x.shape[1], layer.out_features) for layer in self.layers]
            found = []
            for now in x:
                for i, layer in enumerate(self.layers):
                    above = v[i] / self.thresholds[i] - 1.0
                    spikes, reset = Above.apply(above), self.thresholds[i] * (above > 0).to(above)
                    v[i] = 0.9 * v[i] + layer(now) - reset
                    now = spikes
                found.append(self.out(now))
            return torch.stack(found)

    assert all("Above" in site for site, *_ in plan(OnOneLine().double(), data()).sites)


def test_quantised_weights_keep_their_detour():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, INPUTS))
            self.neuron, self.out = Own(0.8, "zero", DETOURS["soft first"]), nn.Linear(6, CLASSES)

        def binary(self) -> Tensor:
            return self.weight + (torch.sign(self.weight) - self.weight).detach()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.neuron(x @ self.binary().T))

    torch.manual_seed(0)
    model = Net().double()
    assert [site for site, *_ in plan(model, data()).sites] == ["neuron"]
    assert all(float(g.abs().max()) > 0 for g in gradients(model, ULR()))
    with attach(model, ULR(), seed=5) as ulr:
        ulr.backward(*data())
    assert not vars(model.weight)


def test_a_detour_around_no_threshold_keeps_its_gradient():
    """A code book, and a scaled gradient of membranes."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.neuron, self.out = nn.Linear(INPUTS, 6), Own(0.8, "zero", hard), nn.Linear(6, CLASSES)
            self.codes = nn.Parameter(torch.randn(5, 6))

        def forward(self, x: Tensor) -> Tensor:
            z = self.a(x)
            nearest = self.codes[torch.cdist(z, self.codes.expand(len(z), -1, -1)).argmin(-1)]
            z = z + (nearest - z).detach()
            scaled = 0.5 * z
            return self.out(self.neuron((z - scaled).detach() + scaled))

    torch.manual_seed(0)
    model = Net().double()
    assert [site for site, *_ in plan(model, data()).sites] == ["neuron"]
    grads = gradients(model, ULR())
    assert len(grads) == 5 and all(float(g.abs().max()) > 0 for g in grads)


def test_what_only_the_soft_side_reads_has_no_gradient():
    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(4.0))

        def forward(self, v: Tensor) -> Tensor:
            found = torch.sigmoid(self.slope * v)
            return (hard(v) - found).detach() + found

    model = layered(lambda beta: Own(beta, "zero", Slope()))
    found = plan(model, data())
    assert [line.partition(":")[0] for line in found.untrained] == ["1.fire.slope", "3.fire.slope"]
    assert found.notes[0].startswith("1.fire fires by a comparison, with noise in place of the gradient of a detour")


def test_black_boxes_keep_their_noise_beside_plain_comparisons():
    """Credit of places does not reach a box."""

    class Box(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.detach() > 0.5).to(x)

    model = layered(lambda beta: Own(beta, "zero", hard) if beta == 0.8 else Box())
    assert [noise.split(",")[0] for _, noise, _ in plan(model, data()).sites] == ["gaussian on its current"] * 2
    model = layered(lambda beta: Own(beta, "zero", DETOURS["three"]) if beta == 0.8 else Box())
    with pytest.raises(UsageError, match="3 has noise on its current"):
        plan(model, data())


class Levels(Function):
    """Counts thresholds at 0.5, 1.5, 2.5 and 3.5."""

    @staticmethod
    def forward(ctx, x):
        return x.clamp(0, 4).round()


def straight(v: Tensor) -> Tensor:
    found = torch.clamp(v, 0, 4)
    return found + (torch.round(found) - found).detach()


COUNTS: dict[str, Fire] = {
    "round": lambda v: torch.round(v.clamp(0, 4)),
    "floor": lambda v: (v + 0.5).floor().clamp(0, 4),
    "divided": lambda v: torch.relu(torch.ceil(v.clamp_max(4) - 0.5)),
    "detour": straight,
    "detour of the membrane": lambda v: (v.clamp(min=0, max=4).round() - v).detach() + v,
    "three": lambda v: v.clamp(0, 4) - v.clamp(0, 4).detach() + v.clamp(0, 4).round(),
}


@pytest.mark.parametrize("name", COUNTS)
def test_rounding_counts_thresholds(name):
    estimator = ULR(firing=Logistic(0.4))
    found, like = (gradients(net(fire), estimator) for fire in (COUNTS[name], Levels.apply))
    assert len(found) == len(like)
    for a, b in zip(found, like, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9 * float(b.abs().max()))


def test_rounding_in_both_directions_keeps_its_detour():
    def rounded(v: Tensor) -> Tensor:
        return v + (v.round() - v).detach()

    model = layered(lambda beta: Own(beta, "zero", Above.apply) if beta == 0.8 else Own(0.0, "zero", rounded))
    assert [site for site, *_ in plan(model, data()).sites] == ["1"]


@pytest.mark.parametrize(
    "estimator",
    [ULR(credit="residual"), ULR(maps="learned"), ULR(sampling=Independent(2, multi_sample=True))],
    ids=["residual", "learned", "multi_sample"],
)
def test_a_module_that_fires_in_plain_torch_is_a_black_box_for_estimators_that_go_layer_by_layer(estimator):
    class Hard(nn.Module):
        def forward(self, current: Tensor) -> Tensor:
            return (current > 0.1).to(current.dtype)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), Hard(), TimeAverage(), nn.Linear(6, 3))
    x, y = torch.rand(5, 4, 4), torch.tensor([0, 1, 2, 0])
    assert [how.startswith("gaussian") for _, how, _ in plan(model, (x, y), estimator).sites] == [True]
    assert not any(how.startswith("gaussian") for _, how, _ in plan(model, (x, y)).sites)
    with attach(model, estimator) as ulr:
        ulr.backward(x, y)
    assert model[0].weight.grad.abs().sum() > 0
    evaluate(model, [(x, y)], estimator=estimator, mode="stochastic")
