"""Updates at every time step: the gradient is that of its own loss, with all that membranes keep of their inputs."""

import gc
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ulr_snn
from benchmarks import memory
from tests.helpers import library_of, only_new_objects
from ulr_snn import LIF, ULR, Fold, LeakyReadout, Logistic, Online, RecurrentLIF, TimeAverage, UsageError, attach
from ulr_snn.kernels.limits import limits
from ulr_snn.memory.chunks import TimeChunks
from ulr_snn.memory.one_step import Trace

STEPS, BATCH, SCALE = 17, 6, 0.3
LENGTHS = [17, 4, 9, 17, 13, 1]


def one_layer() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(2), nn.Linear(12, 9), LIF(reset="none"), nn.Linear(9, 3)).double()


def convolution() -> nn.Sequential:
    torch.manual_seed(0)
    pooled = Fold(nn.Conv2d(1, 3, 3, padding=1), nn.AvgPool2d((1, 2)))
    return nn.Sequential(
        nn.Unflatten(2, (1, 3)), pooled, LIF(0.7, reset="none"), Fold(nn.MaxPool2d((3, 1))), nn.Flatten(2),
        nn.Linear(6, 3),
    ).double()  # fmt: skip


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    hidden = RecurrentLIF(9), nn.Linear(9, 9), LIF(0.8, 1.2)
    return nn.Sequential(nn.Flatten(2), nn.Linear(12, 9), *hidden, nn.Linear(9, 3), LeakyReadout(0.6)).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return (torch.rand(STEPS, BATCH, 3, 4, generator=generator) < 0.4).double() * 3, torch.arange(BATCH) % 3


def estimator(memory: str = "online", **options: object) -> ULR | Online:
    """Of constant scale: that at the start is measured by fewer samples than over the whole sequence."""
    options = {"firing": Logistic(scale=SCALE, secants=0), "maps": "learned", **options}
    return Online(**options) if memory == "online" else ULR(memory=memory, **options)


def third_step(
    model, memory="online", loss="ce_rate", lengths=None, **options
) -> tuple[list[Tensor], list[Tensor], dict]:
    """Gradients, spikes of each layer, and the feedback that the step goes by."""
    x, y = data()
    lengths = lengths and torch.tensor(lengths)
    targets = torch.eye(3).double()[y] if loss == "mse" else y
    fired: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: fired.setdefault(name, []).append(out.detach()))
        for name, module in model.named_modules()
        if isinstance(module, LIF)
    ]
    with attach(model, estimator(memory, **options), loss, seed=1, total_steps=20) as ulr:
        for _ in range(2):
            ulr.backward(x, targets, lengths=lengths)
        model.zero_grad()
        feedback = {name: weight.clone() for name, weight in ulr.learner.feedback.layers.items()}
        fired.clear()
        ulr.backward(x, targets, lengths=lengths)
    for hook in hooks:
        hook.remove()
    return [q.grad for q in model.parameters()], [torch.cat(s) for s in fired.values()], feedback


def distance(mine: list[Tensor], others: list[Tensor]) -> float:
    """The largest of the parameters' relative errors."""
    assert all(other.any() for other in others)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(mine, others, strict=True))


@pytest.mark.product
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["", "lengths"])
@pytest.mark.parametrize("loss", ["ce_rate", "mse", {"ce_rate": 0.7}], ids=["ce_rate", "mse", "weighted"])
@pytest.mark.parametrize("make", [one_layer, convolution])
@pytest.mark.parametrize("options", [{}, {"maps": "exact", "firing": Logistic(scale=SCALE)}], ids=["learned", "exact"])
def test_where_spikes_reach_their_own_step_alone_the_sum_is_the_whole_gradient(make, loss, lengths, options):
    whole, spikes, _ = third_step(make(), "auto", loss, lengths, **options)
    ours, seen, _ = third_step(make(), "online", loss, lengths, **options)
    assert all(map(torch.equal, seen, spikes)) and spikes[0].any()
    assert distance(ours, whole) < 1e-9


@pytest.mark.parametrize("make", [one_layer, convolution])
@pytest.mark.parametrize("wrong", ["n", "leak"])
def test_what_membranes_keep_of_offsets_and_inputs_would_be_missed(make, wrong, monkeypatch):
    whole, _, _ = third_step(make(), "auto")
    add = Trace.add

    def forgetful(self, x):
        if wrong == "leak":
            self.beta = torch.zeros_like(self.beta)
        add(self, x)
        self.n = torch.ones_like(self.n)

    monkeypatch.setattr(Trace, "add", forgetful)
    assert distance(third_step(make(), "online")[0], whole) > 1e-2


