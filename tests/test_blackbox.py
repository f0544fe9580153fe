"""Neurons that nobody knows train through noise on their input current, and parameters inside them through noise on
themselves."""

import copy
import math
import pickle
import threading
from typing import NamedTuple

import numpy
import pytest
import torch
from torch import Tensor, nn

import ulr_snn
from tests.helpers import currents, errors
from ulr_snn import LIF, ULR, CurrentNoise, Fold, TimeAverage, UsageError, WeightNoise, attach, evaluate, plan, train
from ulr_snn.adapters.blackbox import copied
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.noise.random import Noise

STEPS, BATCH, PIXELS, CLASSES = 5, 6, 4, 3


class Latch(nn.Module):
    """A hard rule with memory, on whole sequences: a clipped accumulator that fires above 1, is then refractory for a
    step, and forgets half of what is left. No derivative anywhere, and none that noise on firing could give."""

    def forward(self, current: Tensor) -> Tensor:
        level, resting = torch.zeros_like(current[0]), torch.zeros_like(current[0], dtype=torch.bool)
        spikes = []
        for now in current.detach():
            level = torch.where(resting, level, (level + now).clamp(-2, 4))
            resting = level > 1
            spikes.append(resting.to(current.dtype))
            level = torch.where(resting, level / 2, level)
        return torch.stack(spikes)


class InNumpy(nn.Module):
    """A neuron that leaves PyTorch, one time step a call, and keeps its membrane in between."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.ones(features))
        self.membrane: numpy.ndarray | None = None

    def forward(self, current: Tensor) -> Tensor:
        now = current.numpy()
        if self.membrane is None or self.membrane.shape != now.shape:
            self.membrane = numpy.zeros_like(now)
        self.membrane *= 0.9
        self.membrane += now
        threshold = self.threshold.detach().numpy()
        spikes = (self.membrane > threshold).astype(now.dtype)
        self.membrane -= threshold * spikes
        return torch.from_numpy(spikes)


class Stepwise(nn.Module):
    """A model with a loop over time in it."""

    def __init__(self, inputs: int, features: int, classes: int) -> None:
        super().__init__()
        self.fc, self.neuron, self.readout = (
            nn.Linear(inputs, features),
            InNumpy(features),
            nn.Linear(features, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.readout(self.neuron(self.fc(step.flatten(1)))) for step in x])


def latched() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(PIXELS, 7), Latch(), nn.Linear(7, 8), Latch(), TimeAverage(), nn.Linear(8, CLASSES))


def mixed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(PIXELS, 7), Latch(), nn.Linear(7, 8), LIF(), TimeAverage(), nn.Linear(8, CLASSES))


def stepwise() -> Stepwise:
    torch.manual_seed(0)
    return Stepwise(PIXELS, 7, CLASSES)


def data() -> tuple[Tensor, Tensor]:
    return currents(STEPS, BATCH, PIXELS, CLASSES)


MODELS = [latched, mixed, stepwise]


# -- the plan ----------------------------------------------------------------------------------------------


def test_plan_says_what_it_chose_for_whom():
    found = plan(mixed(), data())
    assert [(site, noise.split(",")[0]) for site, noise, _ in found.sites] == [
        ("1", "gaussian on its current"),
        ("3", "logistic"),
    ]
    assert [credit for *_, credit in found.sites] == ["learned response + exact map to layer 3", "direct"]
    found = plan(stepwise(), data())
    said = {name: source for name, _, source in found.rows}
    assert said["fc.weight"] == "credit at site neuron" and found.copies == 2
    assert said["neuron.threshold"] == "weight noise: loss minus baseline, times the score"
    assert plan(latched(), data(), ULR(noise={"1": CurrentNoise(0.3)})).sites[0][1].endswith("scale 0.3")


def test_what_cannot_be_bound_is_named_with_the_reason():
    class Encoder(Latch):
        """Cuts the graph where nothing that is trained lies before it."""

    model = nn.Sequential(Encoder(), *mixed())
    found = plan(model, data())
    assert [site for site, *_ in found.sites] == ["2", "4"]
    assert found.notes == ["0 (Encoder) cuts the graph and gets no noise on its current: no parameter lies before it"]

    class Sign(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.detach() > 0).float()

    folded = nn.Sequential(Fold(nn.Linear(PIXELS, 7), Sign()), *list(mixed())[2:])
    (note,) = plan(folded, data()).notes
    assert note.startswith("0.1 (Sign) cuts the graph") and f"called 1 times with [{STEPS * BATCH}, 7]" in note
    with pytest.raises(UsageError, match=r"it must see \[T, B, ...\] once"):
        plan(folded, data(), ULR(noise={"0.1": CurrentNoise()}))
    model = stepwise()
    found = plan(model, data(), ULR(noise={"neuron.threshold": None}))
    assert found.untrained == [
        "neuron.threshold: nothing depends on it, or noise on it was ruled out; freeze it or use it"
    ]


def test_the_innermost_module_that_cuts_the_graph_is_the_black_box():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.neuron = nn.Linear(7, 7), Latch()

        def forward(self, x: Tensor) -> Tensor:
            return self.neuron(self.linear(x))

    model = nn.Sequential(nn.Linear(PIXELS, 7), Block(), TimeAverage(), nn.Linear(7, CLASSES))
    found = plan(model, data())
    assert [site for site, *_ in found.sites] == ["1.neuron"] and not found.untrained


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Keyword()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(inp=x) + 0


class Keyword(nn.Module):
    def forward(self, *, inp: Tensor) -> Tensor:
        return inp.tanh()


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu_()


class Position(nn.Module):
    """Depends on the shape of its input alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(STEPS, 1, 7))

    def forward(self, x: Tensor) -> Tensor:
        return self.table[: len(x)].expand(x.shape)


