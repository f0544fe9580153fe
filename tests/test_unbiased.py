"""The estimators against exact enumeration of all spike patterns of tiny nets.

`global` and `residual` have the exact gradient of the expected loss as their mean, and a named wrong formula
does not (the bias of `feedback` is measured in test_formula.py).
"""

import dataclasses
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

import ulr_snn
from tests.cases import CASES, NO_GRADIENT, make, two_layers, wrong_formula
from tests.statistics import Verdict, compare_means, gradient_draws
from ulr_snn import LIF, ULR, AdaptiveCopies, Global, Independent, Logistic, Residual, attach
from ulr_snn.losses import LOSSES

ONE_CREDIT = (*NO_GRADIENT, "bound of two", "bound of four")
UNTRAINED = {"0-1 loss": "3.weight, 3.bias"}  # a readout under a loss that is flat in the outputs: gradient zero

GLOBAL = ULR(credit="global", copies=4)
GLOBAL_ONE_PAIR = ULR(credit="global", copies=2)
GLOBAL_INDEPENDENT = ULR(credit="global", copies=4, antithetic=False)
GLOBAL_SINGLE = ULR(credit="global", copies=1)
RESIDUAL = ULR(credit="residual", copies=4)
RESIDUAL_INDEPENDENT = ULR(credit="residual", copies=2, antithetic=False)

LAYERWISE = dataclasses.replace(GLOBAL, layerwise=True)
ADAPTIVE = dataclasses.replace(GLOBAL, copies=AdaptiveCopies(variance=0.064, most=16))  # 4, 8, 12 or 16
SOBOL = dataclasses.replace(GLOBAL_INDEPENDENT, copies=8, quasi_monte_carlo=True)
TO_GO = dataclasses.replace(GLOBAL, credit=Global(reward_to_go=True))
BOUND = dataclasses.replace(GLOBAL, sampling=Independent(2, multi_sample=True))

