"""The estimators written down by hand, with the same noise: no statistics needed.

The hand-written half uses plain loops over copies, layers and time, explicit forward traces (never autograd)
and only `Noise` from the library. Each agreement also rejects a named wrong formula. At the end: how biased
`feedback` is, and what it learns.
"""

import copy
import dataclasses
import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.cases import CASES, NO_GRADIENT, dense, linear, make, wrong_formula
from tests.statistics import compare_means, gradient_draws
from ulr_snn import LIF, ULR, Gaussian, Logistic, RecurrentLIF, TimeAverage, attach
from ulr_snn.credit import feedback
from ulr_snn.credit.feedback import FeedbackLimits
from ulr_snn.credit.kinds import Feedback, Residual
from ulr_snn.noise.firing import Firing
from ulr_snn.noise.level import LEVELS
from ulr_snn.noise.random import Noise

STEPS, BATCH, SEED = 5, 3, 11
TOTAL = 16  # steps over which the noise is annealed
RELATIVE = Logistic(start=1e-9, end=0.3)  # from the lowest start there is to 0.3 of the threshold


def waves(functions: int, steps: int) -> Tensor:
    """q_r(t), [R, T]: a constant and cosines, each of mean square 1."""
    rows = [[1.0] * steps]
    for r in range(1, min(functions, steps)):
        rows.append([2**0.5 * math.cos(math.pi * r * (t + 0.5) / steps) for t in range(steps)])
    return torch.tensor(rows, dtype=torch.float64)


# -- the formula by hand -----------------------------------------------------------------------------------


