"""Batches as people bring them: axes, static inputs, several inputs, named parts, sequences of unequal length."""

import importlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ulr_snn
from ulr_snn import LIF, ULR, Global, UsageError, WeightNoise, attach, evaluate, plan, train
from ulr_snn.model.activity import Activity
from ulr_snn.model.reading import takes
from ulr_snn.runs.recording import record

STEPS, BATCH, INPUTS = 7, 5, 6
snn = pytest.importorskip("snntorch")
PASSES = [ULR(), ULR(credit="global", copies=4), ULR(credit="residual", copies=4)]


def data(steps: int = STEPS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(steps, BATCH, INPUTS, generator=generator) < 0.5).double() * 2
    return x, torch.arange(BATCH) % 3


class Loop(nn.Module):
    """Three layers in a loop over time, of events in one of three layouts."""

    def __init__(self, layout: str, reduced: bool = False, axis: int | None = None, steps: int = STEPS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layout, self.reduced, self.steps = layout, reduced, steps
        self.axis = int(layout == "BT") if axis is None else axis
        self.fc1, self.lif1 = nn.Linear(INPUTS, 8), snn.Leaky(beta=0.9, reset_mechanism="zero")
        self.fc2, self.lif2, self.fc3 = nn.Linear(8, 8), snn.Leaky(beta=0.8), nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        m1, m2, out = self.lif1.init_leaky(), self.lif2.init_leaky(), []
        frames = {"TB": x, "BT": x.transpose(0, 1), "B": [x] * self.steps}[self.layout]
        for now in frames:
            s, m1 = self.lif1(self.fc1(now), m1)
            s, m2 = self.lif2(self.fc2(s), m2)
            out.append(self.fc3(s))
        outputs = torch.stack(out, self.axis)
        return outputs.sum(self.axis) if self.reduced else outputs


def gradients(model: nn.Module, x: object, y: object, estimator: ULR, **options: object) -> tuple[list[Tensor], Tensor]:
    """Returns the gradients of two steps, and the losses of the second."""
    with attach(model, estimator, seed=3, **options) as ulr:
        for _ in range(2):
            estimate = ulr.backward(x, y)
    return [q.grad for q in model.parameters()], estimate.loss


@pytest.mark.parametrize("estimator", PASSES, ids=lambda estimator: estimator.credit.name)
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("layout", ["BT", "B"])
def test_a_layout_changes_no_number(layout, reduced, estimator):
    """The gradient is that of the same net with time first, with the same noise, by scans and by the library's code."""
    x, y = data()
    x = x[:1].expand_as(x) if layout == "B" else x
    given = {"BT": x.transpose(0, 1), "B": x[0]}[layout]
    for axis in [0, 1]:
        model = Loop(layout, reduced, axis)
        found, losses = gradients(model, given, y, estimator, layout=layout)
        expected, others = gradients(Loop("TB", reduced), x, y, estimator)
        if estimator.credit.name == "auto":
            runs = [line for line in plan(model, (given, y), layout=layout).engine if line.startswith("engine")]
            assert runs == ["engine: runs as a chain fc1 -> lif1 -> fc2 -> lif2 -> fc3, neurons as scans over time"]
        torch.testing.assert_close(losses, others)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layout", ["TB", "BT", "B"])
@pytest.mark.parametrize("reduced", [False, True])
def test_reported_figures_are_those_of_the_users_own_loop(layout, reduced):
    x, y = data()
    x = {"TB": x, "BT": x.transpose(0, 1), "B": x[0]}[layout].float()
    model = Loop(layout, reduced).float()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        totals = outputs if reduced else outputs.sum(model.axis)
        return nn.functional.cross_entropy(totals, targets, reduction="none")

    result = train(model, [(x, y)] * 3, 2, loss=loss, layout=layout, val_loader=[(x, y)], progress=False, device="cpu")
    own = loss(model(x), y).mean().item()
    assert result.history[-1]["val_loss"] == pytest.approx(own, rel=1e-5)
    assert evaluate(model, [(x, y)], loss=loss, layout=layout, device="cpu")["loss"] == pytest.approx(own, rel=1e-5)
    named = evaluate(model, [(x, y)], layout=layout, device="cpu")
    totals = model(x) if reduced else model(x).sum(model.axis)
    assert named["accuracy"] == (totals.argmax(1) == y).double().mean().item()
    with attach(model, loss=loss, layout=layout) as ulr:
        assert ulr.backward(x, y).outputs.shape == (1, *model(x).shape)


def test_a_batch_as_long_as_its_sequences_is_told_apart():
    x, y = data(BATCH)
    turned = Loop("BT", steps=BATCH)
    found, _ = gradients(turned, x.transpose(0, 1), y, ULR(), layout="BT")
    expected, _ = gradients(Loop("TB"), x, y, ULR())
    torch.testing.assert_close(found, expected)
    with pytest.raises(UsageError, match="layout='BT'"):
        train(turned, [(x.transpose(0, 1), y)], 1, progress=False)


def test_models_with_time_first_take_batches_with_the_batch_first():
    x, y = data()
    for model in (
        nn.Sequential(nn.Linear(INPUTS, 8), LIF(), nn.Linear(8, 3)).double(),
        nn.Sequential(nn.Linear(INPUTS, 8), snn.Leaky(0.9, init_hidden=True), nn.Linear(8, 3)).double(),
    ):
        found, _ = gradients(model, x.transpose(0, 1), y, ULR(), time_first=False)
        found = [g.clone() for g in found]
        model.zero_grad()
        expected, _ = gradients(model, x, y, ULR())
        torch.testing.assert_close(found, expected)


def test_own_neurons_in_a_model_with_the_batch_first():
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(INPUTS, 8), LIF(), nn.Linear(8, 3)).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.transpose(0, 1)).transpose(0, 1)

    x, y = data()
    torch.manual_seed(0)
    model = Turned()
    found, _ = gradients(model, x.transpose(0, 1), y, ULR(), layout="BT")
    found = [g.clone() for g in found]
    model.zero_grad()
    expected, _ = gradients(model.net, x, y, ULR())
    torch.testing.assert_close(found, expected)
    assert (
        "model: takes whole sequences with the batch first, [B, T, ...]"
        in plan(model, (x.transpose(0, 1), y), layout="BT").engine
    )