def by_hand(model: nn.Sequential, spikes: list[Tensor], c: Tensor, wrong: str = "") -> list[Tensor]:
    """The truncated formula in plain loops over time, of these spikes and feedback c [first layer, second].

    For each time step t: credit of the readout, of the second and of the first layer; then for each earlier step k what
    the membrane at t has kept of the input at k."""
    x, y = data()
    x = x.flatten(2)
    first, neurons1, second, neurons2, out, readout = list(model)[1:]
    beta1, beta2, beta3 = (float(module.beta) for module in (neurons1, neurons2, readout))  # in single precision
    threshold2 = float(neurons2.threshold)
    s1, s2 = spikes
    u1, u2, u3 = torch.zeros(BATCH, 9).double(), torch.zeros(BATCH, 9).double(), torch.zeros(BATCH, 3).double()
    before1, before2 = torch.zeros_like(u1), torch.zeros_like(u2)
    g2_before = torch.zeros_like(u2)
    past1 = [torch.zeros_like(s1[0]), *s1[:-1]]
    found = {q: torch.zeros_like(q) for q in model.parameters()}

    def add(weight: Tensor, bias: Tensor | None, beta: float, inputs: Tensor | list[Tensor], t: int, g: Tensor) -> None:
        for k in range(t + 1):
            kept = {"no trace": float(k == t), "no leak": 1.0}.get(wrong, beta ** (t - k))
            for b in range(BATCH):
                found[weight] += kept * torch.outer(g[b], inputs[k][b])
                if bias is not None:
                    found[bias] += kept * g[b]

    with torch.no_grad():
        for t in range(STEPS):
            u1 = beta1 * u1 + first(x[t]) + neurons1.recurrent(before1) - before1
            u2 = beta2 * u2 + second(s1[t]) - threshold2 * before2
            u3 = beta3 * u3 + out(s2[t])
            before1, before2 = s1[t], s2[t]
            p1, p2 = torch.sigmoid((u1 - 1) / SCALE), torch.sigmoid((u2 - threshold2) / SCALE)
            e = (u3.softmax(1) - torch.eye(3)[y]) / STEPS / BATCH
            g2 = (e @ out.weight) * p2 * (1 - p2) / SCALE
            into = g2_before if wrong == "late" else g2
            g1 = into @ (c if wrong == "transposed" else c.T) * p1 * (1 - p1) / SCALE
            g2_before = g2
            add(out.weight, out.bias, beta3, s2, t, e)
            add(second.weight, second.bias, beta2, s1, t, g2)
            add(first.weight, first.bias, beta1, x, t, g1)
            add(neurons1.recurrent.weight, None, beta1, past1, t, g1)
    return list(found.values())


def test_the_gradient_is_the_truncated_formula_and_no_other():
    model = two_layers()
    ours, spikes, feedback = third_step(model)
    c = feedback["2 -> 4"]
    assert all(s.any() for s in spikes) and (c - c.T).norm() > 0.1 * c.norm()
    assert distance(ours, by_hand(model, spikes, c)) < 1e-9
    for wrong in ("no trace", "no leak", "late", "transposed"):
        assert distance(ours, by_hand(model, spikes, c, wrong)) > 1e-2, wrong


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["", "lengths"])
def test_spikes_are_those_of_the_whole_sequence(lengths):
    _, whole, _ = third_step(two_layers(), "auto", lengths=lengths)
    _, ours, _ = third_step(two_layers(), "online", lengths=lengths)
    assert all(map(torch.equal, ours, whole))


def test_padding_leaves_no_trace_in_gradients():
    x, y = data()
    found = []
    for steps in (STEPS, 13):  # all are at most 13 long
        model, lengths = two_layers(), torch.tensor(LENGTHS).clamp(max=13)
        with attach(model, estimator(), "ce_rate") as ulr:
            estimate = ulr.backward(x[:steps], y, lengths=lengths)
        found.append([q.grad for q in model.parameters()])
        assert estimate.outputs.shape == (1, steps, BATCH, 3)
    assert distance(*found) < 1e-12


def test_one_step_after_another_in_ones_own_loop():
    x, y = data()
    model = two_layers()
    start = model[1].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with attach(model, estimator(), "ce_rate") as ulr:
        first = ulr.backward(x, y)
        passes = ulr.forward_passes
        optimizer.zero_grad()
        times, loss = [], 0
        for estimate in ulr.steps(x, y):
            optimizer.step()
            optimizer.zero_grad()
            times.append(estimate.stats["time"])
            loss = loss + estimate.loss
            assert estimate.outputs.shape == (1, 1, BATCH, 3)
            model(x)  # nothing is bound in between
        assert ulr.forward_passes == passes + BATCH and ulr.learner.step == 2
    assert times == list(range(STEPS)) and loss.shape == first.loss.shape == (BATCH,)
    assert (model[1].weight - start).norm() > 0