def distribution(firing: Firing, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p, 1 - p (each to full relative precision) and dp/dx."""
    if isinstance(firing, Gaussian):
        density = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
        return 0.5 * torch.erfc(-x / 2**0.5), 0.5 * torch.erfc(x / 2**0.5), density
    p, q = 1 / (1 + torch.exp(-x)), 1 / (1 + torch.exp(x))
    return p, q, p * q


def simulate(
    layer: nn.Linear,
    neuron: LIF,
    firing: Firing,
    progress: float,
    farthest: Tensor | None,
    x: Tensor,
    uniform: Tensor,
    wrong: str,
) -> dict:
    """One copy of one layer over x [T, B, J]: spikes, p, p', δ, and ∂u/∂parameter by forward traces. response: what
    credit takes for p', the mean of secants up to the farthest distance, where one is known."""
    weight, bias = layer.weight.detach(), layer.bias.detach()
    beta, threshold = neuron.beta.detach(), neuron.threshold.detach()
    recurrent = neuron.recurrent.weight.detach() if neuron.recurrent is not None else None
    batch, neurons = x.shape[1], len(weight)
    sigma = firing.scale or LEVELS[0] * (firing.end / LEVELS[0]) ** progress * threshold
    u = s = torch.zeros(batch, neurons, dtype=x.dtype)
    trace = {"weight": torch.zeros(batch, neurons, x.shape[2], dtype=x.dtype)}
    trace |= {name: torch.zeros(batch, neurons, dtype=x.dtype) for name in ("bias", "beta", "threshold")}
    if recurrent is not None:
        trace["recurrent"] = torch.zeros(batch, neurons, neurons, dtype=x.dtype)
    rows = []
    for t in range(len(x)):
        k = 1 - s if neuron.reset == "zero" else torch.ones_like(s)
        r = threshold if neuron.reset == "subtract" else 0.0
        leak = beta * (torch.ones_like(k) if wrong == "no reset in the trace" else k)
        leak = leak * 0 if wrong == "no leak in the trace" else leak
        trace["weight"] = leak[..., None] * trace["weight"] + x[t][:, None, :]
        trace["bias"] = leak * trace["bias"] + 1
        trace["beta"] = leak * trace["beta"] + k * u
        trace["threshold"] = leak * trace["threshold"] - (s if neuron.reset == "subtract" else 0)
        if recurrent is not None:
            before = s if wrong != "recurrent input not shifted" else uniform[t] * 0 + 1
            trace["recurrent"] = leak[..., None] * trace["recurrent"] + before[:, None, :]
        u, before_reset = beta * k * u + x[t] @ weight.T + bias - r * s, s
        if recurrent is not None:
            u = u + s @ recurrent.T
        d = u - threshold
        p, q, density = distribution(firing, d / sigma)
        s = (uniform[t] < p).to(x.dtype)
        local = dict(trace)
        local["threshold"] = local["threshold"] - 1 - (0 if firing.scale else d / threshold)
        slope = density / sigma
        score = slope * (s / p - (1 - s) / q)  # = ε p' / (p (1 - p))
        if wrong == "sign of the score":
            score = -score
        response = slope
        if farthest is not None and wrong != "slopes in place of secants":
            spread = torch.as_tensor(sigma, dtype=x.dtype).mean()
            middles = [(k + 0.5) / firing.secants for k in range(firing.secants)]
            end = max(float(farthest.max() / spread), 1.0)
            if -float(farthest.min() / spread) > end ** middles[-1]:  # no membrane is so near
                middles = [middle / middles[-1] for middle in middles]
            deltas = [end**middle for middle in middles]
            ups = [distribution(firing, d / sigma + delta)[0] for delta in deltas]
            downs = [distribution(firing, d / sigma - delta)[0] for delta in deltas]
            response = sum((a - b) / (2 * delta) for a, b, delta in zip(ups, downs, deltas, strict=True))
            response = response / len(deltas) / sigma
        if wrong == "missing 1/scale":
            score, slope, response = score * sigma, slope * sigma, response * sigma
        if wrong == "spike in place of innovation":
            score = s * slope / (p * q)
        local = {f"∂{name}": value for name, value in local.items()}
        current = x[t] @ weight.T + bias
        if recurrent is not None:
            local["fed_back"] = before_reset @ recurrent.T
        rows.append({"u": u, "s": s, "p": p, "current": current, "slope": slope})
        rows[-1] |= {"response": response, "score": score, **local}
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def distance_without_noise(layer: nn.Linear, neuron: LIF, x: Tensor) -> Tensor:
    """Largest |u - threshold| of a layer that fires deterministically."""
    u = s = torch.zeros(x.shape[1], len(layer.weight), dtype=x.dtype)
    beta, threshold, found = neuron.beta.detach(), neuron.threshold.detach(), []
    for now in x:
        kept = u * (1 - s) if neuron.reset == "zero" else u
        u = beta * kept + layer(now).detach() - (threshold * s if neuron.reset == "subtract" else 0.0)
        if neuron.recurrent is not None:
            u = u + neuron.recurrent(s).detach()
        s = (u > threshold).to(x.dtype)
        found.append((u - threshold).abs().max())
    return torch.stack(found).max()


def predict(
    layers: list,
    readout: nn.Linear,
    records: list[dict],
    error: Tensor,
    estimator: ULR,
    state: dict,
    wrong: str,
    projected: bool,
) -> list[Tensor]:
    """a [T, B, N] of each layer of one copy, the last layer first: direct credit, learned feedback from the
    output error e and from the next layer's credit (of every time step by itself, or projected on functions of
    time), and what a spike does through its own neuron's reset and its layer's recurrent weights."""
    steps = len(records[0]["s"])
    q = waves(getattr(estimator.credit, "time_functions", 8), steps)
    learned, predictions, downstream = state["feedback"], [], None
    maps = learned["layers"]
    if estimator.maps != "learned":
        maps = {f"{a[2]} -> {b[2]}": b[1].weight.detach().T for a, b in itertools.pairwise(layers)}
        maps |= {f"{r[2]} -> {r[2]}": r[3].recurrent.weight.detach().T for r in layers if r[3].recurrent is not None}
    for (_, _, site, neuron), record in reversed(list(zip(layers, records, strict=True))):
        a = torch.zeros_like(record["s"])
        if downstream is None:
            a = a + error @ readout.weight.detach() / steps
        if site in learned["outputs"]:
            a = a + torch.einsum("rt,rno,bo->tbn", q, learned["outputs"][site][: len(q)].cpu(), error)
        for edge, matrix in maps.items():
            if edge.split(" -> ")[0] == site and edge != f"{site} -> {site}":
                matrix = matrix.cpu() * (0 if wrong == "next layer left out" else 1)
                if projected != (wrong == "the other resolution in time"):
                    mean = torch.einsum("rt,tbm->rbm", q, downstream) / steps
                    a = a + torch.einsum("rt,nm,rbm->tbn", q, matrix, mean)
                else:
                    shifted = downstream.roll(1, 0) if wrong == "credit of another step" else downstream
                    a = a + torch.stack([g @ matrix.T for g in shifted])
        beta, threshold, total = neuron.beta.detach(), neuron.threshold.detach(), []
        g, currents = torch.zeros_like(a[0]), []
        own = maps.get(f"{site} -> {site}")
        for t in reversed(range(steps)):
            through = {"subtract": -threshold, "zero": -beta * record["u"][t], "none": 0.0}[neuron.reset]
            kept = beta * (1 - record["s"][t]) if neuron.reset == "zero" else beta
            total.insert(0, a[t] + (0.0 if wrong == "own reset left out" else through * g))
            if own is not None and wrong != "recurrent weights left out":
                total[0] = total[0] + g @ own.cpu().T
            g = total[0] * record["response"][t] + kept * g
            currents.insert(0, g)
        predictions.insert(0, torch.stack(total))
        downstream = torch.stack(currents)
    return predictions


def layers_of(model: nn.Sequential) -> list[tuple[str, nn.Linear, str, LIF]]:
    return [(f"{i}", model[i], f"{i + 1}", model[i + 1]) for i in range(0, len(model) - 2, 2)]


def copies_by_hand(
    model: nn.Sequential, estimator: ULR, state: dict, copies: int, x: Tensor, wrong: str = ""
) -> list[list[dict]]:
    """What each layer of each copy does in the step that `state` comes before."""
    group, steps, runs = estimator.sampling.group, len(x), []
    known = {name: value.cpu() for name, value in state["farthest"].items()}
    for c in range(copies):
        here, records = x, []
        for site, (_, layer, name, neuron) in enumerate(layers_of(model)):
            stream = torch.full((x.shape[1],), c // group, dtype=torch.int32)
            mirrored = torch.full((x.shape[1],), group == 2 and c % 2 == 1)
            sample = torch.arange(x.shape[1], dtype=torch.int32)
            noise = Noise(SEED, state["step"], sample, stream, mirrored)
            uniform = noise.uniform(site, 0, steps, torch.Size([layer.out_features]), x.dtype)
            progress = state["step"] / TOTAL
            if name not in known and estimator.firing.scale is None:  # measured before the first step, once
                known[name] = distance_without_noise(layer, neuron, here)
            about = estimator.firing, progress, known.get(name)
            records.append(simulate(layer, neuron, *about, here, uniform, wrong))
            here = records[-1]["s"]
        runs.append(records)
    return runs


def by_hand(
    model: nn.Sequential,
    estimator: ULR,
    state: dict,
    copies: int,
    x: Tensor,
    y: Tensor,
    wrong: str = "",
    projected: bool = False,
) -> dict[str, Tensor]:
    """The gradient of one step of a net of [Linear, LIF]..., TimeAverage, Linear under cross-entropy."""
    layers, readout, last = layers_of(model), model[-1], str(len(model) - 1)
    group = estimator.sampling.group
    runs = copies_by_hand(model, estimator, state, copies, x, wrong)
    losses, errors, means = [], [], []
    for records in runs:
        mean = records[-1]["s"].mean(0)
        outputs = mean @ readout.weight.detach().T + readout.bias.detach()
        rates = torch.exp(outputs) / torch.exp(outputs).sum(1, keepdim=True)
        losses.append(-torch.log(rates[torch.arange(len(y)), y]))
        errors.append(rates - torch.eye(outputs.shape[1], dtype=x.dtype)[y])
        means.append(mean)

    predictions = [
        predict(layers, readout, runs[c], errors[c], estimator, state, wrong, projected) for c in range(copies)
    ]
    gradient = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    share = 1 / (copies * x.shape[1])
    for c in range(copies):
        others = [o for o in range(copies) if o // group != c // group]
        if wrong == "partner as baseline":
            b = losses[c ^ 1]
        elif others:
            b = sum(losses[o] for o in others) / len(others)
        else:
            b = 0.0 if state["mean_loss"] is None else state["mean_loss"]
        signal = losses[c] - b
        sources = {
            "feedback": [c],
            "residual": [c] if wrong == "own copy's prediction" else others,
            "global": [],
        }
        sources = sources[estimator.credit.name]
        credits = []
        for index, record in enumerate(runs[c]):
            a = sum(predictions[o][index] for o in sources) / len(sources) if sources else 0 * record["s"]
            signal = signal - (a * (record["s"] - record["p"])).sum((0, 2))
            credits.append(a)
        for index, (name, _, site, neuron) in enumerate(layers):
            record = runs[c][index]
            slope = record["response" if estimator.credit.name == "feedback" else "slope"]
            credit = credits[index] * slope if wrong != "no a p'" else 0.0
            if estimator.credit.name != "feedback":
                credit = credit + signal[None, :, None] * record["score"]
            gradient[f"{name}.weight"] += torch.einsum("tbn,tbnj->nj", credit, record["∂weight"]) * share
            gradient[f"{name}.bias"] += (credit * record["∂bias"]).sum((0, 1)) * share
            gradient[f"{site}.beta"] += (credit * record["∂beta"]).sum() * share
            gradient[f"{site}.threshold"] += (credit * record["∂threshold"]).sum() * share
            if neuron.recurrent is not None:
                recurrent = torch.einsum("tbn,tbnj->nj", credit, record["∂recurrent"])
                gradient[f"{site}.recurrent.weight"] += recurrent * share
        gradient[f"{last}.weight"] += errors[c].T @ means[c] * share
        gradient[f"{last}.bias"] += errors[c].sum(0) * share
    return gradient


# -- agreement with the same noise -------------------------------------------------------------------------


def net(reset: str, recurrent: bool, widths: tuple[int, ...] = (4, 4)) -> nn.Sequential:
    torch.manual_seed(5)
    modules: list[nn.Module] = []
    for index, (before, width) in enumerate(zip((3, *widths), widths, strict=False)):
        modules.append(linear(before, width))
        kind = {
            "beta": 0.8 - 0.1 * index,
            "threshold": 0.9,
            "reset": reset,
            "learn_beta": True,
            "learn_threshold": True,
        }
        modules.append(RecurrentLIF(width, **kind) if recurrent else LIF(**kind))
    model = nn.Sequential(*modules, TimeAverage(), linear(widths[-1], 3, 1.5)).double()
    for module in model:
        if reset == "none" and isinstance(module, nn.Linear):
            module.weight.data *= 0.4  # membranes only grow
        if getattr(module, "recurrent", None) is not None:
            nn.init.normal_(module.recurrent.weight, 0.0, 0.6)
    return model


CONFIGURATIONS = {
    "global, one copy": (ULR(credit="global", copies=1), "sign of the score"),
    "global, one pair": (ULR(credit="global", copies=2), "partner as baseline"),
    "global, two pairs": (ULR(credit="global", copies=4), "partner as baseline"),
    "global, three copies": (
        ULR(credit="global", copies=3, antithetic=False),
        "spike in place of innovation",
    ),
    "residual, two pairs": (ULR(credit=Residual(refresh=1), maps="learned", copies=4), "own copy's prediction"),
    "residual, two copies": (
        ULR(credit="residual", maps="learned", copies=2, antithetic=False),
        "own copy's prediction",
    ),
    "residual, without a p'": (ULR(credit="residual", maps="learned", copies=4, antithetic=False), "no a p'"),
    "feedback": (ULR(credit=Feedback(refresh=4), maps="learned"), "missing 1/scale"),
    "feedback, refreshed": (ULR(credit=Feedback(refresh=1, time_functions=3), maps="learned"), "missing 1/scale"),
    "feedback through resets": (ULR(credit=Feedback(refresh=2), maps="learned"), "own reset left out"),
    "feedback through recurrent weights": (ULR(credit="feedback", maps="learned"), "recurrent weights left out"),
    "feedback, four copies": (
        ULR(credit=Feedback(time_functions=1), maps="learned", copies=4),
        "no leak in the trace",
    ),
    "feedback between layers": (
        ULR(credit=Feedback(time_functions=2), maps="learned"),
        "the other resolution in time",
    ),
    "feedback from each step": (ULR(credit=Feedback(time_functions=2), maps="learned"), "credit of another step"),
    "residual, exact maps": (ULR(credit="residual", copies=4), "own copy's prediction"),
    "residual, exact maps, two copies": (ULR(credit="residual", copies=2, antithetic=False), "no a p'"),
    "exact maps": (ULR(credit="feedback"), "next layer left out"),
    "exact maps, secants": (ULR(credit="feedback"), "slopes in place of secants"),
    "exact maps, resets": (ULR(credit="feedback"), "own reset left out"),
    "exact maps, recurrent weights": (ULR(credit="feedback", copies=2), "recurrent weights left out"),
}


def distance(gradient: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest entry of its parameter."""
    assert gradient.keys() == expected.keys()
    worst = 0.0
    for name, value in expected.items():
        worst = max(worst, float((gradient[name] - value).abs().max() / value.abs().max().clamp_min(1e-12)))
    return worst


def agreement(
    model: nn.Sequential, estimator: ULR, wrong: str, device: torch.device, projected: bool = False
) -> tuple[float, float]:
    """Distance to the formula by hand and to a wrong one: of the first step, and of later ones within the
    warm-up and after it."""
    x = torch.rand(STEPS, BATCH, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 1.5
    y = torch.tensor([0, 2, 1])
    reference = copy.deepcopy(model)
    model.to(device)
    right, far = 0.0, 0.0
    with attach(model, estimator, "ce_count", seed=SEED, total_steps=TOTAL) as ulr:
        for step in range(10):
            state = copy.deepcopy(ulr.state_dict())
            model.zero_grad()
            estimate = ulr.backward(x.to(device), y.to(device))
            if step not in (0, 5, 9):
                continue
            if estimator.credit.name == "feedback":  # there, what spikes do to the next layer is learned before its use
                state["feedback"]["layers"] = ulr.state_dict()["feedback"]["layers"]
            gradient = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
            for name, p in reference.named_parameters():
                gradient.setdefault(name, torch.zeros_like(p))
            copies = estimate.stats["copies"]
            arguments = reference, estimator, state, copies, x, y
            right = max(right, distance(gradient, by_hand(*arguments, projected=projected)))
            far = max(far, distance(gradient, by_hand(*arguments, wrong, projected)))
    return right, far


@pytest.mark.product
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("recurrent", [False, True], ids=["feed-forward", "recurrent"])
@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
def test_same_noise_agrees_with_the_formula_by_hand(reset, recurrent, configuration, device):
    estimator, wrong = CONFIGURATIONS[configuration]
    if not recurrent and wrong == "recurrent weights left out":
        wrong = "own reset left out"
    if reset == "none" and wrong == "own reset left out":
        wrong = "missing 1/scale"
    firing = [Logistic(0.4), Gaussian(0.5), RELATIVE][len(configuration) % 3]
    estimator = ULR(**{**estimator.__dict__, "firing": firing})
    right, far = agreement(net(reset, recurrent), estimator, wrong, device)
    assert right < 1e-9, f"differs by {right:.1e}"
    assert far > 1e-3, f"{wrong} goes unnoticed"


@pytest.mark.parametrize("credit", ["feedback", "residual"])
@pytest.mark.parametrize("recurrent", [False, True], ids=["feed-forward", "recurrent"])
@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
def test_credit_between_wide_layers_is_projected_on_functions_of_time(reset, recurrent, credit, device):
    kind = (Feedback if credit == "feedback" else Residual)(time_functions=2, limits=FeedbackLimits(exact_in_time=0))
    estimator = ULR(credit=kind, maps="learned", firing=Logistic(0.4))
    wrong = "the other resolution in time"
    right, far = agreement(net(reset, recurrent), estimator, wrong, device, projected=True)
    assert right < 1e-9, f"differs by {right:.1e}"
    assert far > 1e-3, f"{wrong} goes unnoticed"


@pytest.mark.parametrize("credit", ["global", "feedback", "residual"])
def test_traces_by_hand_notice_resets_leaks_and_shifts(credit, device):
    estimator = ULR(credit=credit, maps="learned", firing=Gaussian(0.5))
    for reset, wrong in [("zero", "no reset in the trace"), ("none", "no leak in the trace")]:
        right, far = agreement(net(reset, False, (4,)), estimator, wrong, device)
        assert right < 1e-9 and far > 1e-3, (reset, wrong, right, far)
    right, far = agreement(net("subtract", True, (4,)), estimator, "recurrent input not shifted", device)
    assert right < 1e-9 and far > 1e-3, (right, far)


# -- one refresh of the feedback, by hand ------------------------------------------------------------------


def responses(layers: list, records: list[dict], matrices: dict[str, Tensor], wrong: str) -> list[Tensor]:
    """e_t = ε_t + p'_t δu_t of every layer, with δu_t = beta k_{t-1} δu_{t-1} + h_{t-1} e_{t-1} + δJ_t, where
    δJ_t = C^T e_t comes from the layer before, C^T e_{t-1} by the layer's own recurrent weights."""
    found: list[Tensor] = []
    before = None
    for (_, _, site, neuron), record in zip(layers, records, strict=True):
        own, arriving = (matrices.get(f"{source} -> {site}") for source in (site, before))
        beta, threshold = neuron.beta.detach(), neuron.threshold.detach()
        innovation = record["s"] - record["p"]
        moved, carried = [], []
        for t in range(len(innovation)):
            now = torch.zeros_like(innovation[0])
            if t > 0:
                spike, u = record["s"][t - 1], record["u"][t - 1]
                now = now + beta * (1 - spike if neuron.reset == "zero" else 1) * moved[t - 1]
                through = {"subtract": -threshold, "zero": -beta * u, "none": 0.0}[neuron.reset]
                now = now + (0.0 if wrong == "own reset counted twice" else through * carried[t - 1])
                if own is not None and wrong != "path by recurrent weights counted twice":
                    now = now + carried[t - 1] @ own
            if arriving is not None and wrong != "path by the next layer counted twice":
                now = now + found[-1][t] @ arriving
            moved.append(now)
            carried.append(innovation[t] + record["response"][t] * now)
        found.append(torch.stack(carried))
        before = site
    return found


def refreshed(
    model: nn.Sequential, estimator: ULR, x: Tensor, y: Tensor, device: torch.device, earlier: int = 3
) -> tuple[dict, dict, list[list[dict]]]:
    """State before and after a step that others come before, and that step's pair of copies by hand."""
    reference = copy.deepcopy(model)
    with attach(model.to(device), estimator, "ce_count", seed=SEED, total_steps=TOTAL) as ulr:
        for _ in range(earlier):
            ulr.backward(x.to(device), y.to(device))
        before = copy.deepcopy(ulr.state_dict())
        assert ulr.backward(x.to(device), y.to(device)).stats["copies"] == 2
        after = copy.deepcopy(ulr.state_dict())
    return before, after, copies_by_hand(reference, estimator, before, 2, x)


def step_along(moved: Tensor, direction: Tensor) -> tuple[float, float]:
    """α of moved = α direction, and the part of `moved` that is not along it."""
    size = float((moved * direction).sum() / direction.square().sum())
    return size, float((moved - size * direction).norm() / moved.norm())


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
def test_a_refresh_of_the_feedback_from_outputs_by_hand(reset, device):
    """B += α mean z (Δo - direct effect of the responses - B^T of the responses of all layers)^T / v."""
    functions, batch = 3, 5
    model = net(reset, True, (4, 3))
    reference = copy.deepcopy(model)
    limits = FeedbackLimits(entries=15)  # the first layer is too wide for its recurrent weights
    kind = Feedback(time_functions=functions, limits=limits)
    estimator = ULR(credit=kind, maps="learned", firing=Logistic(0.4))
    x = torch.rand(STEPS, batch, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 1.5
    before, after, pair = refreshed(model, estimator, x, torch.tensor([0, 2, 1, 1, 0]), device)
    q, layers, weight = waves(functions, STEPS), layers_of(reference), reference[-1].weight.detach()
    plus, minus = (records[0]["s"] - records[0]["p"] for records in pair)
    z = torch.einsum("rt,tbn->rbn", q, plus - minus) / 2
    assert set(before["feedback"]["layers"]) == {"1 -> 3", "3 -> 3"} and set(before["feedback"]["outputs"]) == {"1"}
    # what spikes do to currents is learned first
    matrices = {name: matrix.cpu() for name, matrix in after["feedback"]["layers"].items()}

    def off(wrong: str = "") -> tuple[float, float]:
        left = []
        for records in pair:
            carried = responses(layers, records, matrices, wrong)
            rest = records[-1]["s"].mean(0) @ weight.T
            rest = rest - (0 if wrong == "direct effect left out" else carried[-1].mean(0) @ weight.T)
            if wrong != "predictions left out":
                moved = carried[0]
                if wrong == "predictions from bare innovations":
                    moved = records[0]["s"] - records[0]["p"]
                rest = rest - torch.einsum("rt,tbn,rno->bo", q, moved, before["feedback"]["outputs"]["1"].cpu())
            left.append(rest)
        unexplained = (left[0] - left[1]) / 2
        direction = torch.einsum("rbn,bo->rno", z, unexplained) / batch / z.square().mean((1, 2), keepdim=True)
        moved = (after["feedback"]["outputs"]["1"] - before["feedback"]["outputs"]["1"]).cpu()
        return step_along(moved, direction)

    size, aside = off()
    assert aside < 1e-9
    assert size == pytest.approx(estimator.credit.rate * batch / (4 * functions))
    assert off("predictions left out")[1] > 1e-3
    assert off("direct effect left out")[1] > 1e-3
    assert off("path by the next layer counted twice")[1] > 1e-3
    assert off("path by recurrent weights counted twice")[1] > 1e-3
    if reset != "none":
        assert off("predictions from bare innovations")[1] > 1e-3
        assert off("own reset counted twice")[1] > 1e-3


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
def test_learning_what_spikes_do_to_currents_by_hand(reset, device):
    """C += η (Z^T Z + ridge)^-1 Z^T (ΔJ - Z C), Z and ΔJ the deviations of spikes and currents from their means over
    the samples, a row for each sample and time step; from three quarters of the rows, η by the last quarter. For a
    layer's own recurrent current, Z are the spikes of the step before."""
    batch, y = 16, torch.arange(16) % 3
    model = net(reset, True)
    x = torch.rand(STEPS, batch, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 1.5
    estimator, reference = ULR(credit="feedback", maps="learned", firing=Logistic(0.4)), copy.deepcopy(model)
    with attach(model.to(device), estimator, "ce_count", seed=SEED, total_steps=TOTAL) as ulr:
        ulr.backward(x.to(device), y.to(device))
        before = copy.deepcopy(ulr.state_dict())
        assert ulr.backward(x.to(device), y.to(device)).stats["copies"] == 1
        after = ulr.state_dict()["feedback"]["layers"]
    ((one, two),) = copies_by_hand(reference, estimator, before, 1, x)
    edges = {
        "1 -> 1": (one, one["fed_back"], reference[1].recurrent),
        "1 -> 3": (one, two["current"], reference[2]),
        "3 -> 3": (two, two["fed_back"], reference[3].recurrent),
    }
    assert set(after) == set(edges)
    for name, (source, current, layer) in edges.items():
        learned = before["feedback"]["layers"][name].cpu()
        moved = after[name].cpu() - learned

        by_hand = partial(ridge_by_hand, source, current, learned, name != "1 -> 3")
        torch.testing.assert_close(by_hand(), moved, rtol=0, atol=1e-9)
        wrongs = ["means left in", "prediction left out", "all rows", "no ridge", "innovations"]
        for wrong in wrongs + ["of the same step"] * (name != "1 -> 3"):
            assert (by_hand(wrong) - moved).norm() > 1e-4 * moved.norm(), (name, wrong)
        expected = layer.weight.detach().T
        assert (learned + moved - expected).norm() < (learned - expected).norm()


def ridge_by_hand(source: dict, current: Tensor, learned: Tensor, later: bool, wrong: str = "") -> Tensor:
    """The step of C from a layer's record and a current [T, B, N], by least squares with rows for the ridge."""
    drawn = source["s"] - (source["p"] if wrong == "innovations" else 0)
    if later and wrong != "of the same step":
        drawn = torch.cat([torch.zeros_like(drawn[:1]), drawn[:-1]])
    z, change = (a if wrong == "means left in" else a - a.mean(1, keepdim=True) for a in (drawn, current))
    left = change - (0 if wrong == "prediction left out" else z @ learned)
    z, left = (a.transpose(0, 1).flatten(0, 1) for a in (z, left))
    known = len(z) if wrong == "all rows" else 3 * len(z) // 4
    ridge = (0 if wrong == "no ridge" else feedback.RIDGE) * z[:known].square().sum(0).mean()
    padded = torch.cat([z[:known], ridge.sqrt() * torch.eye(z.shape[1], dtype=z.dtype)])
    zeros = torch.zeros(z.shape[1], left.shape[1], dtype=z.dtype)
    move = torch.linalg.lstsq(padded, torch.cat([left[:known], zeros])).solution
    if wrong == "all rows":
        return move
    effect = z[known:] @ move
    return move * min(max(float((effect * left[known:]).sum() / effect.square().sum()), 0.0), 1.0)


# -- feedback: its bias, and what it learns ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("maps", ["exact", "learned"])
@pytest.mark.parametrize("name", [name for name in CASES if name not in NO_GRADIENT])
def test_bias_of_feedback_is_bounded(name, maps, device):
    """Its mean, once the matrices are learned, is close to the exact gradient, not equal to it."""
    case = make(name)
    exact = case.exact()
    case.to(device)
    estimator = ULR(credit=Feedback(refresh=1), maps=maps, firing=case.firing)
    draws = case.draws(estimator, 1024, 32, warm_up=40).cpu()
    mean = draws.mean(0)
    spread = float((draws.std(0) / len(draws) ** 0.5).norm() / exact.norm())
    cosine = float(torch.nn.functional.cosine_similarity(mean, exact, dim=0))
    error = float((mean - exact).norm() / exact.norm())
    measured = f"cosine {cosine:.4f}, relative error {error:.3f} (standard error {spread:.3f})"
    print(f"bias of feedback, {name}: {measured}")
    assert cosine > 0.95 and error < 0.35


@pytest.mark.slow
@pytest.mark.parametrize("entries", [1 << 23, 1], ids=["small", "wide"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_feedback_counts_no_path_twice(seed, entries, device):
    """The first of two recurrent layers acts by its own recurrent weights and by the second layer: the gradients
    of its own parameters, which are small beside those of the readout, are those of both, each once."""
    torch.manual_seed(seed)
    case = CASES["two recurrent layers"]()
    exact = case.exact()
    case.to(device)
    firing = dataclasses.replace(case.firing, secants=0)
    estimator = ULR(credit=Feedback(refresh=1, limits=FeedbackLimits(entries=entries)), maps="learned", firing=firing)
    mean = case.draws(estimator, 1024, 32, warm_up=40).cpu().mean(0)
    first = slice(0, sum(p.numel() for module in case.model[:2] for p in module.parameters()))
    cosine = float(torch.nn.functional.cosine_similarity(mean[first], exact[first], dim=0))
    error = float((mean - exact)[first].norm() / exact[first].norm())
    print(f"bias of feedback, first of two recurrent layers: cosine {cosine:.4f}, relative error {error:.3f}")
    assert cosine > 0.95 and error < 0.35


def linear_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs @ torch.tensor([1.0, -2.0], dtype=outputs.dtype, device=outputs.device)


@pytest.mark.slow
@pytest.mark.parametrize("firing", [Logistic(0.4), Gaussian(0.5)], ids=["logistic", "gaussian"])
def test_direct_credit_of_a_linear_loss_is_exact(firing, device):
    torch.manual_seed(0)
    case = dense(LIF(0.8, reset="none"), firing=firing, loss=linear_loss)
    exact = case.exact()
    case.to(device)
    estimator = ULR(credit="feedback", firing=dataclasses.replace(firing, secants=0))
    draws = case.draws(estimator, 4096, 24)
    verdict = compare_means("exact direct credit", draws, exact)
    assert verdict.error <= 0.01 * exact.norm() and verdict.agrees, verdict
    with wrong_formula("no a p'"):
        draws = case.draws(estimator, 4096, 24)
    assert not compare_means("exact direct credit", draws, exact, spending=False).agrees


@pytest.mark.slow
def test_learned_feedback_converges_to_the_true_derivative(device):
    """Of the second layer's input current by the first layer's spikes: the weights between them."""
    case = make("two layers")
    case.to(device)
    expected = case.model[2].weight.detach().T
    errors = []
    with attach(case.model, ULR(credit=Feedback(refresh=1), maps="learned", firing=case.firing), case.loss) as ulr:
        for rounds in (2, 40):
            gradient_draws(ulr, case.batch(2048), case.parameters(), rounds)
            (learned,) = ulr.state_dict()["feedback"]["layers"].values()
            errors.append(float((learned - expected).norm() / expected.norm()))
    print(f"learned feedback: relative error {errors[0]:.2e} after 2 refreshes, {errors[1]:.2e} after 42")
    assert errors[1] < 0.01 and errors[1] <= errors[0]