# every case with both credits; further copies and pairings on some; a wrong formula that each must notice
PLAN: list[tuple[str, ULR, str]] = [
    ("subtract", GLOBAL, "partner as baseline"),
    ("subtract", RESIDUAL, "own copy's prediction"),
    ("subtract", GLOBAL_ONE_PAIR, "partner as baseline"),
    ("subtract", GLOBAL_INDEPENDENT, "own loss in the baseline"),
    ("subtract", GLOBAL_SINGLE, "sign of the score"),
    ("subtract", RESIDUAL_INDEPENDENT, "own copy's prediction"),
    ("zero", GLOBAL, "no reset in the trace"),
    ("zero", RESIDUAL, "no a p'"),
    ("none", GLOBAL, "missing 1/scale"),
    ("none", RESIDUAL, "sign of the score"),
    ("recurrent subtract", GLOBAL, "recurrent input not shifted"),
    ("recurrent subtract", RESIDUAL, "own copy's prediction"),
    ("recurrent subtract", RESIDUAL_INDEPENDENT, "own copy's prediction"),
    ("recurrent zero", GLOBAL, "no leak in the trace"),
    ("recurrent zero", RESIDUAL, "no a p'"),
    ("two recurrent layers", GLOBAL, "recurrent input not shifted"),
    ("two recurrent layers", RESIDUAL, "own copy's prediction"),
    ("convolution", GLOBAL, "spike in place of innovation"),
    ("convolution", RESIDUAL, "no a p'"),
    ("two layers", GLOBAL, "missing 1/scale"),
    ("two layers", GLOBAL_INDEPENDENT, "own loss in the baseline"),
    ("two layers", RESIDUAL, "own copy's prediction"),
    ("two layers", RESIDUAL_INDEPENDENT, "own copy's prediction"),
    ("two layers zero", GLOBAL, "no leak in the trace"),
    ("two layers zero", RESIDUAL, "no reset in the trace"),
    ("learnable, relative scale", GLOBAL, "scale without derivative"),
    ("learnable, relative scale", RESIDUAL, "scale without derivative"),
    ("learnable zero, fixed scale", GLOBAL, "missing 1/scale"),
    ("learnable zero, fixed scale", RESIDUAL, "no reset in the trace"),
    ("gaussian", GLOBAL, "logistic score"),
    ("gaussian", RESIDUAL, "logistic score"),
    ("gaussian zero, learnable", GLOBAL, "no reset in the trace"),
    ("gaussian zero, learnable", RESIDUAL, "no a p'"),
    ("leaky readout, membranes", GLOBAL, "sign of the score"),
    ("leaky readout, membranes", RESIDUAL, "no a p'"),
    ("attention", GLOBAL, "spike in place of innovation"),
    ("attention", RESIDUAL, "no a p'"),
    ("residual sum and layer norm", GLOBAL, "partner as baseline"),
    ("residual sum and layer norm", RESIDUAL, "own copy's prediction"),
    ("pooling", GLOBAL, "no leak in the trace"),
    ("pooling", RESIDUAL, "no a p'"),
    ("neurons used twice", GLOBAL, "no leak in the trace"),
    ("neurons used twice", RESIDUAL, "own copy's prediction"),
    ("spike counts", GLOBAL, "partner as baseline"),
    ("spike counts", RESIDUAL, "own copy's prediction"),
    ("0-1 loss", GLOBAL, "partner as baseline"),
    ("0-1 loss", GLOBAL_INDEPENDENT, "own loss in the baseline"),
    ("latency rule", GLOBAL, "missing 1/scale"),
    ("two layers", LAYERWISE, "missing 1/scale"),
    ("two layers", dataclasses.replace(RESIDUAL, layerwise=True), "own copy's prediction"),
    ("two recurrent layers", dataclasses.replace(LAYERWISE, antithetic=False), "own loss in the baseline"),
    ("spike counts", dataclasses.replace(LAYERWISE, antithetic=False, quasi_monte_carlo=True), "sign of the score"),
    ("two layers", ADAPTIVE, "partner as baseline"),
    ("two layers", dataclasses.replace(ADAPTIVE, credit="residual", layerwise=True), "own copy's prediction"),
    ("subtract", SOBOL, "own loss in the baseline"),
    ("two layers", dataclasses.replace(SOBOL, credit="residual"), "own copy's prediction"),
    ("loss in time", TO_GO, "past in place of future"),
    ("loss in time", dataclasses.replace(RESIDUAL, credit=Residual(reward_to_go=True)), "past in place of future"),
    ("loss in time", dataclasses.replace(LAYERWISE, credit=Global(reward_to_go=True)), "partner as baseline"),
    ("bound of two", BOUND, "mean in place of the bound"),
    ("bound of four", dataclasses.replace(BOUND, copies=4), "mean in place of the bound"),
    ("closed loop", GLOBAL, "partner as baseline"),
    ("closed loop", TO_GO, "past in place of future"),
    ("closed loop", dataclasses.replace(TO_GO, antithetic=False), "own loss in the baseline"),
    ("black box", GLOBAL, "sign of z"),
    ("black box", RESIDUAL, "no a at the current"),
    ("black box, then neurons", GLOBAL, "partner as baseline"),
    ("black box, then neurons", RESIDUAL, "no a at the current"),
]
SAMPLES, STEPS, WARM_UP = 2048, 144, 2
SLOW_LOSS = {"latency rule": 512}  # fewer samples where the loss is plain Python
PRECISE = 0.008  # of the gradient's norm: a standard error that ends the draws


def warned(name: str) -> AbstractContextManager:
    """Exactly the parameters that have no gradient are named in a warning; where there are none, none is raised."""
    if name not in UNTRAINED:
        return nullcontext()  # warnings are errors
    return pytest.warns(UserWarning, match=f"^no gradient reaches {UNTRAINED[name]};")


def label(value: object) -> str | None:
    if isinstance(value, ULR):
        kinds = [type(kind).__name__ for kind in (value.sampling, getattr(value.sampling, "of", None)) if kind]
        ways = ["to go"] * value.credit.reward_to_go + ["bound"] * value.sampling.multi_sample
        return "-".join([value.credit.name, str(value.sampling.copies), *kinds, *ways])
    return None


def test_every_case_is_planned():
    for name in CASES:
        credits = {estimator.credit.name for case, estimator, _ in PLAN if case == name}
        assert credits == ({"global"} if name in ONE_CREDIT else {"global", "residual"})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "estimator", "wrong"), PLAN, ids=label)
