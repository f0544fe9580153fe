"""Tiny nets with exactly enumerated gradients, and named wrong formulas that have another one.

Each case is a net of the library and the same net written down for the enumeration. A batch that repeats one sample
thousands of times makes draws of its gradient cheap: noise is keyed by the sample's place in the batch.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy
import pytest
import torch
from torch import Tensor, nn

import ulr_snn.credit.formula
import ulr_snn.credit.kinds
import ulr_snn.model.neurons
import ulr_snn.noise.level
from tests.enumeration import Layer, exact_gradient, expected_bound_of_four, expected_bound_of_two, expected_loss
from tests.statistics import gradient_draws
from ulr_snn import LIF, ULR, CurrentNoise, Fold, Gaussian, LeakyReadout, Logistic, RecurrentLIF, TimeAverage, attach
from ulr_snn.losses.named import ce_rate
from ulr_snn.sites.records import CurrentRecord

TARGET = 1


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.logsumexp(1) - logits.gather(1, targets[:, None])[:, 0]


def count_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs.sum(0), targets)


def zero_one(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.detach().argmax(1) != targets).to(logits.dtype)


def python_rule(outputs: Tensor, targets: Tensor) -> Tensor:
    """Latency of the target's first spike, T where it is silent; in plain Python."""
    rows = outputs.detach().transpose(0, 1).tolist()
    first = [
        next((t for t, step in enumerate(row) if step[target] > 0), len(row))
        for row, target in zip(rows, targets.tolist(), strict=True)
    ]
    return torch.tensor(first, dtype=outputs.dtype, device=outputs.device)