def test_sparse_events_and_frames_agree(monkeypatch):
    monkeypatch.setattr(limits, "fewest", 1)
    torch.manual_seed(0)
    x, y = (torch.rand(9, 8, 300) < 0.04).to(torch.uint8), torch.arange(8) % 3
    found = []
    for frames in (x, x.half()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(300, 20), LIF(0.9, 0.2), nn.Linear(20, 3), LIF(0.9, 0.2))
        with attach(model, estimator(), "ce_rate", seed=1) as ulr:
            ulr.backward(frames, y)
        found.append([q.grad for q in model.parameters()])
    assert distance(*found) < 1e-5


# -- what it cannot do -----------------------------------------------------------------------------------------


def net(*modules: nn.Module, into: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(2), nn.Linear(12, 9), *modules, into or LIF(), nn.Linear(9, 3)).double()


class Backwards(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(0)


WRONG = {
    "sum over time, as 'ce_rate' and 'mse' are": (net(), {"loss": "ce_count"}),
    "TimeAverage leaves": (net(LIF(), TimeAverage(), nn.Linear(9, 9), into=nn.Identity()), {}),
    "learns its leak or threshold": (net(into=LIF(learn_beta=True)), {}),
    "a leak of each neuron's own": (net(into=LIF(torch.linspace(0.5, 0.9, 9))), {}),
    "reset 'zero'": (net(into=LIF(reset="zero")), {}),
    "LeakyReadout is not the last": (net(LeakyReadout()), {}),
    "ReLU, .* is not known to be affine": (net(nn.ReLU()), {}),
    "single sample": (net(), {"x": data()[0][:, :1], "y": data()[1][:1]}),
    "time step by itself": (nn.Sequential(Backwards(), *net()), {}),
}


@pytest.mark.parametrize("says", WRONG)
def test_what_it_cannot_do_is_refused(says):
    model, options = WRONG[says]
    (x, y), loss = data(), options.pop("loss", "ce_rate")
    x, y = options.pop("x", x), options.pop("y", y)
    with attach(model, estimator(**options), loss) as ulr, pytest.raises(UsageError, match=says):
        ulr.steps(x, y)
    with pytest.raises(UsageError, match=says):
        ulr_snn.plan(model, (x, y), estimator(**options), loss)


def test_older_spellings_still_work():
    with pytest.warns(DeprecationWarning, match="Online"):
        older = ULR(memory="stream")
    with attach(net(), older, "ce_rate") as ulr, pytest.warns(DeprecationWarning, match=r"ulr\.steps"):
        assert len(list(ulr.stream(*data()))) == STEPS


def test_updates_at_every_time_step_are_asked_for():
    with attach(net(), estimator("auto"), "ce_rate") as ulr:
        assert not ulr.online and len(list(ulr.steps(*data()))) == 1
        with pytest.raises(UsageError, match="Online"):
            ulr.stream(*data())
    with pytest.raises(UsageError, match="accumulate"):
        ulr_snn.train(net(), [data()], estimator=estimator(), loss="ce_rate", accumulate=2, progress=False)


def test_losses_that_are_not_finite():
    x, y = data()
    for kind in ("stop", "skip"):
        model = net()
        with attach(model, estimator(on_nonfinite=kind), "ce_rate") as ulr:
            ulr.backward(x, y)
            model.zero_grad()
            steps = ulr.steps(x, y)
            next(steps)
            before = [q.grad.clone() for q in model.parameters()]
            with torch.no_grad():
                model[-1].bias.fill_(float("nan"))
            if kind == "stop":
                with pytest.raises(FloatingPointError):
                    next(steps)
            else:
                assert next(steps).stats["skipped"] and all(
                    map(torch.equal, before, [q.grad for q in model.parameters()])
                )


def test_the_plan_says_what_a_step_keeps():
    text = str(ulr_snn.plan(two_layers(), data(), estimator(), "ce_rate"))
    assert "memory: one time step, with an update after each" in text


# -- training --------------------------------------------------------------------------------------------------


def digits(samples: int):
    train, test = ulr_snn.data.load("digits")
    train = train.subset(range(samples))
    return ulr_snn.data.loader(train, batch_size=32, shuffle=True), ulr_snn.data.loader(test, batch_size=128)


def readout_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(2), nn.Linear(512, 64), LIF(), nn.Linear(64, 32), LIF(), nn.Linear(32, 10), LeakyReadout()
    )