def test_mean_is_the_exact_gradient(name: str, estimator: ULR, wrong: str, device: torch.device):
    case = make(name)
    estimator = ULR(**{**estimator.__dict__, "firing": case.firing})
    exact, samples = case.exact(), SLOW_LOSS.get(name, SAMPLES)
    case.to(device)

    def found(draws: Tensor) -> Verdict:
        return compare_means("unbiased", draws, exact, spending=False)

    def precise(draws: Tensor) -> bool:
        return found(draws).error <= PRECISE * exact.norm()

    def rejects(draws: Tensor) -> bool:
        return not found(draws).agrees

    # Two steps first: the moving baseline begins, and the feedback is no longer zero in the steps that count.
    with warned(name):
        draws = case.draws(estimator, samples, STEPS, WARM_UP, enough=precise)
    right = compare_means("unbiased", draws, exact)
    with warned(name), wrong_formula(wrong):
        rejected = found(case.draws(estimator, samples, STEPS, WARM_UP, enough=rejects))
    noise = f"standard error {right.error / exact.norm():.2%}, p {right.worst:.1e}"
    print(f"{name}: {len(draws)} draws, {noise}; {wrong}: p {rejected.worst:.1e}")
    assert right.error <= 0.01 * exact.norm()
    assert right.agrees, f"p = {right.worst:.1e}"
    assert not rejected.agrees, f"{wrong} goes unnoticed: p = {rejected.worst:.1e}"


def test_reward_to_go_lowers_the_variance_of_both_credits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), LIF(), nn.Linear(6, 3), LIF())
    batch = 2 * torch.rand(20, 64, 4), torch.arange(64) % 3
    for plain in (GLOBAL, RESIDUAL):
        spread = []
        for to_go in (False, True):
            estimator = dataclasses.replace(
                plain, firing=Logistic(scale=0.4), credit=dataclasses.replace(plain.credit, reward_to_go=to_go)
            )
            with attach(model, estimator, "ce_rate", seed=1) as ulr:
                spread.append(float(gradient_draws(ulr, batch, list(model.parameters()), 40, 10).var(0).sum()))
        assert spread[1] < spread[0], (plain.credit, spread)


def test_a_loss_object_has_reward_to_go():
    batch, found = (torch.rand(3, 4, 2).double(), torch.arange(4) % 2), []
    for loss in ("ce_rate", LOSSES["ce_rate"]):
        model = make("loss in time").model
        with attach(model, TO_GO, loss) as ulr:
            ulr.backward(*batch)
        found.append(torch.cat([q.grad.flatten() for q in model.parameters()]))
    assert found[0].any() and torch.equal(*found)


@pytest.mark.parametrize(
    "options",
    [
        {"multi_sample": True, "copies": 4, "antithetic": False, "quasi_monte_carlo": True},
        {"multi_sample": True, "copies": 4},
        {"quasi_monte_carlo": True, "copies": 8},
        {"quasi_monte_carlo": True, "copies": 6, "antithetic": False},
        {"layerwise": True},
        {"reward_to_go": True, "credit": "feedback"},
    ],
    ids=str,
)
def test_reductions_that_do_not_go_together(options):
    with pytest.raises(ulr_snn.UsageError):
        ULR(**options)


def test_reductions_that_the_model_or_the_loss_forbids():
    model, batch = two_layers("subtract").model, (torch.rand(3, 4, 2).double(), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ulr_snn.UsageError, match="parameters have noise of their own"):
        attach(model, dataclasses.replace(LAYERWISE, noise={"0": ulr_snn.WeightNoise()})).backward(*batch)
    with pytest.raises(ulr_snn.UsageError, match="a sum over time steps"):
        attach(model, dataclasses.replace(GLOBAL, credit=Global(reward_to_go=True))).backward(*batch)
    mixed = {"ce_count": 1.0, lambda outputs, _: outputs.detach().sum((0, 2)): 1.0}
    with pytest.raises(ulr_snn.UsageError, match="one of the mixed losses has no gradient"):
        attach(two_layers("subtract", counts=True).model, dataclasses.replace(BOUND, credit="auto"), mixed).backward(
            *batch
        )