def membrane_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared distance of every membrane from a wave over time, and the highest membrane."""
    wave = torch.linspace(0.2, 1.0, len(outputs), dtype=outputs.dtype, device=outputs.device).view(-1, 1, 1)
    return ((outputs - wave) ** 2).sum((0, 2)) + outputs.amax((0, 2))


@dataclass
class Case:
    """A net of the library, and the same net written down for the enumeration; they share parameters."""

    model: nn.Module
    layers: list[Layer]
    readout: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    x: Tensor  # [T, ...], one sample
    firing: ulr_snn.noise.level.Firing
    noise: dict[str, CurrentNoise] = field(default_factory=dict)  # at other sites
    named: str | None = None  # the loss by name, where it has one
    objective: Callable[[Tensor, Tensor], Tensor] = expected_loss  # of all patterns' probabilities and losses
    observe: Callable[[Tensor], Tensor] | None = None  # input of a step from earlier outputs, see `all_patterns`

    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())

    def exact(self) -> Tensor:
        def loss(outputs: Tensor) -> Tensor:
            rows = outputs.shape[1] if outputs.ndim == 3 else len(outputs)
            return self.loss(outputs, torch.full((rows,), TARGET))

        parameters = self.parameters()
        return exact_gradient(self.layers, self.readout, loss, self.x, parameters, self.objective, self.observe)

    def to(self, device: torch.device) -> "Case":
        """The library's net and its sample on the device; the enumeration's half stays behind."""
        self.model.to(device)
        self.x = self.x.to(device)
        return self

    def batch(self, samples: int) -> tuple[Tensor, Tensor]:
        x = self.x.unsqueeze(1).expand(-1, samples, *self.x.shape[1:])
        return x, torch.full((samples,), TARGET, device=x.device)

    def draws(
        self,
        estimator: ULR,
        samples: int,
        steps: int,
        warm_up: int = 0,
        seed: int = 0,
        enough: Callable[[Tensor], bool] | None = None,
    ) -> Tensor:
        rest = [name for name, _ in self.model.named_parameters()]  # weights without a site are not to be noised here
        estimator = dataclasses.replace(estimator, noise=self.noise | dict.fromkeys(rest))
        with attach(self.model, estimator, self.named or self.loss, seed=seed) as ulr:
            return gradient_draws(ulr, self.batch(samples), self.parameters(), steps, warm_up, enough)


def affine(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda x: x @ linear.weight.T + linear.bias


def linear(inputs: int, outputs: int, spread: float = 0.6, bias: float = 0.4) -> nn.Linear:
    """Weights that put membranes near the threshold."""
    layer = nn.Linear(inputs, outputs).double()
    nn.init.normal_(layer.weight, 0.3, spread)
    nn.init.normal_(layer.bias, bias, 0.1)
    return layer


def describe(neuron: LIF, current: Callable, shape: tuple[int, ...], firing: ulr_snn.noise.level.Firing) -> Layer:
    recurrent = neuron.recurrent.weight if neuron.recurrent is not None else None
    kind = "gaussian" if isinstance(firing, Gaussian) else "logistic"
    return Layer(current, shape, neuron.beta, neuron.threshold, neuron.reset, recurrent, kind, firing.scale)


def dense(
    neuron: LIF,
    hidden: int = 3,
    steps: int = 3,
    firing: ulr_snn.noise.level.Firing = Logistic(0.4),  # noqa: B008 (frozen)
    loss: Callable = cross_entropy,
) -> Case:
    first, last = linear(2, hidden), linear(hidden, 2, 1.5)
    neuron = neuron.double()
    return Case(
        nn.Sequential(first, neuron, TimeAverage(), last),
        [describe(neuron, affine(first), (hidden,), firing)],
        lambda spikes: affine(last)(spikes.mean(0)),
        loss,
        torch.rand(steps, 2, dtype=torch.float64),
        firing,
    )


def recurrent(reset: str) -> Case:
    neuron = RecurrentLIF(3, beta=0.8, reset=reset)
    nn.init.normal_(neuron.recurrent.weight, 0.0, 0.7)
    return dense(neuron)


def two_recurrent_layers() -> Case:
    """The first layer acts on the outputs through its own recurrent weights, and through the second layer."""
    firing = Logistic(0.5)
    a, b, last = linear(2, 2), linear(2, 2, 0.8), linear(2, 2, 1.5)
    one, two = RecurrentLIF(2, 0.8, 0.9).double(), RecurrentLIF(2, 0.7, 0.8).double()
    for neuron in (one, two):
        nn.init.normal_(neuron.recurrent.weight, 0.0, 0.7)
    return Case(
        nn.Sequential(a, one, b, two, TimeAverage(), last),
        [describe(one, affine(a), (2,), firing), describe(two, affine(b), (2,), firing)],
        lambda s: affine(last)(s.mean(0)),
        cross_entropy,
        torch.rand(3, 2, dtype=torch.float64),
        firing,
    )


def two_layers(reset: str, counts: bool = False, loss: Callable | None = None) -> Case:
    """2-2-2, and a linear readout; or the last layer's spikes as they are."""
    firing = Logistic(0.5)
    a, b, last = linear(2, 2), linear(2, 2, 0.8), linear(2, 2, 1.5)
    one, two = LIF(0.8, 0.9, reset).double(), LIF(0.7, 0.8, reset).double()
    layers = [describe(one, affine(a), (2,), firing), describe(two, affine(b), (2,), firing)]
    x = torch.rand(3, 2, dtype=torch.float64)
    if counts:
        return Case(nn.Sequential(a, one, b, two), layers, lambda s: s, loss or count_loss, x, firing)
    model = nn.Sequential(a, one, b, two, TimeAverage(), last)
    return Case(model, layers, lambda s: affine(last)(s.mean(0)), cross_entropy, x, firing)


class Pooled(nn.Module):
    def forward(self, spikes: Tensor) -> Tensor:
        return spikes.flatten(2)


def convolutional() -> Case:
    """Kernels shared by all positions: one row of four pixels, three neurons, two neurons."""
    firing = Logistic(0.5)
    a, b = (nn.Conv2d(1, 1, (1, 2)).double() for _ in range(2))
    for conv in (a, b):
        nn.init.normal_(conv.weight, 0.6, 0.3)
        nn.init.constant_(conv.bias, 0.3)
    one, two, last = LIF(0.8).double(), LIF(0.7, reset="zero").double(), linear(2, 2, 1.5)

    def slide(conv: nn.Conv2d) -> Callable[[Tensor], Tensor]:
        def current(x: Tensor) -> Tensor:
            (w0, w1), row = conv.weight.flatten(), x.flatten(1)
            return (w0 * row[:, :-1] + w1 * row[:, 1:] + conv.bias)[:, None, None]

        return current

    return Case(
        nn.Sequential(Fold(a), one, Fold(b), two, Pooled(), TimeAverage(), last),
        [describe(one, slide(a), (1, 1, 3), firing), describe(two, slide(b), (1, 1, 2), firing)],
        lambda spikes: affine(last)(spikes.flatten(2).mean(0)),
        cross_entropy,
        torch.rand(2, 1, 1, 4, dtype=torch.float64) + 0.3,
        firing,
    )


