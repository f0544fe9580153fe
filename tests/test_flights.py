"""Functions whose output counts thresholds without end, as the neurons of sinabs and Rockpool do."""

import pytest
import torch
from torch import Tensor, nn

import ulr_snn
from tests.helpers import library_of
from tests.written import BATCH, CLASSES, INPUTS, STEPS, Above, Unasked, data, gradients, layered
from ulr_snn import ULR, Logistic, UsageError, evaluate, train
from ulr_snn.adapters.stairs import Flight
from ulr_snn.model.staircase import staircase
from ulr_snn.runs.recording import record


class Counted(Unasked):
    """All multiples of a threshold that a membrane has reached."""

    @staticmethod
    def forward(ctx, v, threshold, most=None):
        count = (v > 0) * torch.div(v, threshold, rounding_mode="trunc")
        return count if most is None else count.clamp(max=most)


class FromHalf(Unasked):
    @staticmethod
    def forward(ctx, v, offset):
        return 2 * ((v - offset) / 0.25 + 0.5).floor().clamp(0, 1000) - 1


class Fine(Unasked):
    """Too fine to be a neuron: it rounds."""

    @staticmethod
    def forward(ctx, v):
        return (v * 4096).floor().clamp(min=0) / 4096


VALUES = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) * 3


def found(function, *rest, x=VALUES):
    return staircase(function, [((x, *rest), function.apply(x, *rest))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
@pytest.mark.parametrize(
    "threshold",
    [0.7, torch.tensor(0.7), nn.Parameter(torch.tensor(1.3)), torch.rand(6) + 0.5],
    ids=["number", "one", "learned", "each"],
)
def test_thresholds_without_end_are_multiples_of_their_unit(threshold, dtype):
    rest = threshold.to(dtype) if isinstance(threshold, Tensor) else threshold
    stairs = found(Counted, rest, x=VALUES.to(dtype))
    assert isinstance(stairs, Flight)
    assert (stairs.over, stairs.below, stairs.first, stairs.most) == (1, None, 0.0, torch.inf)
    assert (stairs.thresholds[0], stairs.even, stairs.rises[0]) == pytest.approx((1.0, 1.0, 1.0), abs=1e-6)


def test_flights_with_an_end_an_offset_and_other_heights():
    assert found(Counted, 0.7, 20).most == 20
    assert found(Counted, 0.7, 3).thresholds == pytest.approx((1.0, 2.0, 3.0))  # few enough to be listed
    stairs = found(FromHalf, torch.rand(6))
    assert (stairs.below, stairs.over, stairs.first, stairs.most) == (1, None, -1.0, 1000)
    assert (stairs.thresholds[0], stairs.even, stairs.rises[0]) == pytest.approx((0.125, 0.25, 2.0), abs=1e-6)
    assert found(Fine) is None


def test_without_noise_the_output_is_the_functions_own_bit_for_bit():
    """Also at the thresholds, where rounding decides, and for counts of thousands."""
    threshold = 0.3
    multiples = torch.arange(-3, 2000) * threshold
    sides = [multiples.nextafter(torch.full_like(multiples, side)) for side in (torch.inf, -torch.inf)]
    x = torch.cat([multiples, *sides, torch.tensor([1e4, -1e4])])
    stairs = found(Counted, threshold)
    given = x, threshold
    climbed = stairs.climbed(stairs.standing(given), lambda: Counted.apply(*given))
    drive = stairs.settled(stairs.drive(stairs.standing(given), climbed), climbed)
    assert torch.equal(stairs.output((drive >= 0).to(drive), climbed), Counted.apply(*given))


def test_the_mean_with_noise_is_that_of_all_thresholds():
    """Those that are left out lie so far away that their neurons are sure."""
    x, scale = torch.linspace(-3, 30, 400, dtype=torch.float64), 0.05
    stairs = found(Counted, 1.0, x=x)
    climbed = stairs.climbed(x)
    mean = stairs.output(torch.sigmoid(stairs.drive(x, climbed) / scale), climbed)
    exact = torch.sigmoid((x.unsqueeze(-1) - torch.arange(1, 60)) / scale).sum(-1)
    torch.testing.assert_close(mean, exact, rtol=0, atol=2.5e-9)


class Fires(nn.Module):
    def __init__(self, fire) -> None:
        super().__init__()
        self.fire = fire

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.fire(now) for now in x])


@pytest.mark.parametrize(
    "estimator",
    [ULR(firing=Logistic(0.2)), ULR(credit="global", copies=4, firing=Logistic(0.2))],
    ids=["feedback", "global"],
)
@pytest.mark.parametrize("lengths", [None, torch.tensor([9, 3, 5, 1] * 4)], ids=["whole", "lengths"])
def test_the_lowest_thresholds_have_the_credit_of_neurons_apart(estimator, lengths):
    """Where membranes pass one threshold at most, a flight is two neurons, with the same draws and gradients."""
    fires = (
        lambda v: Counted.apply(v.clamp(max=1.9), 1.0),
        lambda v: Above.apply(torch.stack([v.clamp(max=1.9) - 1, v.clamp(max=1.9) - 2], 1)).sum(1),
    )
    flight, listed = (gradients(layered(lambda _, fire=fire: Fires(fire)), estimator, lengths) for fire in fires)
    for a, b in zip(flight, listed, strict=True):
        assert float(a.abs().max()) > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


