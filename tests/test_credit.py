"""The credit inside a neuron, and feedback where layers are too wide for what is learned between small ones."""

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.cases import make
from tests.helpers import batches, net, train
from ulr_snn import LIF, ULR, attach, evaluate, plan
from ulr_snn.credit.feedback import FeedbackLimits
from ulr_snn.credit.kinds import Auto, Feedback
from ulr_snn.credit.recurrence import Recurrence


def path(reset: str, device: torch.device, seed: int = 0, neurons: tuple[int, ...] = (4,)) -> Recurrence:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.rand(9, 5, *neurons, generator=generator, dtype=torch.float64).to(device)

    beta = 0.3 + 0.6 * torch.rand(neurons, generator=generator)
    neuron = LIF(beta, 0.5 + torch.rand(neurons, generator=generator), reset).double().to(device)
    membrane = 2 * draw()
    slope = draw()
    return Recurrence(neuron, slope.clone, (draw() < 0.4).double(), lambda: membrane)


# -- the reset ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("neurons", [(4,), (2, 3, 2)], ids=["vector", "image"])
@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
def test_response_and_credit_are_one_linear_map(reset, neurons, device):
    """sum a · response(ε) = sum credit(a) · ε for any a and ε; each sample and neuron by itself."""
    one, other = path(reset, device, 0, neurons), path(reset, device, 1, neurons)
    generator = torch.Generator().manual_seed(2)
    a, innovations = (torch.randn(9, 5, *neurons, generator=generator).double().to(device) for _ in range(2))
    left = (a * one.response(innovations)).sum(0)
    torch.testing.assert_close(left, (one.credit(a)[0] * innovations).sum(0), rtol=1e-12, atol=1e-12)
    assert reset == "none" or not torch.allclose(left, (a * innovations).sum(0), rtol=1e-3)
    assert reset == "none" or not torch.allclose(left, (other.credit(a)[0] * innovations).sum(0), rtol=1e-3)


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
def test_response_is_the_derivative_of_the_mean_field(reset, device):
    """Autograd through a net whose spikes are s + ε + p(u + δu) - p(u), and whose reset acts on them."""
    p = path(reset, device)
    beta, threshold, u = p.neuron.beta, p.neuron.threshold, p.membrane()
    innovations = torch.randn(9, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(device)

    def spikes(size: Tensor) -> Tensor:
        moved, found = torch.zeros_like(u[0]), []
        for t in range(len(u)):
            s = p.spikes[t] + size * innovations[t] + p.slope()[t] * moved
            found.append(s)
            known, now = u[t], u[t] + moved
            if reset == "zero":
                moved = beta * ((1 - s) * now - (1 - p.spikes[t]) * known)
            else:
                moved = beta * moved - (threshold * (s - p.spikes[t]) if reset == "subtract" else 0)
        return torch.stack(found)

    zero = torch.zeros((), dtype=torch.float64, device=device)
    slope = torch.autograd.functional.jvp(spikes, zero, torch.ones_like(zero))[1]
    torch.testing.assert_close(p.response(innovations), slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
def test_credit_of_the_input_current(reset, device):
    """g = ∂/∂J of sum a s along the same path: moving J_t moves u_t, and with it the spikes from t on."""
    p = path(reset, device)
    a = torch.randn(9, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).to(device)
    total, currents = p.credit(a)
    beta = p.neuron.beta
    for t in range(9):
        kick = torch.zeros_like(a)
        kick[t] = p.slope()[t]  # the spike at t that a unit of current makes; what it leaves in the membrane:
        kept = beta * (1 - p.spikes[t]) if reset == "zero" else beta
        after = currents[t + 1] if t + 1 < 9 else torch.zeros_like(a[0])
        torch.testing.assert_close(currents[t], (total * kick).sum(0) + kept * after, rtol=1e-12, atol=1e-12)


# -- wide layers -------------------------------------------------------------------------------------------


PATHS = {
    "small": FeedbackLimits(),
    "projected": FeedbackLimits(exact_in_time=0),  # too wide for credit of every time step by itself
    "wide": FeedbackLimits(entries=1),  # too wide for a matrix between the two
}
each_path = pytest.mark.parametrize("name", PATHS)


@each_path
def test_where_the_feedback_between_two_layers_comes_from(name):
    model, batch = net(), batches()[0]
    estimator = ULR(credit=Auto(limits=PATHS[name]), maps="learned")
    with attach(model, estimator) as ulr:
        ulr.backward(*batch)
        learned = ulr.state_dict()["feedback"]
        feeds = {site: list(paths) for site, paths in ulr.structure.feeds.items()}
        assert feeds == {"1": [] if name == "wide" else ["3"], "3": []}
        assert ulr.structure.from_outputs == (["1"] if name == "wide" else [])
    assert set(learned["layers"]) == (set() if name == "wide" else {"1 -> 3"})
    assert set(learned["outputs"]) == ({"1"} if name == "wide" else set())
    credit = {site: text for site, _, text in plan(model, batch, estimator).sites}
    assert ("from the outputs" in credit["1"]) == (name == "wide")
    assert ("from layer 3" in credit["1"]) == (name != "wide")


@pytest.mark.slow
@each_path
def test_every_kind_of_feedback_learns(name, device):
    model, validation = net(), batches(64, seed=1)
    before = model[0].weight.detach().clone()
    settings = {"epochs": 8, "lr": 0.02, "val_loader": validation, "device": device}
    result = train(
        model, estimator=ULR(credit=Feedback(time_functions=2, limits=PATHS[name]), maps="learned"), **settings
    )
    assert result.history[-1]["train_loss"] < 0.5 * result.history[0]["train_loss"]
    assert evaluate(model, validation, device=device)["accuracy"] > 0.95
    assert (model[0].weight.detach().cpu() - before).norm() > 0.05 * before.norm()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["two layers", "two layers zero", "convolution", "attention"])
@pytest.mark.parametrize("name", ["projected", "wide"])
def test_bias_of_feedback_between_wide_layers_is_bounded(name, case, device):
    case_ = make(case)
    exact = case_.exact()
    case_.to(device)
    firing = dataclasses.replace(case_.firing, secants=0)
    estimator = ULR(credit=Feedback(refresh=1, limits=PATHS[name]), maps="learned", firing=firing)
    draws = case_.draws(estimator, 1024, 32, warm_up=40).cpu()
    first = slice(0, case_.model[0].weight.numel() if case != "convolution" else case_.model[0][0].weight.numel())
    for what, part in (("all", slice(None)), ("first layer", first)):
        mean, expected = draws[:, part].mean(0), exact[part]
        cosine = float(torch.nn.functional.cosine_similarity(mean, expected, dim=0))
        error = float((mean - expected).norm() / expected.norm())
        print(f"bias of feedback, {name}, {case}, {what}: cosine {cosine:.4f}, relative error {error:.3f}")
        assert cosine > 0.95 and error < 0.35, (what, cosine, error)