class Attention(nn.Module):
    """One head of self-attention over the neurons of a step, each a token of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Parameter(torch.tensor([1.0, -0.5])), nn.Parameter(torch.tensor([1.2, 0.3]))

    def forward(self, x: Tensor) -> Tensor:
        keys = x[..., None] * self.key[0] + self.key[1]
        weights = (keys * keys.transpose(-1, -2)).softmax(-1)
        return (weights @ (x[..., None] * self.value[0] + self.value[1]))[..., 0]


class ResidualSum(nn.Module):
    """x + linear(layer norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(2, eps=0.1), linear(2, 2, 0.8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


class Pool(nn.Module):
    """Mean over pairs of neurons, spread out again with a gain of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([1.5, 0.8]))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool1d(x.flatten(0, -2)[:, None], 2)[:, 0].unflatten(0, x.shape[:-1]) * self.gain


def between(module: nn.Module) -> Case:
    """2-2, a stateless module, 2 neurons, a linear readout. The enumeration calls the very same module: what
    it proves is how credit passes through."""
    firing = Logistic(0.5)
    a, module, last = linear(2, 2), module.double(), linear(2, 2, 1.5)
    one, two = LIF(0.8).double(), LIF(0.7, 0.6, "zero").double()
    return Case(
        nn.Sequential(a, one, module, two, TimeAverage(), last),
        [describe(one, affine(a), (2,), firing), describe(two, module, (2,), firing)],
        lambda spikes: affine(last)(spikes.mean(0)),
        cross_entropy,
        torch.rand(3, 2, dtype=torch.float64),
        firing,
    )


class Twice(nn.Sequential):
    """The same weights and neurons, two times one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


def shared() -> Case:
    firing, neuron = Logistic(0.5), LIF(0.8, learn_beta=True).double()
    once, last = linear(2, 2), linear(2, 2, 1.5)
    return Case(
        nn.Sequential(Twice(once, neuron), TimeAverage(), last),
        [describe(neuron, affine(once), (2,), firing)] * 2,
        lambda spikes: affine(last)(spikes.mean(0)),
        cross_entropy,
        torch.rand(3, 2, dtype=torch.float64),
        firing,
    )


def membranes() -> Case:
    """A loss on the membranes of a leaky readout, which also reaches its parameters without any spike."""
    firing = Logistic(0.4)
    first, last, neuron = linear(2, 3), linear(3, 2, 0.8), LIF(0.8).double()
    leaky = LeakyReadout(0.6, learn_beta=True).double()

    def readout(spikes: Tensor) -> Tensor:
        membrane, trace = 0.0, []
        for now in spikes:
            membrane = leaky.beta * membrane + affine(last)(now)
            trace.append(membrane)
        return torch.stack(trace)

    return Case(
        nn.Sequential(first, neuron, last, leaky),
        [describe(neuron, affine(first), (3,), firing)],
        readout,
        membrane_loss,
        torch.rand(3, 2, dtype=torch.float64),
        firing,
    )


# Calibrated to the lowest level there is, halfway to an end that makes it 0.12 of the threshold all along.
RELATIVE = Logistic(start=1e-9, end=0.12**2 / ulr_snn.noise.level.LEVELS[0])


def learnable(reset: str, scale: float | None) -> Case:
    thresholds = torch.tensor([0.8, 1.0, 1.3])
    neuron = LIF(torch.tensor([0.6, 0.8, 0.9]), thresholds, reset, learn_beta=True, learn_threshold=True)
    return dense(neuron, firing=RELATIVE if scale is None else Logistic(scale))


class Hard(nn.Module):
    """A rule without a derivative: 1 where the current is above 1. Under Gaussian noise on the current, that is a
    neuron without memory, with Gaussian threshold noise."""

    def forward(self, current: Tensor) -> Tensor:
        return torch.from_numpy((current.cpu().numpy() > 1).astype("float64")).to(current.device)


def black_box() -> Case:
    case = dense(LIF(0.0, reset="none"), firing=Gaussian(0.5))
    case.model[1], case.noise = Hard(), {"1": CurrentNoise(0.5)}
    return case


def black_box_then_neurons() -> Case:
    first, second, last, neuron = linear(2, 2), linear(2, 2, 0.8), linear(2, 2, 1.5), LIF(0.8).double()
    firing = Logistic(0.4)
    gradientless = LIF(0.0, reset="none").double()
    return Case(
        nn.Sequential(first, Hard(), second, neuron, TimeAverage(), last),
        [
            describe(gradientless, affine(first), (2,), Gaussian(0.5)),
            describe(neuron, affine(second), (2,), firing),
        ],
        lambda spikes: affine(last)(spikes.mean(0)),
        cross_entropy,
        torch.rand(3, 2, dtype=torch.float64),
        firing,
        {"1": CurrentNoise(0.5)},
    )


START = numpy.array([0.2, -0.1])


def moved(state: numpy.ndarray, right: numpy.ndarray) -> numpy.ndarray:
    """The next state [B, 2] of a small world that falls by itself and that an action [B] pushes."""
    position, speed = state.T
    speed = speed + 0.5 * position + 0.3 * (2 * right - 1)
    return numpy.stack([position + speed, speed], 1)


def played(right: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The state after the actions [T, B], [B, 2], and the reward of each step [T, B]. An episode is over when the
    position leaves its bounds. Later steps have no reward."""
    state, running, rewards = numpy.tile(START, (right.shape[1], 1)), numpy.ones(right.shape[1], bool), []
    for action in right:
        state = moved(state, action)
        rewards.append(running * (1 - 0.3 * state[:, 1] ** 2))
        running = running & (abs(state[:, 0]) < 0.5)
    return state, numpy.stack(rewards) if rewards else numpy.zeros_like(right)


class Playing(nn.Module):
    """Neurons of snnTorch that act on the small world and observe it: -> rewards [T, B, 1]."""

    def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
        super().__init__()
        snntorch = pytest.importorskip("snntorch")
        self.first, self.hidden = first, snntorch.Leaky(beta=0.8)
        self.second, self.action = second, snntorch.Leaky(beta=0.5, reset_mechanism="none")
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        state = numpy.tile(START, (x.shape[1], 1))
        hidden, action, taken = self.hidden.init_leaky(), self.action.init_leaky(), []
        for _ in x:
            spikes, hidden = self.hidden(self.first(torch.from_numpy(state).to(x)), hidden)
            right, action = self.action(self.second(spikes), action)
            taken.append(right[:, 0].detach().cpu().numpy())
            state = moved(state, taken[-1])
        return torch.from_numpy(played(numpy.stack(taken))[1][..., None]).to(x)


def closed_loop() -> Case:
    first, second = linear(2, 2, 1.0, 0.8), linear(2, 1, bias=0.8)
    layers = [
        Layer(affine(first), (2,), 0.8, 1.0, "subtract", scale=0.4),
        Layer(affine(second), (1,), 0.5, 1.0, "none", scale=0.4),
    ]
    return Case(
        Playing(first, second),
        layers,
        lambda spikes: torch.from_numpy(played(spikes[..., 0].numpy())[1][..., None]),
        lambda rewards, _: -rewards.sum((0, 2)),
        torch.zeros(4, 1, dtype=torch.float64),
        Logistic(0.4),
        named="negative_return",
        observe=lambda spikes: torch.from_numpy(played(spikes[..., 0].numpy())[0]),
    )


CASES: dict[str, Callable[[], Case]] = {
    "subtract": lambda: dense(LIF(0.8)),
    "zero": lambda: dense(LIF(0.8, reset="zero")),
    "none": lambda: dense(LIF(0.8, reset="none")),
    "recurrent subtract": lambda: recurrent("subtract"),
    "recurrent zero": lambda: recurrent("zero"),
    "two recurrent layers": two_recurrent_layers,
    "convolution": convolutional,
    "two layers": lambda: two_layers("subtract"),
    "two layers zero": lambda: two_layers("zero"),
    "learnable, relative scale": lambda: learnable("subtract", None),
    "learnable zero, fixed scale": lambda: learnable("zero", 0.4),
    "gaussian": lambda: dense(LIF(0.8), firing=Gaussian(0.6)),
    "gaussian zero, learnable": lambda: dense(
        LIF(0.8, reset="zero", learn_beta=True, learn_threshold=True), firing=Gaussian(0.6)
    ),
    "leaky readout, membranes": membranes,
    "attention": lambda: between(Attention()),
    "residual sum and layer norm": lambda: between(ResidualSum()),
    "pooling": lambda: between(Pool()),
    "neurons used twice": shared,
    "spike counts": lambda: two_layers("subtract", counts=True),
    "0-1 loss": lambda: dense(LIF(0.8), loss=zero_one),
    "latency rule": lambda: two_layers("zero", counts=True, loss=python_rule),
    "loss in time": lambda: dataclasses.replace(two_layers("subtract", counts=True, loss=ce_rate), named="ce_rate"),
    "bound of two": lambda: dataclasses.replace(dense(LIF(0.8)), objective=expected_bound_of_two),
    "bound of four": lambda: dataclasses.replace(dense(LIF(0.8), 2, 1), objective=expected_bound_of_four),
    "black box": black_box,
    "black box, then neurons": black_box_then_neurons,
    "closed loop": closed_loop,
}
NO_GRADIENT = ("0-1 loss", "latency rule", "closed loop")


def make(name: str) -> Case:
    torch.manual_seed(sum(map(ord, name)))
    return CASES[name]()


# -- wrong formulas ----------------------------------------------------------------------------------------


def _score(change: Callable) -> Callable:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        for kind in (Logistic, Gaussian):
            right = kind.score
            monkeypatch.setattr(kind, "score", lambda self, s, x, right=right: change(self, s, x, right))

    return patch


def _partner_as_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    def partner(losses, copies, group, moving):
        return losses.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)[copies]

    monkeypatch.setattr(ulr_snn.credit.formula, "baseline", partner)


def _own_loss_in_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ulr_snn.credit.formula, "baseline", lambda losses, copies, group, moving: losses.mean(0))


def _own_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ulr_snn.credit.kinds, "from_other_copies", lambda predictions, passes, group: predictions)


def _past(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ulr_snn.credit.formula, "to_go", lambda losses: losses.cumsum(-1))


def _mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ulr_snn.credit.formula, "multi_sample_weights", torch.ones_like)
    monkeypatch.setattr(ulr_snn.credit.formula, "multi_sample_signals", lambda losses: losses - losses.flip(0))


def _no_last_summand(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Logistic, Gaussian):
        monkeypatch.setattr(kind, "slope", lambda self, x: torch.zeros_like(x))


def _sign_of_current_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CurrentRecord, "score", lambda self: -self.z)


def _no_prediction_of_current_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CurrentRecord, "slope", property(lambda self: torch.zeros_like(self.z)))


def _no_reset_in_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ulr_snn.model.neurons.leaky_drive

    def wrong(current, beta, threshold, reset="none", *known):
        return right(current, beta, threshold, "none", *known)

    monkeypatch.setattr(ulr_snn.model.neurons, "leaky_drive", wrong)


def _no_leak_in_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ulr_snn.model.neurons.leaky_drive

    def wrong(current, beta, *known):
        return right(current, beta * 0, *known)

    monkeypatch.setattr(ulr_snn.model.neurons, "leaky_drive", wrong)


def _unshifted_spikes(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(ctx, g):
        return g, g.flatten(0, 1).T @ ctx.saved_tensors[0].flatten(0, 1), None, None, None

    monkeypatch.setattr(ulr_snn.model.neurons._Total, "backward", staticmethod(wrong))


def _constant_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ulr_snn.noise.level.NoiseLevel.scale
    monkeypatch.setattr(
        ulr_snn.noise.level.NoiseLevel, "scale", lambda self, *arguments: right(self, *arguments).detach()
    )


WRONG: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "sign of the score": _score(lambda self, s, x, right: -right(self, s, x)),
    "missing 1/scale": _score(lambda self, s, x, right: right(self, s, x) * self.scale),
    "spike in place of innovation": _score(lambda self, s, x, right: s),
    "logistic score": _score(lambda self, s, x, right: s - self.probability(x)),
    "partner as baseline": _partner_as_baseline,
    "own loss in the baseline": _own_loss_in_baseline,
    "own copy's prediction": _own_prediction,
    "no a p'": _no_last_summand,
    "no reset in the trace": _no_reset_in_trace,
    "no leak in the trace": _no_leak_in_trace,
    "recurrent input not shifted": _unshifted_spikes,
    "scale without derivative": _constant_scale,
    "past in place of future": _past,
    "mean in place of the bound": _mean,
    "sign of z": _sign_of_current_noise,
    "no a at the current": _no_prediction_of_current_noise,
}


@contextmanager
def wrong_formula(name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        WRONG[name](monkeypatch)
        yield