class Units(nn.Module):
    """A layer with learned units of its thresholds, by which it divides itself, or lets its function divide."""

    def __init__(self, within: bool) -> None:
        super().__init__()
        self.within, self.unit = within, nn.Parameter(torch.linspace(0.2, 0.6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(
            [Counted.apply(now, self.unit) if self.within else Counted.apply(now / self.unit, 1.0) for now in x]
        )


def test_the_unit_of_thresholds_gets_its_gradient():
    def net(within: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(INPUTS, 6), Units(within), nn.Linear(6, CLASSES)).double()

    inner, outer = (gradients(net(within), ULR(firing=Logistic(0.2))) for within in (True, False))
    assert len(inner) == 5 and float(inner[2].abs().max()) > 0
    for a, b in zip(inner, outer, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# -- libraries whose neurons count -------------------------------------------------------------------------


def batches() -> list[tuple[Tensor, Tensor]]:
    """Events [B, T, ...], which the first features tell apart."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(48, 8, INPUTS, generator=generator), torch.arange(48) % CLASSES
    x = (x < 0.2).float()
    x[torch.arange(48), :, y] += 1
    return [(x[:24], y[:24]), (x[24:], y[24:])]


def sinabs(kind: str) -> nn.Module:
    layers = library_of("sinabs.layers")
    activation = library_of("sinabs.activation")
    torch.manual_seed(0)
    neuron = {
        "IAF": lambda: layers.IAF(),
        "LIF": lambda: layers.LIF(tau_mem=10.0, norm_input=False),
        "one spike": lambda: layers.LIF(tau_mem=10.0, norm_input=False, spike_fn=activation.SingleSpike),
        "at most 20": lambda: layers.LIF(tau_mem=10.0, norm_input=False, spike_fn=activation.MaxSpike(20)),
        "recurrent": lambda: layers.LIFRecurrent(tau_mem=10.0, norm_input=False, rec_connect=nn.Linear(12, 12)),
        "adaptive": lambda: layers.ALIF(tau_mem=10.0, tau_adapt=20.0, norm_input=False),
    }[kind]
    return nn.Sequential(nn.Linear(INPUTS, 12), neuron(), nn.Linear(12, CLASSES))


def rockpool(kind: str) -> nn.Module:
    modules, combinators = library_of("rockpool.nn.modules"), library_of("rockpool.nn.combinators")
    constant = library_of("rockpool.parameters").Constant
    torch.manual_seed(0)
    options = {"dt": 1e-2, "tau_mem": constant(2e-2), "tau_syn": constant(2e-2), "has_rec": kind == "recurrent"}
    layers = modules.LinearTorch((INPUTS, 12)), modules.LIFTorch(12, **options), modules.LinearTorch((12, CLASSES))
    return combinators.Sequential(*layers).to_torch()


CASES = [("sinabs", kind) for kind in ("IAF", "LIF", "one spike", "at most 20", "recurrent", "adaptive")]
CASES += [("rockpool", kind) for kind in ("LIF", "recurrent")]


@pytest.mark.parametrize(("library", "kind"), CASES)
def test_they_train_and_every_batch_starts_anew(library, kind, monkeypatch):
    model = {"sinabs": sinabs, "rockpool": rockpool}[library](kind)
    if library == "sinabs":
        backward = library_of("sinabs.activation.spike_generation").BackwardClass
        monkeypatch.setattr(backward, "backward", staticmethod(Unasked.backward))
    before = evaluate(model, batches(), layout="BT")["loss"]
    train(model, batches() * 10, epochs=2, layout="BT", lr=1e-2, progress=False)
    after = evaluate(model, batches(), layout="BT")
    assert after["loss"] < before - 0.2, (before, after)
    assert evaluate(model, batches()[::-1], layout="BT")["loss"] == pytest.approx(after["loss"], rel=1e-6)


def test_a_layer_of_sinabs_with_a_fixed_batch_is_refused():
    layers = library_of("sinabs.layers")
    model = nn.Sequential(layers.FlattenTime(), nn.Linear(INPUTS, 4), layers.IAFSqueeze(batch_size=24))
    with pytest.raises(UsageError, match=r"2 is a sinabs IAFSqueeze: it has batch_size=24, .* give it num_timesteps"):
        train(model, batches(), epochs=1, layout="BT", progress=False)


def test_a_module_of_rockpool_is_asked_for_its_torch_methods():
    modules, combinators = library_of("rockpool.nn.modules"), library_of("rockpool.nn.combinators")
    model = combinators.Sequential(modules.LinearTorch((INPUTS, 4)), modules.LIFTorch(4))
    with pytest.raises(UsageError, match="to_torch"):
        ulr_snn.plan(model, data())


class Smooth(torch.autograd.Function):
    """With a surrogate that works, so that BPTT has it, too."""

    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return v.floor().clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        (v,) = ctx.saved_tensors
        return gradient * (v > 0)


def test_counts_are_recorded_and_diagnosed():
    model = layered(lambda _: Fires(lambda v: Smooth.apply(3 * v))).float()
    x, y = data()
    recorded = record(model, (x.float(), y)).layers["1"]
    assert recorded.spikes.shape == (STEPS, BATCH, 8) and recorded.spikes.max() > 2
    found = ulr_snn.diagnose(model, (x.float(), y), draws=8, reference_draws=32, warm_up=4)
    assert all(method in str(found) for method in ("feedback", "global", "surrogate"))


def test_noise_begins_no_wider_than_the_nearest_thresholds_allow():
    model = layered(lambda _: Fires(lambda v: Smooth.apply(9 * v))).float()
    noise = {site: noise for site, noise, _ in ulr_snn.plan(model, (data()[0].float(), data()[1])).sites}
    assert noise["1"].startswith("logistic, 0.20 -> 0.05")