class Pair(NamedTuple):
    spikes: Tensor
    membrane: Tensor


class Tuples(nn.Module):
    def forward(self, x: Tensor) -> Pair:
        return Pair(x.sin(), x)


class Odd(nn.Module):
    """Calls of all kinds, none of which cuts the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.lif, self.last = nn.Linear(PIXELS, 7), LIF(), nn.Linear(7, CLASSES)
        self.nested, self.in_place, self.position, self.tuples = Nested(), InPlace(), Position(), Tuples()
        self.nothing, self.table = Nothing(), Table()

    def forward(self, x: Tensor) -> Tensor:
        current = self.tuples(self.in_place(self.nested(self.first(x)))).spikes
        current = self.table(current + self.position(current))["current"] + self.nothing()
        return self.last(self.lif(2 * current).mean(0))


class Nothing(nn.Module):
    def forward(self) -> float:
        return 0.5


class Table(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"current": x}


def test_modules_that_do_not_cut_the_graph_are_left_alone():
    torch.manual_seed(0)
    model = Odd()
    found = plan(model, data())
    assert [site for site, *_ in found.sites] == ["lif"] and not found.notes and not found.untrained
    said = {name: source for name, _, source in found.rows}
    assert said["first.weight"] == said["position.table"] == "credit at site lif"
    train(model, [data()], 2, val_loader=[data()], device="cpu", progress=False)


def test_a_function_with_a_surrogate_gradient_is_taken_over():
    class Spike(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return (x > 0).to(x.dtype)

        @staticmethod
        def backward(ctx, gradient):
            raise AssertionError("a surrogate gradient was asked for")

    class Surrogate(nn.Module):
        def forward(self, current: Tensor) -> Tensor:
            return Spike.apply(current)

    model = mixed()
    model[1] = Surrogate()
    found = plan(model, data())
    assert [site for site, *_ in found.sites] == ["1", "3"] and not found.notes
    for estimator in (ULR(), ULR(noise={"1": CurrentNoise()})):
        model.zero_grad()
        with attach(model, estimator) as ulr:
            ulr.backward(*data())
            ulr.backward(*data())
        assert all(p.grad is not None for p in model.parameters())


def test_a_choice_with_a_gradient_of_its_own_is_noted():
    """A detour around the largest number, which no threshold gives."""

    class Surrogate(nn.Module):
        def forward(self, current: Tensor) -> Tensor:
            soft = current.softmax(-1)
            hard = nn.functional.one_hot(current.argmax(-1), current.shape[-1]).to(soft)
            return soft + (hard - soft).detach()

    model = mixed()
    model[1] = Surrogate()
    (note,) = plan(model, data()).notes
    assert note.startswith("1 (Surrogate) fires, with a gradient of its own; ULR(noise={'1': CurrentNoise()})")
    with attach(model, ULR(noise={"1": CurrentNoise()})) as ulr:
        ulr.backward(*data())
        ulr.backward(*data())
    assert all(p.grad is not None for p in model.parameters())


def test_a_box_that_mixes_its_neurons_learns_from_the_outputs():
    class Winner(nn.Module):
        def forward(self, current: Tensor) -> Tensor:
            return nn.functional.one_hot(current.argmax(-1), current.shape[-1]).to(current.dtype)

    class Shifted(nn.Module):
        def forward(self, current: Tensor) -> Tensor:
            return (current.detach().roll(1, -1) > 0).to(current.dtype)

    for box in (Winner(), Shifted()):
        model = mixed()
        model[1] = box
        assert plan(model, data()).sites[0][2] == "learned from the outputs, resolved in time"


def test_a_model_whose_only_noise_is_on_its_weights():
    class Inline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(PIXELS, 7), nn.Linear(7, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.b((self.a(x).detach() > 0.2).float().mean(0))

    torch.manual_seed(0)
    found = plan(Inline(), data())
    said = {name: source.split(":")[0] for name, _, source in found.rows}
    assert not found.sites and said["a.weight"] == said["a.bias"] == "weight noise"
    result = train(Inline(), [data()] * 3, 2, val_loader=[data()], device="cpu", progress=False)
    assert result.metrics["steps"] == 6


def test_noise_on_the_parameters_of_a_box_leaves_that_on_its_current():
    model = stepwise()
    found = plan(model, data(), ULR(noise={"neuron": WeightNoise(0.1)}))
    assert [site for site, *_ in found.sites] == ["neuron"]
    assert found.rows[2][2].startswith("weight noise")
    found = plan(model, data(), ULR(noise={"neuron": None}))
    assert [site for site, *_ in found.sites] == ["neuron"] and len(found.untrained) == 1


def test_a_single_time_step():
    model, (x, y) = latched(), data()
    with attach(model, ULR(credit="global", copies=2)) as ulr:
        ulr.backward(x[:1], y)
        ulr.backward(x[:1], y)
    with pytest.raises(UsageError, match="got a current of shape"), attach(model) as ulr:
        ulr.backward(x[:1], y)
        ulr.bound.layers[0][1].whole = False
        ulr.backward(x[:1], y)


def test_a_known_layer_can_be_taken_for_a_black_box():
    model, x = mixed(), data()[0]
    found = plan(model, data(), ULR(noise={"3": CurrentNoise()}))
    assert [noise.split(",")[0] for _, noise, _ in found.sites] == ["gaussian on its current"] * 2
    assert torch.equal(model(x), mixed()(x))


def test_a_box_of_another_shape_than_its_input_learns_from_the_outputs():
    class Pairs(Latch):
        def forward(self, current: Tensor) -> Tensor:
            return super().forward(current.unflatten(-1, (-1, 2)).sum(-1))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(PIXELS, 8), Pairs(), TimeAverage(), nn.Linear(4, CLASSES))
    found = plan(model, data())
    assert [credit for *_, credit in found.sites] == ["direct + learned from the outputs, resolved in time"]
    with attach(model) as ulr:
        for _ in range(3):
            model.zero_grad()
            ulr.backward(*data())
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ({"nine": CurrentNoise()}, "no module"),
        ({"nine": WeightNoise()}, "no trainable parameter"),
        ({"1": WeightNoise()}, "no trainable parameter"),
        ({"nine": None}, "no trainable parameter"),
    ],
)
def test_noise_for_what_is_not_there(noise, message):
    for act in (lambda: plan(latched(), data(), ULR(noise=noise)), lambda: attach(latched(), ULR(noise=noise))):
        with pytest.raises(UsageError, match=message):
            act()


def test_noise_that_is_none():
    with pytest.raises(UsageError, match="it is CurrentNoise"):
        ULR(noise={"1": 0.5})
    for kind in (CurrentNoise, WeightNoise):
        with pytest.raises(UsageError, match="it must be positive"):
            kind(scale=0.0)


def test_a_model_without_a_spiking_layer_is_still_refused():
    class Smooth(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh()

    model = nn.Sequential(nn.Linear(PIXELS, 4), Smooth(), nn.Linear(4, CLASSES))
    with pytest.raises(UsageError, match="no spiking layer"):
        plan(model, data())
    with pytest.raises(UsageError, match="no spiking layer"):
        train(model, [data()], 1, device="cpu", progress=False)


# -- the model is left alone -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS)
def test_a_model_is_its_own_afterwards(make):
    model, (x, y) = make(), data()
    expected = copy.deepcopy(model)
    keys = {name: list(m.__dict__) for name, m in model.named_modules()}
    plan(model, (x, y))
    evaluate(model, [(x, y)], device="cpu", mode="stochastic")
    with torch.no_grad():
        first = model(x)
        assert torch.equal(first, expected(x))
    train(model, [(x, y)], 2, val_loader=[(x, y)], device="cpu", progress=False)
    assert {name: list(m.__dict__) for name, m in model.named_modules()} == keys
    copy.deepcopy(model)
    pickle.dumps(model)


def test_every_pass_begins_with_the_neurons_own_state():
    model, (x, y) = stepwise(), data()
    model.neuron.membrane = numpy.full((BATCH, 7), 0.3, dtype="float32")
    kept = model.neuron.membrane
    first, second = (evaluate(model, [(x, y)] * n, device="cpu") for n in (1, 3))
    assert first["loss"] == pytest.approx(second["loss"])
    with attach(model) as ulr:
        ulr.backward(x, y)
    assert model.neuron.membrane is kept and (kept == numpy.float32(0.3)).all()


def test_what_a_module_keeps_is_copied_only_as_far_as_it_is_state():
    class Simulator:
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, current: Tensor) -> Tensor:
            self.calls += 1
            return (current.detach() > 0.1 * self.calls).to(current.dtype)

    class Holder(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.simulator, self.lock, self.shared = Simulator(), threading.Lock(), [linear]
            self.last: Tensor | None = None

        def forward(self, current: Tensor) -> Tensor:
            self.last = current * 2
            return self.simulator(current)

    torch.manual_seed(0)
    linear = nn.Linear(PIXELS, 7)
    model, (x, y) = nn.Sequential(linear, Holder(linear), TimeAverage(), nn.Linear(7, CLASSES)), data()
    model(x)
    holder = model[1]
    losses = [evaluate(model, [(x, y)], device="cpu")["loss"] for _ in range(3)]
    assert len(set(losses)) == 1 and holder.simulator.calls == 1
    copies = [copied(vars(holder)[name], {}) for name in ("shared", "simulator", "lock", "last")]
    assert copies[0][0] is linear and copies[1] is not holder.simulator and copies[2] is holder.lock
    assert copies[3].grad_fn is None and torch.equal(copies[3], holder.last)
    with attach(model, ULR(copies=2)) as ulr:
        ulr.backward(x, y)


def test_batch_norm_inside_a_box_learns_its_statistics():
    class Normed(Latch):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(7)

        def forward(self, current: Tensor) -> Tensor:
            return super().forward(self.norm(current.flatten(0, 1)).unflatten(0, current.shape[:2]))

    model = nn.Sequential(nn.Linear(PIXELS, 7, bias=False), Normed(), TimeAverage(), nn.Linear(7, CLASSES))
    with attach(model) as ulr:
        for _ in range(3):
            ulr.backward(*data())
    assert int(model[1].norm.num_batches_tracked) == 3 and model[1].norm.running_mean.any()


def test_a_model_that_keeps_states_by_hand_is_not_left_with_those_of_a_probe():
    class Cell(nn.Module):
        def forward(self, current: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
            level = 0.9 * level + current
            return (level > 1).float(), level - (level > 1).float()

    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.cell, self.out, self.level = nn.Linear(PIXELS, 7), Cell(), nn.Linear(7, CLASSES), None

        def forward(self, x: Tensor) -> Tensor:
            level = torch.zeros(x.shape[1], 7)
            spikes = []
            for step in x:
                spike, level = self.cell(self.fc(step), level)
                spikes.append(self.out(spike))
            self.level = level
            return torch.stack(spikes)

    torch.manual_seed(0)
    model = Kept()
    found = plan(model, data())
    assert model.level is None and [site for site, *_ in found.sites] == ["cell"]
    train(model, [data()], 2, val_loader=[data()], device="cpu", progress=False)


def test_accuracy_is_that_of_the_models_own_forward():
    model, (x, y) = stepwise(), data()
    train(model, [(x, y)], 3, device="cpu", progress=False)
    with torch.no_grad():
        own = (copy.deepcopy(model)(x).sum(0).argmax(1) == y).float().mean().item()
    assert evaluate(model, [(x, y)], device="cpu")["accuracy"] == pytest.approx(own)


# -- the formula, with the same noise ----------------------------------------------------------------------


def by_hand(model: nn.Sequential, x: Tensor, y: Tensor, scale: float, copies: int, wrong: str = "") -> list[Tensor]:
    """Gradients of the first layer of Linear, Latch, TimeAverage, Linear by global credit at the first step: pairs of
    copies, leave-pair-out."""
    linear, box, readout = model[0], model[1], model[3]
    sample = torch.arange(x.shape[1], dtype=torch.int32)
    losses, noises = [], []
    for copy_ in range(copies):
        stream = torch.full_like(sample, copy_ // 2)
        z = Noise(7, 0, sample, stream, sample < copy_ % 2 * len(sample)).normal(0, 0, STEPS, (7,), torch.float64)
        spikes = box(x @ linear.weight.T + linear.bias + scale * z)
        logits = spikes.mean(0) @ readout.weight.T + readout.bias
        losses.append(logits.logsumexp(1) - logits.gather(1, y[:, None])[:, 0])
        noises.append(z)
    weight, bias = torch.zeros_like(linear.weight), torch.zeros_like(linear.bias)
    for k, z in enumerate(noises):
        others = [losses[j] for j in range(copies) if j // 2 != k // 2]
        if wrong == "partner as baseline":
            others = [losses[k ^ 1]]
        signal = losses[k] - torch.stack(others).mean(0)
        credit = signal[None, :, None] * z / (1.0 if wrong == "missing 1/scale" else scale)
        weight += torch.einsum("tbn,tbi->ni", credit, x) / (copies * len(y))
        bias += credit.sum((0, 1)) / (copies * len(y))
    return [weight, bias]


@pytest.mark.parametrize("wrong", ["", "partner as baseline", "missing 1/scale"])
def test_the_gradient_is_the_formula_with_the_same_noise(wrong):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(PIXELS, 7), Latch(), TimeAverage(), nn.Linear(7, CLASSES)).double()
    x, y = data()
    x = x.double()

    with attach(model, ULR(credit="global", copies=4, noise={"1": CurrentNoise(0.3)}), seed=7) as ulr:
        ulr.backward(x, y)
    with torch.no_grad():
        expected = by_hand(model, x, y, 0.3, 4, wrong)
    agree = [
        torch.allclose(p.grad, e, rtol=1e-9, atol=1e-12) for p, e in zip(model[0].parameters(), expected, strict=True)
    ]
    assert all(agree) if not wrong else not any(agree)


def test_the_learned_response_is_the_mean_slope():
    """Of 1 where J + σz > 1: D at lag 0 is σ times the mean density φ((1 - J) / σ) / σ, and none at others."""

    class Hard(nn.Module):
        def forward(self, current: Tensor) -> Tensor:
            return (current > 1).float()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(PIXELS, 5), Hard(), TimeAverage(), nn.Linear(5, CLASSES))
    x, y = data()
    x, y, scale = x.repeat(1, 400, 1), y.repeat(400), 0.5
    with attach(model, ULR(credit="feedback", noise={"1": CurrentNoise(scale)})) as ulr:
        for _ in range(20):
            ulr.backward(x, y)
        kernel, passes = ulr.learner.feedback.responses["1"]
    with torch.no_grad():
        distance = (1 - model[0](x)) / scale
    slope = (torch.exp(-(distance**2) / 2) / math.sqrt(2 * math.pi)).mean((0, 1))
    spread = 3.0 / math.sqrt(20 * x.shape[0] * x.shape[1])  # 6 standard errors: of s z, at most ½ each
    assert passes == 20
    torch.testing.assert_close(kernel[0], slope, rtol=0, atol=spread)
    assert kernel[1:STEPS].abs().max() < 3 * spread and not kernel[STEPS:].any()


def test_padding_has_no_part():
    """A padded sample gives the gradient that it gives alone."""
    model, (x, y) = latched(), data()
    quiet = ULR(credit="global", copies=2, noise={"1": CurrentNoise(0.5), "3": CurrentNoise(0.5)})
    gradients = []
    for events, lengths in ((x[:3, :1], None), (torch.cat([x[:3], 9 + x[:2]])[:, :1], torch.tensor([3]))):
        model.zero_grad()
        with attach(model, quiet) as ulr:
            ulr.backward(events, y[:1], lengths=lengths)
            ulr.backward(events, y[:1], lengths=lengths)
        gradients.append([p.grad.clone() for p in model.parameters()])
    for alone, padded in zip(*gradients, strict=True):
        torch.testing.assert_close(alone, padded)
    assert gradients[0][0].any()


def test_the_noise_is_a_part_of_the_currents_spread_and_narrows():
    model, (x, y) = latched(), data()
    with attach(model, total_steps=2) as ulr:
        ulr.backward(x, y)
        spread = ulr.learner.level.starts["1"]
        with torch.no_grad():
            assert spread == pytest.approx(model[0](x).std(correction=0).item(), rel=1e-5)
        level = NoiseLevel(ULR().firing, 0.0, {"1": CurrentNoise()}, {"1": spread})
        assert level.current_scale("1", None) == pytest.approx(0.5 * spread)
        level.progress = 1.0
        assert level.current_scale("1", None) == pytest.approx(0.1 * spread)


# -- training ----------------------------------------------------------------------------------------------


def test_a_resumed_run_takes_the_same_steps():
    x, y = data()
    runs = []
    for pause in (False, True):
        model = mixed()
        ulr = attach(model, seed=3, total_steps=4)
        for step in range(4):
            if pause and step == 2:
                state = copy.deepcopy(ulr.state_dict())
                ulr = attach(model, seed=3, total_steps=4)
                ulr.load_state_dict(state)
            model.zero_grad()
            ulr.backward(x, y)
        runs.append([p.grad.clone() for p in model.parameters()])
    for straight, resumed in zip(*runs, strict=True):
        torch.testing.assert_close(straight, resumed)


@pytest.mark.slow
def test_black_boxes_train():
    """On digits, and with a loss that has no derivative either."""
    train_set, test_set = ulr_snn.data.load("digits")
    loader = ulr_snn.data.loader(train_set, 64, shuffle=True, seed=0)
    tests = ulr_snn.data.loader(test_set, 64)
    torch.manual_seed(0)
    latch = nn.Sequential(nn.Flatten(2), nn.Linear(512, 128), Latch(), TimeAverage(), nn.Linear(128, 10))
    result = train(latch, loader, 6, val_loader=tests, device="cpu", progress=False)
    assert result.metrics["test_accuracy"] > 0.88
    torch.manual_seed(0)
    threshold = nn.init.constant_(Stepwise(512, 128, 10).neuron.threshold, 1.0).clone()
    torch.manual_seed(0)
    leaves_torch = Stepwise(512, 128, 10)
    result = train(leaves_torch, loader, 5, val_loader=tests, device="cpu", progress=False)
    assert result.metrics["test_accuracy"] > 0.88
    assert not torch.equal(leaves_torch.neuron.threshold, threshold)


@pytest.mark.slow
def test_black_boxes_train_on_a_loss_without_a_derivative():
    """A loss in NumPy: all weights learn from noise alone, those of the readout from noise on themselves."""

    def surprise(outputs: Tensor, targets: Tensor) -> Tensor:
        logits = outputs.detach().cpu().numpy()
        likelihood = numpy.exp(logits - logits.max(1, keepdims=True))
        chosen = likelihood[numpy.arange(len(logits)), targets.cpu().numpy()] / likelihood.sum(1)
        return torch.from_numpy(-numpy.log(chosen)).to(outputs)

    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(STEPS, 96, PIXELS, generator=generator)
    y = x.mean(0)[:, :CLASSES].argmax(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(PIXELS, 24), Latch(), TimeAverage(), nn.Linear(24, CLASSES))
    with torch.no_grad():
        before = errors(model(x), y).mean()
    result = train(model, [(x, y)] * 50, 8, loss=surprise, lr=0.03, device="cpu", progress=False)
    print([entry["train_loss"] for entry in result.history])
    with torch.no_grad():
        assert errors(model(x), y).mean() < 0.6 * before