@pytest.mark.parametrize("encoder", ["rate", "latency", "delta", "repeat"])
def test_encoders_in_front_of_the_model(encoder):
    spikegen = pytest.importorskip("snntorch.spikegen")
    encode: Callable[[Tensor], Tensor] = {
        "rate": lambda x: spikegen.rate(x, num_steps=STEPS),
        "latency": lambda x: spikegen.latency(x, num_steps=STEPS, normalize=True, linear=True),
        "delta": lambda x: spikegen.delta(x.repeat(STEPS, 1, 1) * torch.arange(STEPS)[:, None, None], threshold=0.5),
        "repeat": lambda x: x.repeat(STEPS, 1, 1),
    }[encoder]

    class Encoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Loop("TB").float()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(encode(x).float())

    x, y = torch.rand(32, INPUTS, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3
    x[torch.arange(32), y] = 1.0
    x = (x > 0.9).float() * 0.9
    result = train(Encoded(), [(x, y)] * 10, 8, layout="B", progress=False, device="cpu")
    assert result.history[-1]["train_accuracy"] > 0.9


def test_spikingjellys_encoder_and_a_layer_over_time():
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import encoding, functional, layer, neuron

    class Net(nn.Module):  # as SpikingJelly's example for Fashion-MNIST
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(layer.Linear(INPUTS, 16), neuron.IFNode(), layer.Linear(16, 3), neuron.IFNode())
            functional.set_step_mode(self, "m")

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x.unsqueeze(0).repeat(STEPS, 1, 1)).mean(0)

    class Poisson(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder = encoding.PoissonEncoder()
            self.layers = nn.Sequential(nn.Linear(INPUTS, 16), neuron.LIFNode(tau=2.0), nn.Linear(16, 3))

        def forward(self, x: Tensor) -> Tensor:
            return sum(self.layers(self.encoder(x)) for _ in range(STEPS)) / STEPS

    x, y = torch.rand(48, INPUTS, generator=torch.Generator().manual_seed(0)) / 2, torch.arange(48) % 3
    x[torch.arange(48), y] = 1.0
    for net in (Net, Poisson):
        result = train(net(), [(x, y)] * 10, 8, layout="B", progress=False, device="cpu")
        assert result.history[-1]["train_accuracy"] > 0.9, net
    assert (
        "model: takes a static input [B, ...], and repeats or encodes it itself"
        in plan(Net(), (x, y), layout="B").engine
    )


def test_a_static_input_is_not_cut_into_chunks():
    """Modules in order, which are cut into chunks of time if they take sequences, but not if they make them."""

    class Repeat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.expand(STEPS, *x.shape)

    x, y = data()
    torch.manual_seed(0)
    layers = nn.Linear(INPUTS, 8), LIF(), nn.Linear(8, 3)
    model, expected = nn.Sequential(Repeat(), *layers).double(), nn.Sequential(*layers).double()
    found, _ = gradients(model, x[0], y, ULR(), layout="B")
    found = [g.clone() for g in found]
    model.zero_grad()
    torch.testing.assert_close(found, gradients(expected, x[:1].expand_as(x), y, ULR())[0])
    with pytest.raises(UsageError, match=r"is not called with one sequence|Repeat is not known to see"):
        plan(model, (x[0], y), ULR(memory="replay"), layout="B")
    with pytest.raises(UsageError, match="is not called with one sequence"):
        plan(expected, (x, y), ULR(memory="replay"), output=lambda outputs: 2 * outputs)


def lifted(kind: str) -> nn.Module:
    """Layers that take a whole sequence [T, B, ...] a call."""
    torch.manual_seed(0)
    if kind == "norse":
        norse = pytest.importorskip("norse.torch")
        return norse.SequentialState(norse.LIFRecurrent(INPUTS, 8), norse.LIF(), nn.Linear(8, 3), norse.LI())
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import functional, layer, neuron

    v_reset = {"hard": 0.0, "soft": None}[kind]
    net = nn.Sequential(layer.Linear(INPUTS, 8), neuron.LIFNode(v_reset=v_reset), layer.BatchNorm1d(8))
    net.extend([layer.Linear(8, 3), neuron.IFNode(v_reset=v_reset)])
    functional.set_step_mode(net, "m")
    return net


@pytest.mark.parametrize("kind", ["hard", "soft", "norse"])
def test_a_static_input_for_layers_of_whole_sequences(kind):
    """A model that repeats its input for layers over time has as many steps as these layers see."""

    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = lifted(kind)

        def forward(self, x: Tensor) -> Tensor:
            result = self.net(4 * x.unsqueeze(0).repeat(STEPS, 1, 1))
            return (result[0] if isinstance(result, tuple) else result).mean(0)

    def reduced(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.mean(0), targets, reduction="none")

    x, y = data(1)
    x = x.float()
    found, losses = gradients(Repeats(), x[0], y, ULR(maps="exact"), loss="ce_count", layout="B")
    expected, others = gradients(lifted(kind), 4 * x.repeat(STEPS, 1, 1), y, ULR(maps="exact"), loss=reduced)
    torch.testing.assert_close(losses, others)
    torch.testing.assert_close(found, expected)
    model = Repeats()
    result = train(model, [(x[0], y)] * 3, 2, layout="B", val_loader=[(x[0], y)], progress=False, device="cpu")
    if kind != "norse":
        importlib.import_module("spikingjelly.activation_based.functional").reset_net(model)
    own = nn.functional.cross_entropy(model.eval()(x[0]), y).item()
    assert result.history[-1]["val_loss"] == pytest.approx(own, rel=1e-5)


class Two(nn.Module):
    """Adds up two inputs over time, and one without."""

    def __init__(self, static: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.static = static
        self.net = nn.Sequential(nn.Linear(INPUTS, 8), LIF(), nn.Linear(8, 3)).double()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        if self.static:
            right = right.expand(len(left), *right.shape)
        return self.net(torch.cat([left, right], -1))


@pytest.mark.parametrize("layout", ["TB", "BT"])
@pytest.mark.parametrize("estimator", PASSES, ids=lambda estimator: estimator.credit.name)
@pytest.mark.parametrize("named", [False, True])
def test_several_inputs(estimator, named, layout):
    x, y = data()
    left, right = x[..., :4], x[..., 4:]
    expected, _ = gradients(Two().net, x, y, estimator)
    turn = (lambda part: part.transpose(0, 1)) if layout == "BT" else (lambda part: part)
    given = {"right": turn(right), "left": turn(left)} if named else (turn(left), turn(right))
    found, _ = gradients(Two(), given, y, estimator, layout=layout)
    torch.testing.assert_close(found, expected)
    static = right[:1].expand_as(right)
    expected, _ = gradients(Two().net, torch.cat([left, static], -1), y, estimator)
    given = {"right": right[0], "left": turn(left)} if named else (turn(left), right[0])
    found, _ = gradients(Two(static=True), given, y, estimator, layout=layout)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("by_step", [False, True])
def test_forms_of_a_batch(by_step):
    """Each form gives the loss that (x, y) gives."""
    x, y = (torch.rand(STEPS, BATCH, INPUTS) < 0.5).float() * 2, torch.arange(BATCH) % 3
    neuron = snn.Leaky(0.9, init_hidden=True) if by_step else LIF()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, 8), neuron, nn.Linear(8, 3))
    expected = evaluate(model, [(x, y)], device="cpu")
    for batch in (
        [x, y],
        (x.numpy(), y.numpy()),
        (x.numpy().astype(np.uint8), y.tolist()),
        ((x,), y),
        ([x], y),
        {"x": x, "label": y},
        {"events": x, "labels": y, "file": ["a"] * BATCH},
        {"input": x.numpy(), "target": y.tolist()},
        {"input": x, "label": y, "lengths": torch.full((BATCH,), STEPS)},
    ):
        found = evaluate(model, [batch], device="cpu")
        assert found == pytest.approx(expected), batch