@pytest.mark.slow
def test_training_learns_digits():
    loader, test = digits(512)
    model = readout_net()
    result = ulr_snn.train(model, loader, epochs=4, estimator=Online(), loss="ce_rate", progress=False)
    assert result.metrics["steps"] == 4 * 16  # batches, not time steps
    assert ulr_snn.evaluate(model, test, loss="ce_rate")["accuracy"] > 0.8
    assert result.history[-1]["train_accuracy"] > 0.8 and result.history[-1]["forward_passes"] >= 512


class Interrupted(Exception):
    pass


def test_a_resumed_training_goes_on_with_the_same_steps(tmp_path):
    train = ulr_snn.data.load("digits")[0].subset(range(96))

    def run(interrupted: bool = False, **options: object) -> list[Tensor]:
        def interrupt(entry: dict, _: nn.Module) -> None:
            if interrupted and entry["epoch"] == 2:  # the first epoch has its checkpoint
                raise Interrupted

        loader = ulr_snn.data.loader(train, batch_size=32, shuffle=True)
        given = {"estimator": Online(), "loss": "ce_rate", "progress": False, "callbacks": [interrupt]}
        model = readout_net()
        ulr_snn.train(model, loader, 3, **given, **options)
        return list(model.parameters())

    whole = run()
    with pytest.raises(Interrupted):
        run(True, run_dir=tmp_path)
    assert all(map(torch.equal, whole, run(run_dir=tmp_path, resume=True)))


# -- memory ----------------------------------------------------------------------------------------------------


def test_nothing_is_kept_of_steps_that_are_over():
    x, y = (torch.rand(120, 4, 12) < 0.4).double(), torch.arange(4) % 3
    model = two_layers()[1:]
    kept = []
    with only_new_objects(), attach(model, estimator(), "ce_rate") as ulr:
        ulr.backward(x, y)
        for t, _ in enumerate(ulr.steps(x, y)):
            if t in (60, 118):
                gc.collect()
                kept.append(sum(o.numel() for o in gc.get_objects() if issubclass(type(o), Tensor)))
    assert kept[0] == kept[1]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_number_of_time_steps():
    short, long = (memory.fresh("recurrent", "ulr stream", steps, 100) for steps in (20, 100))
    assert long < 1.1 * short + 1  # MB; peaks of the same process differ by a quarter of that


def test_estimators_are_values():
    """They can be keys, and a training leaves nothing in them."""
    with pytest.warns(DeprecationWarning):
        earlier = ULR(memory="stream")
    x, y = (torch.rand(5, 3, 6) < 0.5).float(), torch.tensor([0, 1, 2])
    for estimator in (Online(), earlier, ULR(memory=TimeChunks())):
        before = hash(estimator), len(pickle.dumps(estimator))
        model = nn.Sequential(nn.Linear(6, 5), LIF(), nn.Linear(5, 3))
        with attach(model, estimator, "ce_rate") as ulr:
            ulr.backward(x, y)
        assert (hash(estimator), len(pickle.dumps(estimator))) == before
    assert Online(firing=None, noise=None, flow=None) == Online()


def test_a_time_loop_of_snntorch_learns_online():
    snn = library_of("snntorch")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.lif1 = nn.Linear(12, 9), snn.Leaky(beta=0.9)
            self.fc2, self.lif2 = nn.Linear(9, 3), snn.Leaky(beta=0.9)

        def forward(self, x: Tensor) -> Tensor:
            one, two, outputs = self.lif1.init_leaky(), self.lif2.init_leaky(), []
            for step in x:
                spikes, one = self.lif1(self.fc1(step.flatten(1)), one)
                spikes, two = self.lif2(self.fc2(spikes), two)
                outputs.append(spikes)
            return torch.stack(outputs)

    model = Net()
    own = nn.Sequential(nn.Flatten(2), model.fc1, LIF(0.9), model.fc2, LIF(0.9))
    x, y, found = 2 * torch.rand(6, 4, 3, 4), torch.tensor([0, 1, 2, 0]), []
    for each in (model, own):
        each.zero_grad()
        with attach(each, Online(), "ce_rate", seed=2) as ulr:
            ulr.backward(x, y)
        found.append([q.grad.clone() for q in (*model.fc1.parameters(), *model.fc2.parameters())])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)
