"""The counter-based uniforms, and the firing distributions drawn from them."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.statistics import chi_square, compare_means, frequency, uncorrelated
from ulr_snn import LIF, ULR, Gaussian, Logistic, TimeAverage, attach
from ulr_snn.noise.level import LEVELS, NoiseLevel
from ulr_snn.noise.random import Noise

FIRING = [Logistic(), Gaussian()]
NEURONS = torch.Size([64])


def rows(samples: int, stream: int = 0, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    sample = torch.arange(samples, dtype=torch.int32, device=device)
    return sample, torch.full_like(sample, stream)


def uniform(
    seed=0, step=0, site=0, samples=256, stream=0, first=0, steps=64, shape=NEURONS, device=None, **settings
) -> Tensor:
    """[steps, samples, *shape] in float64."""
    noise = Noise(seed, step, *rows(samples, stream, device), **settings)
    return noise.uniform(site, first, steps, shape, torch.float64)


# -- the uniforms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_uniforms_for_drives_of_half_precision_have_all_bits(dtype):
    noise = Noise(0, 0, *rows(256))
    uniforms = noise.uniform(0, 0, 64, NEURONS, dtype)
    assert uniforms.min() > 0 and uniforms.max() < 1
    assert torch.equal(uniforms, noise.uniform(0, 0, 64, NEURONS, torch.float32))
    assert noise.normal(0, 0, 64, NEURONS, dtype).isfinite().all()


@pytest.mark.slow
def test_uniforms_are_uniform(device):
    values = uniform(device=device).flatten().cpu()
    for bins, part in [(256, values), (1024, values), (256, values * 256 % 1), (256, values * 2**15 % 1)]:
        counts = torch.histc(part, bins, 0, 1).double()
        verdict = chi_square("noise", counts, torch.full_like(counts, len(part) / bins))
        assert verdict.agrees, verdict
    skewed = torch.histc(values**1.03, 256, 0, 1).double()
    assert not chi_square("noise", skewed, torch.full_like(skewed, len(values) / 256)).agrees


@pytest.mark.slow
def test_pairs_of_neighbours_fill_the_square(device):
    values = uniform(device=device).cpu()
    for dim in range(3):
        a, b = values.narrow(dim, 0, values.shape[dim] - 1), values.narrow(dim, 1, values.shape[dim] - 1)
        cells = ((a * 16).long() * 16 + (b * 16).long()).flatten()
        counts = torch.bincount(cells, minlength=256).double()
        assert chi_square("noise", counts, torch.full_like(counts, len(cells) / 256)).agrees, dim


SEEDS = [0, 1, 2, 12345, 2**31, 2**40 + 1, -1]


@pytest.mark.slow
def test_draws_are_uncorrelated_in_every_direction(device):
    values = uniform(device=device)
    for dim, lags in [(0, (1, 2, 7, 32)), (1, (1, 2, 16, 128)), (2, (1, 2, 8, 32))]:
        for lag in lags:
            length = values.shape[dim] - lag
            pair = values.narrow(dim, 0, length), values.narrow(dim, lag, length)
            assert uncorrelated("noise", *pair).agrees, (dim, lag)
    others = {f"seed {seed}": uniform(seed=seed, device=device) for seed in SEEDS[1:]}
    others |= {f"step {step}": uniform(step=step, device=device) for step in (1, 2, 1000)}
    others |= {f"site {site}": uniform(site=site, device=device) for site in (1, 2, 1 << 20)}
    others |= {f"stream {stream}": uniform(stream=stream, device=device) for stream in (1, 2, 3, 64)}
    others |= {f"swapped {a} {b}": uniform(a, b, device=device) for a, b in ((1, 2), (2, 1))}
    others["first step"] = uniform(first=64, device=device)
    names = list(others)
    for name, other in others.items():
        assert uncorrelated("noise", values, other).agrees, name
        # the neighbours in one direction that another key could have been confused with
        assert uncorrelated("noise", values[1:], other[:-1]).agrees, name
        assert uncorrelated("noise", values[:, 1:], other[:, :-1]).agrees, name
    for one, two in pairwise(names):
        assert uncorrelated("noise", others[one], others[two]).agrees, (one, two)
    assert not uncorrelated("noise", values, 0.9 * values + 0.1 * others["seed 1"]).agrees


@pytest.mark.slow
def test_a_layers_total_has_the_variance_of_independent_draws(device):
    """Weak dependence of many neurons (or times, or samples) shows in sums long before it shows in pairs."""
    values = (uniform(samples=512, steps=64, device=device) - 0.5) * math.sqrt(12)
    for dims in [(0,), (1,), (2,), (0, 2)]:
        sums = values.sum(dims) / math.prod(values.shape[d] for d in dims) ** 0.5
        draws = (sums.flatten() ** 2).view(64, -1).mean(1, keepdim=True)
        assert compare_means("noise", draws, torch.ones(1)).agrees, dims


def test_keys_change_the_draws():
    base = uniform(samples=4, steps=3)
    keys = [
        {"seed": 1},
        {"step": 1},
        {"site": 1},
        {"stream": 1},
        {"first": 3},
        {"seed": 2**40},
        {"seed": 2**63},
    ]
    for key in keys:
        assert (uniform(samples=4, steps=3, **key) != base).float().mean() > 0.99, key


def test_values_lie_strictly_within_the_unit_interval(device):
    for dtype in (torch.float32, torch.float64):
        for mirror in (False, True):
            mirrored = torch.full((256,), mirror, device=device)
            noise = Noise(3, 0, *rows(256, device=device), mirrored)
            values = noise.uniform(0, 0, 32, NEURONS, dtype)
            assert values.min() > 0 and values.max() < 1
    # the extreme bit patterns, too
    extremes = torch.tensor([0, 2**23 - 1], dtype=torch.float32).add(0.5).mul(2.0**-23)
    assert extremes.min() > 0 and extremes.max() < 1 and (1 - extremes).min() > 0 and (1 - extremes).max() < 1


def test_float32_and_float64_are_the_same_numbers(device):
    mirrored = torch.arange(8, device=device) % 2 == 1
    noise = Noise(3, 4, *rows(8, device=device), mirrored)
    single, double = (noise.uniform(2, 0, 50, NEURONS, dtype) for dtype in (torch.float32, torch.float64))
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    assert torch.equal(single.double(), double)


def test_mirrored_rows_see_one_minus_the_uniform(device):
    plain = uniform(samples=6, device=device)
    mirrored = torch.tensor([False, True] * 3, device=device)
    both = uniform(samples=6, device=device, mirrored=mirrored)
    assert torch.equal(both[:, ::2], plain[:, ::2])
    assert torch.equal(both[:, 1::2], 1 - plain[:, 1::2])


def test_the_same_numbers_in_whatever_chunk_order_or_shape(device):
    whole = uniform(samples=40, steps=30, shape=torch.Size([24]), device=device)
    parts = [uniform(samples=40, first=f, steps=10, shape=torch.Size([24]), device=device) for f in (0, 10, 20)]
    assert torch.equal(torch.cat(parts), whole)
    folded = uniform(samples=40, steps=30, shape=torch.Size([2, 3, 4]), device=device)
    assert torch.equal(folded.flatten(2), whole)
    sample, stream = rows(40, device=device)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).to(device)
    shuffled = Noise(0, 0, sample[order], stream).uniform(0, 0, 30, torch.Size([24]), torch.float64)
    assert torch.equal(shuffled, whole[:, order])
    wide = {"samples": 3, "shape": torch.Size([200_000]), "device": device}  # beyond one internal chunk
    assert torch.equal(uniform(steps=3, **wide)[2:], uniform(first=2, steps=1, **wide))


def test_devices_agree(device):
    assert torch.equal(uniform(samples=9, steps=9, device=device).cpu(), uniform(samples=9, steps=9))


def test_a_known_value_never_changes():
    """A change of the generator would break every stored seed; if it is meant, say so in the change log."""
    values = uniform(seed=1, step=2, site=3, samples=2, steps=1, shape=torch.Size([2])).flatten()
    torch.testing.assert_close(values, torch.tensor(KNOWN, dtype=torch.float64), rtol=0, atol=0)


KNOWN = [0.6769616007804871, 0.3633790612220764, 0.360309898853302, 0.3567604422569275]


# -- the firing distributions ------------------------------------------------------------------------------


def log_probability(firing, spikes: Tensor, x: Tensor) -> Tensor:
    """log P(spikes), precise in both tails."""
    signed = (2 * spikes - 1) * x
    return torch.special.log_ndtr(signed) if isinstance(firing, Gaussian) else torch.nn.functional.logsigmoid(signed)


@pytest.mark.parametrize("firing", FIRING, ids=["logistic", "gaussian"])
def test_slope_and_score_are_the_derivatives(firing, device):
    x = torch.linspace(-6, 6, 241, dtype=torch.float64, device=device)
    h = 1e-5
    slope = (firing.probability(x + h) - firing.probability(x - h)) / (2 * h)
    torch.testing.assert_close(firing.slope(x), slope, rtol=1e-6, atol=1e-10)
    for value in (0.0, 1.0):
        s = torch.full_like(x, value)
        score = (log_probability(firing, s, x + h) - log_probability(firing, s, x - h)) / (2 * h)
        torch.testing.assert_close(firing.score(s, x), score, rtol=1e-6, atol=1e-8)
        p = firing.probability(x)
        quotient = (s - p) * firing.slope(x) / (p * (1 - p))
        torch.testing.assert_close(firing.score(s, x), quotient, rtol=1e-6, atol=1e-8)
    # E[score] = 0 and E[score ε] = p'
    p, one, zero = firing.probability(x), torch.ones_like(x), torch.zeros_like(x)
    mean = p * firing.score(one, x) + (1 - p) * firing.score(zero, x)
    torch.testing.assert_close(mean, zero, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("firing", FIRING, ids=["logistic", "gaussian"])
def test_the_tails_stay_finite(firing, dtype, device):
    x = torch.tensor([-1000.0, -100, -40, -12, 12, 40, 100, 1000], dtype=dtype, device=device)
    for value in (0.0, 1.0):
        score = firing.score(torch.full_like(x, value), x)
        assert torch.isfinite(score).all()
        surprised = (x < 0) == (value == 1)
        # against all odds: 1 for the logistic; for the Gaussian the inverse Mills ratio, |x| + 1/|x| - ...
        expected = torch.ones_like(x) if isinstance(firing, Logistic) else x.abs() + 1 / x.abs()
        rounding = torch.finfo(dtype).eps * x[surprised] ** 2 + 1e-3  # of x²/2, whose exponential is taken
        assert ((score[surprised].abs() / expected[surprised] - 1).abs() < rounding).all()
        assert (score[surprised].sign() == 2 * value - 1).all()
        assert score[~surprised].abs().max() < 1e-4
    assert torch.isfinite(firing.slope(x)).all() and (firing.slope(x) >= 0).all()
    p = firing.probability(x)
    assert ((p >= 0) & (p <= 1)).all()


# -- the noise level ---------------------------------------------------------------------------------------


def never() -> float:
    raise AssertionError("there is nothing to calibrate")


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_a_given_scale_is_constant(progress):
    threshold = torch.tensor([0.5, 2.0], requires_grad=True)
    level = NoiseLevel(Gaussian(0.3), progress)
    scale = level.scale("a", threshold, never)
    assert scale.tolist() == pytest.approx([0.3, 0.3]) and not scale.requires_grad and level.starts == {}


def test_the_last_scale_follows_the_threshold():
    threshold = torch.tensor([0.5, 2.0], requires_grad=True)
    for progress in (1.0, 1.5):
        level = NoiseLevel(Logistic(end=0.06), progress)
        scale = level.scale("a", threshold, never)
        torch.testing.assert_close(scale.detach(), 0.06 * threshold.detach())
        assert torch.autograd.grad(scale.sum(), threshold)[0].tolist() == pytest.approx([0.06, 0.06])
        assert level.starts == {}


@pytest.mark.parametrize("firing", [Logistic(start=0.4, end=0.05), Gaussian(start=0.4, end=0.05)])
def test_the_scale_falls_geometrically_from_the_calibrated_start_to_the_end(firing):
    threshold = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)  # mean 1
    start = 0.4 * 0.7
    level = NoiseLevel(firing, 0.0)
    for progress in (0.0, 0.25, 0.5, 0.75, 0.999, 1.0):
        level.progress = progress
        scale = level.scale("a", threshold, lambda: 0.7)
        expected = math.exp((1 - progress) * math.log(start) + progress * math.log(0.05))
        torch.testing.assert_close(scale.detach(), expected * threshold.detach(), rtol=1e-12, atol=0)
        slope = torch.autograd.grad(scale.sum(), threshold)[0]
        assert slope.tolist() == pytest.approx([expected, expected])
    assert level.starts == {"a": pytest.approx(start)}


LOW, HIGH = LEVELS


@pytest.mark.parametrize(
    ("spread", "start"),
    [(0.0, LOW), (0.1, LOW), (10 * LOW + 0.2, LOW + 0.02), (4.0, 0.8), (60.0, HIGH), (math.inf, HIGH)],
)
def test_a_calibrated_start_stays_within_bounds(spread, start):
    """0.2 d max(1, d) with d the spread over the threshold, within bounds; and measured once a site."""
    assert 0 < LOW < 0.3 and 0.8 < HIGH < 100
    threshold = torch.full((3,), 2.0)
    level = NoiseLevel(Logistic(start=0.2), 0.0)
    scale = level.scale("a", threshold, lambda: spread)
    assert level.starts == {"a": pytest.approx(start)} and scale.tolist() == pytest.approx([2 * start] * 3)
    assert torch.equal(level.scale("a", threshold, never), scale)
    level.scale("b", threshold, lambda: 3.0)
    assert level.starts == {"a": pytest.approx(start), "b": pytest.approx(0.45)}


CALIBRATED = ULR(credit="global", copies=1, firing=Logistic(start=0.4, end=0.06))


THRESHOLD = 0.7


class Membranes:
    """A net of one layer, whose membranes under deterministic firing are known."""

    beta = 0.5

    def __init__(self, threshold: Tensor | float = 1.0, reset: str = "subtract") -> None:
        self.threshold, self.reset = torch.as_tensor(threshold, dtype=torch.float64), reset
        self.model = torch.nn.Sequential(LIF(self.beta, threshold, reset)).double()
        generator = torch.Generator().manual_seed(0)
        self.x = 1.6 * torch.rand(6, 40, 3, dtype=torch.float64, generator=generator)
        self.y = torch.arange(40) % 3

    def spread(self, lengths: Tensor | None = None) -> float:
        u, membranes = torch.zeros(40, 3, dtype=torch.float64), []
        for t, current in enumerate(self.x):
            fired = u > self.threshold
            u = self.beta * u * ~fired + current if self.reset == "zero" else self.beta * u + current
            u = u - self.threshold * fired if self.reset == "subtract" else u
            membranes.append(u if lengths is None else u[lengths > t])
        return float(torch.cat(membranes).std(correction=0))

    def starts(self, x: Tensor | None = None, lengths: Tensor | None = None) -> dict[str, float]:
        with attach(self.model, CALIBRATED, lambda o, y: o.sum((0, 2))) as ulr:
            ulr.backward(self.x if x is None else x, self.y, lengths=lengths)
            return ulr.state_dict()["noise_starts"]


def start_of(d: float) -> float:
    return 0.4 * d * max(1.0, d)


@pytest.mark.parametrize("threshold", [0.6, 1.0, torch.tensor([0.3, 0.7, 1.1])], ids=["one", "high", "many"])
@pytest.mark.parametrize("reset", ["subtract", "zero"])
def test_the_start_is_calibrated_on_membranes_that_fire_deterministically(reset, threshold):
    net = Membranes(threshold, reset)
    expected = start_of(net.spread() / float(torch.as_tensor(threshold).mean()))
    assert LOW + 0.01 < expected < HIGH - 0.01
    assert net.starts() == {"0": pytest.approx(expected, rel=1e-6)}


def test_padding_has_no_part_in_the_calibration():
    net, lengths = Membranes(THRESHOLD), torch.arange(40) % 5 + 1
    expected = start_of(net.spread(lengths) / THRESHOLD)
    padded = net.x.clone()
    for sample, length in enumerate(lengths):
        padded[length:, sample] = 50.0
    assert LOW + 0.01 < expected < HIGH - 0.01
    assert net.starts(lengths=lengths) == {"0": pytest.approx(expected, rel=1e-6)}
    assert net.starts(padded, lengths) == net.starts(lengths=lengths)


def test_a_single_membrane_has_a_level_too():
    """One sample, one step, one neuron: there is no standard deviation."""
    model = torch.nn.Sequential(LIF())
    with attach(model, ULR(credit="global", copies=1), lambda o, y: o.sum((0, 2))) as ulr:
        ulr.backward(torch.ones(1, 1, 1), torch.zeros(1, dtype=torch.long))
        (start,) = ulr.state_dict()["noise_starts"].values()
    assert LOW <= start <= HIGH


@pytest.mark.parametrize("total", [None, 5])
def test_attach_anneals_over_its_steps(total, monkeypatch):
    scales = []
    right = NoiseLevel.scale

    def scale(self, *arguments):
        scales.append(right(self, *arguments))
        return scales[-1]

    monkeypatch.setattr(NoiseLevel, "scale", scale)
    monkeypatch.setattr(NoiseLevel, "widen", lambda self, *arguments: None)  # see the next test
    net = Membranes(THRESHOLD)
    with attach(net.model, CALIBRATED, lambda o, y: o.sum((0, 2)), total_steps=total) as ulr:
        for _ in range(7):
            ulr.backward(net.x, net.y)
    start, end = start_of(net.spread() / THRESHOLD), 0.06
    progress = [0.5] * 7 if total is None else [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    expected = [THRESHOLD * start ** (1 - p) * end**p for p in progress]
    assert [float(s) for s in scales] == pytest.approx(expected, rel=1e-6)


def test_the_start_of_a_layer_that_began_at_rest_follows_its_membranes():
    level, threshold = NoiseLevel(CALIBRATED.firing, progress=0.05), torch.tensor(2.0)
    level.scale("a", threshold, lambda: 0.1)
    level.scale("b", threshold, lambda: 1.6)
    assert level.starts == {"a": LOW, "b": start_of(0.8)} and level.resting == {"a"}
    level.widen("a", threshold, lambda: 2.0)
    assert level.starts["a"] == pytest.approx(start_of(1.0))
    level.widen("a", threshold, lambda: 0.1)  # never back
    assert level.starts["a"] == pytest.approx(start_of(1.0))
    level.progress = 0.11
    level.widen("a", threshold, lambda: 50.0)
    assert level.starts["a"] == pytest.approx(start_of(1.0))
    level.progress = 0.1
    level.widen("a", threshold, lambda: 50.0)  # up to the threshold
    level.widen("b", threshold, lambda: 50.0)
    assert level.starts == {"a": 1.0, "b": start_of(0.8)}


def test_training_widens_the_start_of_a_layer_that_it_throws_about():
    torch.manual_seed(0)
    x, y = torch.rand(5, 8, 3), torch.arange(8) % 2
    for readout, expected in (((), 1.0), ((TimeAverage(), torch.nn.Linear(2, 2)), LOW)):
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), LIF(), *readout)
        with attach(model, total_steps=100) as ulr:
            ulr.backward(x, y)
            before = ulr.learner.level.starts["1"]
            with torch.no_grad():
                model[0].weight *= 50
            ulr.backward(x, y)
            assert before == pytest.approx(LOW) and ulr.learner.level.starts["1"] == pytest.approx(expected)


def test_starts_are_restored_with_the_state():
    net = Membranes(THRESHOLD)
    settings = {"estimator": CALIBRATED, "loss": lambda o, y: o.sum((0, 2))}
    with attach(net.model, **settings) as ulr:
        ulr.backward(net.x, net.y)
        state = ulr.state_dict()
        kept = dict(state["noise_starts"])
    with attach(net.model, **settings) as ulr:
        ulr.load_state_dict(state)
        ulr.backward(3 * net.x, net.y)
        assert ulr.state_dict()["noise_starts"] == kept == state["noise_starts"]
    with attach(net.model, **settings) as ulr:
        ulr.backward(3 * net.x, net.y)
        assert ulr.state_dict()["noise_starts"] != kept


# -- what is drawn -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("firing", [Logistic(0.3), Gaussian(0.3)], ids=["logistic", "gaussian"])
def test_neurons_fire_as_often_as_the_distribution_says(firing, copies, device):
    """Neurons without leak or reset see a constant drive: mirrored copies, too, fire with F(x) each."""
    drive = torch.linspace(-1.0, 1.0, 9, dtype=torch.float64, device=device)
    model = torch.nn.Sequential(LIF(beta=0.0, reset="none").double())
    samples, steps = 4000, 5
    x = (1 + drive).expand(steps, samples, 9)
    estimator = ULR(credit="global", copies=copies, firing=firing)
    with attach(model.to(device), estimator, lambda outputs, y: outputs.sum((0, 2)), seed=5) as ulr:
        outputs = ulr.backward(x, torch.zeros(samples, device=device, dtype=torch.long)).outputs
    p = firing.probability(drive / 0.3)
    for copy in outputs:
        hits = copy.sum((0, 1))
        assert frequency("firing frequency", hits.round().long(), samples * steps, p).agrees
        wrong = frequency("firing frequency", hits.round().long(), samples * steps, firing.probability(drive / 0.34))
        assert not wrong.agrees