def test_a_list_of_sequences_is_padded_and_has_lengths():
    x, y = (torch.rand(STEPS, BATCH, INPUTS) < 0.5).float() * 2, torch.arange(BATCH) % 3
    lengths = torch.tensor([7, 3, 5, 2, 7])
    padded = x * (torch.arange(STEPS)[:, None] < lengths)[..., None]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, 8), LIF(), nn.Linear(8, 3))
    listed = [x[:length, i] for i, length in enumerate(lengths)]
    found, losses = gradients(model, listed, y, ULR())
    found = [g.clone() for g in found]
    model.zero_grad()
    with attach(model, seed=3) as ulr:
        for _ in range(2):
            estimate = ulr.backward(padded, y, lengths=lengths)
    torch.testing.assert_close(losses, estimate.loss)
    torch.testing.assert_close(found, [q.grad for q in model.parameters()])
    as_arrays = evaluate(model, [([part.numpy() for part in listed], y)], device="cpu")
    assert as_arrays == pytest.approx(evaluate(model, [(padded, y, lengths)], device="cpu"))


def test_a_state_that_the_model_returns_is_carried():
    """A model (x, state) -> (out, state) trains as its own loop over time does."""
    norse = pytest.importorskip("norse.torch")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.lif, self.out, self.li = (
                nn.Linear(INPUTS, 8),
                norse.LIFCell(),
                nn.Linear(8, 3),
                norse.LICell(),
            )

        def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
            s1, s2 = (None, None) if state is None else state
            z, s1 = self.lif(20 * self.fc(x), s1)
            v, s2 = self.li(self.out(z), s2)
            return v, (s1, s2)

    class Own(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            state, out = None, []
            for now in x:
                v, state = self.net(now, state)
                out.append(v)
            return torch.stack(out)

    class Spread(Net):  # the states one by one
        def forward(self, x: Tensor, s1: tuple | None = None, s2: tuple | None = None) -> tuple:
            v, state = super().forward(x, None if s1 is None else (s1, s2))
            return v, *state

    x, y = data()
    x = x.float()
    expected, _ = gradients(Own(Net()), x, y, ULR())
    for net in (Net, Spread):
        found, _ = gradients(net(), x, y, ULR())
        torch.testing.assert_close(found, expected)
        says = "model: takes one time step a call, with the state that it returned in the call before"
        assert says in plan(net(), (x, y)).engine
    own = Own(Net())(x)
    loss = evaluate(Net(), [(x, y)], device="cpu")["loss"]
    assert loss == pytest.approx(nn.functional.cross_entropy(own.sum(0), y).item())


def test_a_second_argument_that_takes_no_state_is_left_alone():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.lif, self.out = nn.Linear(INPUTS, 8), snn.Leaky(0.9, init_hidden=True), nn.Linear(8, 3)

        def forward(self, x: Tensor, scale: float | None = None) -> tuple[Tensor, str]:
            assert scale is None or isinstance(scale, float)
            return self.out(self.lif(self.fc(x))), "name"

    x, y = data()
    model = Net()
    found, _ = gradients(model, x.float(), y, ULR())
    chain = nn.Sequential(model.fc, model.lif, model.out)
    found = [g.clone() for g in found]
    model.zero_grad()
    expected, _ = gradients(chain, x.float(), y, ULR())
    torch.testing.assert_close(found, expected)


X, Y = torch.rand(STEPS, BATCH, INPUTS), torch.arange(BATCH) % 3
MODEL = nn.Sequential(nn.Linear(INPUTS, 8), LIF(), nn.Linear(8, 3))
WRONG = {
    "unknown layout": ((X, Y), {"layout": "BTC"}, "use 'TB', 'BT' or 'B'"),
    "contradiction": ((X, Y), {"layout": "TB", "time_first": False}, "contradict each other"),
    "no flag": ((X, Y), {"time_first": "no"}, "time_first='no'"),
    "static image": ((X[0], Y), {}, r"layout='B'"),
    "images": ((torch.rand(BATCH, 1, 2, 3), Y), {}, r"layout='B' for a static input"),
    "static with lengths": ((X[0], Y, torch.ones(BATCH)), {"layout": "B"}, "leave lengths out"),
    "third item": ((X, Y, ["subject"] * BATCH), {}, "third item of a batch is a list"),
    "no inputs among the keys": ({"a": X, "b": X, "label": Y}, {}, "none is an argument of Sequential.forward"),
    "two targets": ({"x": X, "label": Y, "target": Y}, {}, "rename all but one"),
    "words as targets": ((X, ["a"] * BATCH), {}, "targets hold str"),
    "no targets": (X, {}, r"give \(x, y\)"),
    "only inputs": ([X], {}, r"give \(x, y\)"),
    "inputs of unlike axes": (((X, X[:3, :2]), Y), {}, "same samples and time steps"),
    "sequences of unlike features": (([X[:, 0], X[:4, 1], X[:, 2, :2], X[:, 3], X[:, 4]], Y), {}, "list of 5|list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_batches_are_named(name):
    batch, options, says = WRONG[name]
    for use in (lambda: plan(MODEL, batch, **options), lambda: train(MODEL, [batch], 1, progress=False, **options)):
        with pytest.raises(UsageError, match=says):
            use()


def test_lengths_and_a_model_that_reduces_over_time_do_not_meet():
    lengths = torch.tensor([3, 7, 2, 7, 1])
    with pytest.raises(UsageError, match="so that lengths cannot be kept"):
        train(Loop("TB", reduced=True), [(*data(), lengths)], 1, progress=False)
    averaging = nn.Sequential(*MODEL, ulr_snn.TimeAverage())
    train(averaging, [(X, Y, lengths)], 1, progress=False, device="cpu")


def test_lengths_without_padding_are_no_lengths():
    """A model that reduces its outputs over time itself takes them, and lists of equal sequences."""
    x, y = data()
    model = Loop("TB", reduced=True)
    whole = evaluate(model, [(x, y)], device="cpu")
    assert evaluate(model, [(x, y, torch.full((BATCH,), STEPS))], device="cpu") == whole
    assert evaluate(model, [(list(x.transpose(0, 1)), y)], device="cpu") == whole


@pytest.mark.parametrize("samples", [3, 5])
@pytest.mark.parametrize("layout", ["TB", "BT"])
@pytest.mark.parametrize("kind", ["values", "over time", "one over time"])
def test_lists_of_targets_are_as_their_tensor(kind, layout, samples):
    """Vectors as long as the sequences are values of samples, unless outputs have one feature."""
    torch.manual_seed(0)
    steps = outputs = 3
    model = nn.Sequential(nn.Linear(4, 6), ulr_snn.LIF(), nn.Linear(6, 1 if kind == "one over time" else outputs))
    x = (torch.rand(steps, samples, 4) < 0.5).float()
    given = {
        "values": torch.randn(samples, outputs),
        "over time": torch.randn(samples, steps, outputs),
        "one over time": torch.randn(samples, steps),
    }[kind]
    with torch.no_grad():
        seen = model(x)
    goal = given if kind == "values" else given.transpose(0, 1).reshape(seen.shape)
    each = (seen - goal) ** 2
    batch = [(list(x.transpose(0, 1)), list(given))]
    found = evaluate(model, batch, loss="mse", layout=layout, device="cpu")["loss"]
    assert found == pytest.approx(each.sum(2).mean().item(), rel=1e-5)

    def own(result: Tensor, targets: Tensor) -> Tensor:
        assert kind == "values" or result.shape[:2] == targets.shape[:2]
        return ((result - targets.reshape(-1, samples, result.shape[2])) ** 2).mean((0, 2))

    if layout == "TB":
        found = evaluate(model, batch, loss=own, layout=layout, device="cpu")["loss"]
        assert found == pytest.approx(each.mean().item(), rel=1e-5)


# -- layers over other time steps than the events' ---------------------------------------------------------


class EverySecond(nn.Module):
    """Keeps every second time step [T, B, ...], or none of them is left out."""

    def __init__(self, skips: bool = True) -> None:
        super().__init__()
        self.skips = skips

    def forward(self, x: Tensor) -> Tensor:
        return x[::2] if self.skips else x


def strided(kind: str, skips: bool) -> nn.Module:
    """Two layers of neurons that run over whole sequences, and a readout over time."""
    torch.manual_seed(0)
    body: list[nn.Module] = [EverySecond(skips), nn.Linear(INPUTS, 8)]
    if kind == "norse":
        norse = pytest.importorskip("norse.torch")
        p = norse.LSNNParameters(v_th=torch.tensor(0.1))
        return norse.SequentialState(*body, norse.LSNNRecurrent(8, 8, p=p), nn.Linear(8, 3)).double()
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    node = {"scan": neuron.LIFNode, "step by step": neuron.KLIFNode}[kind]
    body += [node(step_mode="m"), nn.Linear(8, 8), node(step_mode="m"), nn.Linear(8, 3)]
    with torch.no_grad():
        body[3].weight *= 5
    return nn.Sequential(*body).double()


@pytest.mark.parametrize("estimator", PASSES, ids=lambda estimator: estimator.credit.name)
@pytest.mark.parametrize("kind", ["scan", "step by step", "norse"])
def test_layers_that_run_over_fewer_steps_are_as_if_the_events_had_as_many(kind, estimator):
    x, y = data(steps=8)
    found, losses = gradients(strided(kind, True), 20 * x, y, estimator)
    expected, others = gradients(strided(kind, False), 20 * x[::2], y, estimator)
    torch.testing.assert_close(losses, others)
    torch.testing.assert_close(found, expected)
    assert any(q.abs().max() > 0 for q in found[:2])


def test_a_stride_over_time_reports_what_the_users_own_code_gives():
    x, y = data(steps=8)
    model = strided("scan", True).float()
    x = 20 * x.float()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.mean(0), targets, reduction="none")

    train(model, [(x, y)], 3, progress=False, device="cpu", loss=loss)
    found = evaluate(model, [(x, y)], activity=True, loss=loss)
    importlib.import_module("spikingjelly.activation_based.functional").reset_net(model)
    fired = []
    for node in (model[2], model[4]):
        node.register_forward_hook(lambda _, __, spikes: fired.append(spikes.sum()))
    with torch.no_grad():
        outputs = model(x)
    assert outputs.shape == (4, BATCH, 3)
    assert found["loss"] == pytest.approx(float(loss(outputs, y).mean()), rel=1e-5)
    assert found["spikes"] == pytest.approx(float(fired[0] + fired[1]) / BATCH)
    assert found["operations"] > found["spikes"]


@pytest.mark.parametrize("kind", ["scan", "step by step", "norse"])
def test_layers_that_run_over_fewer_steps_are_recorded(kind):
    x, y = data(steps=8)
    found = record(strided(kind, True), (20 * x, y))
    assert {tuple(layer.spikes.shape) for layer in found.layers.values()} == {(4, BATCH, 8)}
    for layer in found.layers.values():
        assert torch.equal(layer.spikes > 0, layer.membranes > layer.threshold)


def test_layers_that_run_over_fewer_steps_take_no_lengths_and_no_reward_to_go():
    x, y = data(steps=8)
    go = ULR(Global(reward_to_go=True), copies=4)
    model = nn.Sequential(strided("scan", False), EverySecond())
    with attach(model, go, loss="ce_rate") as ulr, pytest.raises(UsageError, match="reward_to_go needs layers"):
        ulr.backward(x, y)
    with attach(strided("scan", True), ULR()) as ulr, pytest.raises(UsageError, match="runs over other time steps"):
        ulr.backward(x, y, lengths=torch.tensor([8, 7, 6, 5, 4]))


class Between(nn.Module):
    """Two layers, of which the second sees every second time step; it is called in one of several ways."""

    def __init__(self, batch_first: bool = False, whole: bool = True, by_name: bool = False) -> None:
        super().__init__()
        norse = pytest.importorskip("norse.torch")
        torch.manual_seed(0)
        self.batch_first, self.whole, self.by_name = batch_first, whole, by_name
        self.into, self.inner, self.out = nn.Linear(INPUTS, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.first, self.second = (norse.LIF(norse.LIFParameters(v_th=torch.tensor(0.1))) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x.transpose(0, 1) if self.batch_first else x)
        if self.whole:
            spikes, _ = self.first(input_tensor=x) if self.by_name else self.first(x)
        else:
            early, state = self.first(x[:2])
            late, _ = self.first(x[2:], state)
            spikes = torch.cat([early, late])
        outputs = self.out(self.second(self.inner(spikes[::2]))[0])
        return outputs.transpose(0, 1) if self.batch_first else outputs


@pytest.mark.parametrize("other", [{"by_name": True}, {"whole": False}, {"batch_first": True}])
@pytest.mark.parametrize("steps", [6, 8])  # half of 6 is as many as the samples of a trial
def test_ways_to_call_layers_of_other_time_steps_change_no_number(other, steps):
    x, y = data(steps)
    expected, others = gradients(Between().double(), 20 * x, y, ULR())
    layout = "BT" if "batch_first" in other else "TB"
    given = 20 * x.transpose(0, 1) if layout == "BT" else 20 * x
    found, losses = gradients(Between(**other).double(), given, y, ULR(), layout=layout)
    torch.testing.assert_close(losses, others)
    torch.testing.assert_close(found, expected)
    outputs = evaluate(Between(**other), [(given.float(), y)], loss="ce_rate", layout=layout)
    assert outputs["loss"] == evaluate(Between(), [(20 * x.float(), y)], loss="ce_rate")["loss"]


def test_a_model_that_turns_its_axes_is_told_so():
    x, y = data(steps=8)
    with pytest.raises(UsageError, match="runs over the samples as if they were time steps"):
        gradients(Between(batch_first=True).double(), 20 * x, y, ULR())


@pytest.mark.parametrize("options", [{"maps": "learned"}, {"noise": {"inner.weight": WeightNoise(per_sample=True)}}])
def test_what_layers_of_different_time_steps_cannot_have(options):
    x, y = data(steps=8)
    with pytest.raises(UsageError, match=r"same time steps|events' time steps"):
        gradients(Between().double(), 20 * x, y, ULR(**options))


def test_a_layer_of_other_time_steps_in_long_sequences_takes_no_lengths():
    """The model looks as if it kept all time steps where it is tried with few."""
    x = (torch.rand(60, BATCH, INPUTS) < 0.5).float()
    model = nn.Sequential(Beginning(), strided("scan", False).float())
    with pytest.raises(UsageError, match="leave lengths out"):
        evaluate(model, [(x, torch.arange(BATCH) % 3, torch.tensor([60, 50, 40, 30, 20]))])


class Beginning(nn.Module):
    """The first forty time steps."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:40]


def test_rates_and_samples_of_layers_of_other_time_steps():
    x, y = data(steps=8)
    found = record(Between(), (20 * x.float(), y))
    spikes = found.layers["second"].spikes
    assert len(spikes) == 4
    torch.testing.assert_close(found.rates()["second"], spikes.mean((0, 1)))
    assert torch.equal(found.sample(2).layers["second"].spikes, spikes[:, 2:3])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4, 6, 3), [12, 0, 0, 0, 0, 0]),  # [T, B, F]
        ((24, 6, 3), [72, 0, 0, 0, 0, 0]),  # [T * B, N, F], with as many tokens as samples
        ((2, 6, 3), [6, 0, 0, 0, 0, 0]),  # other time steps
        ((9, 6, 3), [27, 0, 0, 0, 0, 0]),
    ],
)
def test_spikes_are_counted_for_their_sample(shape, expected):
    sequence = torch.zeros(shape)
    if shape[0] == 24:
        sequence.unflatten(0, (4, 6))[:, 0] = 1
    else:
        sequence[:, 0] = 1
    activity = Activity(4, 6, None)
    activity.see("spikes", nn.Identity(), sequence)
    activity.finish()
    assert activity["spikes"].tolist() == expected


class Words(nn.Module):
    """Rows of a table at indices [T, B], [B, T] or, for static ones, [B, T], and `Loop` of these."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout, self.loop = layout, Loop("TB", reduced=True)
        self.table = nn.Embedding(9, INPUTS, dtype=torch.float64)
        with torch.no_grad():
            self.table.weight.mul_(2)

    def forward(self, indices: Tensor) -> Tensor:
        return self.loop(self.table(indices if self.layout == "TB" else indices.transpose(0, 1)))


@pytest.mark.parametrize("layout", ["TB", "BT", "B"])
def test_a_model_with_a_table_takes_indices(layout):
    """Refused without an axis of features, or else given as numbers, which torch looks up in no table."""
    indices, y = torch.randint(9, (STEPS, BATCH), generator=torch.Generator().manual_seed(1)), data()[1]
    given, model, rows = indices if layout == "TB" else indices.T, Words(layout), Loop("TB", reduced=True)
    found, losses = gradients(model, given, y, ULR(), layout=layout)
    shown = model.table(indices).detach()
    expected, others = gradients(rows, shown, y, ULR())
    assert torch.equal(losses, others)
    for one, other in zip(found[: len(expected)], expected, strict=True):
        torch.testing.assert_close(one, other)
    assert found[-1].count_nonzero() > 0
    result = train(model, [(given, y)] * 3, 2, layout=layout, val_loader=[(given, y)], progress=False, device="cpu")
    assert result.metrics["steps"] == 6


def test_one_step_of_indices_a_call():
    net = nn.Sequential(nn.Embedding(9, INPUTS), nn.Linear(INPUTS, 8), snn.Leaky(beta=0.9, init_hidden=True))
    indices = torch.randint(9, (STEPS, BATCH), generator=torch.Generator().manual_seed(1))
    found, _ = gradients(nn.Sequential(net, nn.Linear(8, 3)), indices, data()[1], ULR())
    assert all(gradient.count_nonzero() > 0 for gradient in found)
    with pytest.raises(UsageError, match=r"events have shape \(7, 5\)"):
        gradients(net[1:], indices.float(), data()[1], ULR())


def test_a_forward_that_is_replaced_is_asked_again_how_many_inputs_it_takes():
    model = Two()
    assert takes(model) == takes(Two()) == 2
    model.forward = lambda x: x
    assert takes(model) == 1
    del model.forward
    assert takes(model) == 2
    Two.forward, own = lambda self, x, y, z: x, Two.forward
    assert takes(model) == 3
    Two.forward = own
