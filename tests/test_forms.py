"""Forms of inputs and results in which one axis may pass for another, against the user's own figures."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import beside_torchvision
from ulr_snn import ULR, UsageError, attach, diagnose, evaluate, plan, train

snn = pytest.importorskip("snntorch")
INPUTS = 20


class Loop(nn.Module):
    """A loop over the time steps of events [T, B, ...] or [B, T, ...], or over a static input."""

    def __init__(
        self, steps: int | None = None, turned: bool = False, classes: int = 10, reduced: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.steps, self.axis, self.reduced = steps, int(turned), reduced
        self.fc, self.lif, self.out = nn.Linear(INPUTS, 30), snn.Leaky(beta=0.9), nn.Linear(30, classes)

    def forward(self, x: Tensor) -> Tensor:
        mem, outputs = self.lif.init_leaky(), []
        for now in [x] * self.steps if self.steps else x.unbind(self.axis):
            spikes, mem = self.lif(3 * self.fc(now), mem)
            outputs.append(self.out(spikes))
        outputs = torch.stack(outputs, self.axis)
        return outputs.sum(self.axis) if self.reduced else outputs


def loss_of(model: nn.Module, *batch: object, **options: object) -> float:
    return evaluate(model, [batch], device="cpu", **options)["loss"]


def cross_entropy(totals: Tensor, targets: Tensor) -> float:
    return F.cross_entropy(totals.detach(), targets).item()


@pytest.mark.parametrize(("steps", "samples", "classes"), [(10, 4, 10), (10, 10, 10), (1, 4, 2), (2, 4, 2), (3, 3, 3)])
def test_as_many_classes_as_time_steps(steps, samples, classes):
    model, x = Loop(turned=True, classes=classes, reduced=True), torch.rand(samples, steps, INPUTS)
    y = torch.arange(samples) % classes
    own = cross_entropy(model(x), y)
    for loss in ("ce_count", nn.CrossEntropyLoss()):
        found = evaluate(model, [(x, y)], layout="BT", loss=loss, device="cpu")
        assert found["loss"] == pytest.approx(own, rel=1e-5)
        assert found["accuracy"] == (model(x).argmax(1) == y).double().mean().item()
    values = F.one_hot(y, classes).float()
    own = ((model(x) - values) ** 2).sum(1).mean().item()
    assert loss_of(model, x, values, layout="BT", loss="mse") == pytest.approx(own, rel=1e-5)


def test_torchs_own_axes_of_classes():
    class Turned(Loop):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).permute(0, 2, 1)  # [B, C, T]

    model, x, y = Turned(turned=True), torch.rand(4, 10, INPUTS), torch.randint(10, (4, 10))
    own = cross_entropy(model(x), y)
    loss = lambda o, t: F.cross_entropy(o, t, reduction="none").mean(1)  # noqa: E731
    try:
        assert loss_of(model, x, y, layout="BT", loss=loss) == pytest.approx(own, rel=1e-5)
    except UsageError as error:
        assert "returned shape" in str(error)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("samples", [3, 8])
def test_static_inputs_of_few_time_steps(steps, turned, samples):
    x, y = torch.rand(samples, INPUTS), torch.arange(samples) % 3
    model = Loop(steps, turned, classes=3)
    if not (turned and steps == 1):
        own = cross_entropy(model(x).sum(int(turned)), y)
        assert loss_of(model, x, y, layout="B") == pytest.approx(own, rel=1e-5)
    model = Loop(steps, turned, classes=3, reduced=True)
    assert loss_of(model, x, y, layout="B") == pytest.approx(cross_entropy(model(x), y), rel=1e-5)


def test_an_output_by_its_index_is_no_time_step():
    x, y = torch.rand(12, 4, INPUTS), torch.arange(4)
    expected = loss_of(Loop(), x, y)
    assert loss_of(Loop(), x, y, output=0) == loss_of(Loop(), x, y, output=-1) == expected
    with pytest.raises(UsageError, match="is one tensor"):
        loss_of(Loop(), x, y, output=3)


@pytest.mark.parametrize("layout", ["TB", "BT", "B"])
def test_lists_of_time_steps_are_stacked(layout):
    class Listed(Loop):
        pair = False

        def forward(self, x: Tensor) -> object:
            outputs = list(super().forward(x).unbind(self.axis))
            return (outputs, outputs) if self.pair else outputs

    axis = int(layout == "BT")
    x, y = torch.rand(12, 4, INPUTS), torch.arange(4)
    x = {"TB": x, "BT": x.transpose(0, 1), "B": x[0]}[layout]
    steps = 12 if layout == "B" else None
    own = cross_entropy(Loop(steps, bool(axis))(x).sum(axis), y)
    for pair in (False, True):
        model = Listed(steps, bool(axis))
        model.pair = pair
        assert loss_of(model, x, y, layout=layout) == pytest.approx(own, rel=1e-5)
    train(model, [(x, y)], 1, layout=layout, device="cpu", progress=False)


class Box(nn.Module):
    """A neuron that no library knows, and that takes its state as an argument."""

    def forward(self, current: Tensor, mem: Tensor) -> tuple[Tensor, Tensor]:
        mem = 0.9 * mem + current
        spikes = (mem > 1).float()
        return spikes, mem - spikes


class Cell(nn.Module):
    """Takes one time step and its state. Its code takes a whole sequence too, as if it were one step."""

    def __init__(self, neuron: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.lif, self.out = nn.Linear(INPUTS, 30), neuron or Box(), nn.Linear(30, 10)

    def step(self, x: Tensor, mem: Tensor | None) -> tuple[Tensor, Tensor]:
        spikes, mem = self.lif(3 * self.fc(x), torch.zeros(30) if mem is None else mem)
        return self.out(spikes), mem

    def forward(self, x: Tensor, state: Tensor | None = None) -> object:
        return self.step(x, state)


class ByName(Cell):
    def forward(self, x: Tensor, *, mem: Tensor | None = None) -> object:
        out, mem = self.step(x, mem)
        return {"out": out, "mem": mem}


class StateFirst(Cell):
    def forward(self, x: Tensor, hidden: Tensor | None = None) -> object:
        return self.step(x, hidden)[::-1]


@pytest.mark.parametrize("kind", [Cell, ByName, StateFirst])
@pytest.mark.parametrize("known", [False, True])
def test_no_form_of_a_state_is_lost(kind, known):
    x, y = torch.rand(12, 4, INPUTS), torch.arange(4)
    neuron = snn.Leaky(beta=0.9) if known else None
    model, state, total = kind(neuron), None, 0
    for now in x:
        out, state = model.step(now, state)
        total = total + out
    output = 1 if kind is StateFirst else None
    assert loss_of(model, x, y, output=output) == pytest.approx(cross_entropy(total, y), rel=1e-5)
    assert any("state that it returned" in line for line in plan(model, (x, y), output=output).engine)


def test_a_mask_is_no_state_and_a_state_needs_a_default():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.lif, self.out = nn.Linear(INPUTS, 30), snn.Leaky(0.9, init_hidden=True), nn.Linear(30, 10)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
            spikes = self.lif(3 * self.fc(x))
            spikes = spikes if mask is None else spikes * mask
            return self.out(spikes), spikes

    class Needing(Cell):
        def forward(self, x: Tensor, mem: Tensor) -> object:
            return self.step(x, mem)

    x, y = torch.rand(12, 4, INPUTS), torch.arange(4)
    model = Masked()
    found = loss_of(model, x, y)
    model.lif.reset_mem()
    assert found == pytest.approx(cross_entropy(sum(model(now)[0] for now in x), y), rel=1e-5)
    with pytest.raises(UsageError, match="needs the state 'mem'; give it the default None"):
        loss_of(Needing(), x, y)


def test_a_neuron_that_keeps_its_state_is_called_by_time_step():
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mem = 0.0

        def forward(self, current: Tensor) -> Tensor:
            self.mem = 0.9 * self.mem + current
            spikes = (self.mem > 1).float()
            self.mem = self.mem - spikes
            return spikes

    torch.manual_seed(0)
    x, y = torch.rand(12, 4, INPUTS), torch.arange(4)
    model = nn.Sequential(nn.Linear(INPUTS, 30), Keeping(), nn.Linear(30, 10))
    found = loss_of(model, x, y)
    assert found == pytest.approx(cross_entropy(sum(model(now) for now in x), y), rel=1e-5)
    model[1].mem = 0.0
    assert [site for site, *_ in plan(model, (x, y)).sites] == ["1"]


def test_evaluation_leaves_events_as_they_are():
    class Doubling(Loop):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    x, y = torch.rand(12, 4, INPUTS), torch.arange(4)
    kept = x.clone()
    found = loss_of(Doubling(), x, y)
    assert torch.equal(x, kept) and found == pytest.approx(cross_entropy(Loop()(2 * x).sum(0), y), rel=1e-5)
    evaluate(Doubling(), [(x, y)], samples=2, device="cpu")
    assert torch.equal(x, kept)


class Squared(nn.Module):
    """A loss object of one's own."""

    reduction = "mean"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        each = ((outputs - targets) ** 2).mean(-1)
        return each.mean() if self.reduction == "mean" else each


def test_loss_objects_of_ones_own():
    x, values = torch.rand(5, 5, INPUTS), torch.rand(5, 5, 10)
    losses = []
    for loss in (Squared(), lambda o, t: ((o - t) ** 2).mean((1, 2))):
        with attach(Loop(turned=True), loss=loss, layout="BT", seed=1) as ulr:
            losses.append(ulr.backward(x, values).loss)
    torch.testing.assert_close(*losses)

    class OfTree(Squared):
        def forward(self, outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
            return super().forward(outputs, targets["a"] + targets["b"])

    tree = {"a": values, "b": torch.zeros(5, 5, 10)}
    assert loss_of(Loop(), x, tree, loss=OfTree()) == pytest.approx(loss_of(Loop(), x, values, loss=Squared()))


def test_losses_of_torch_without_padding_and_as_functions():
    x, labels, lengths = torch.rand(12, 4, INPUTS), torch.randint(10, (12, 4)), torch.tensor([12, 3, 5, 6])
    own = torch.arange(12)[:, None] < lengths
    masked = x * own[..., None]
    model = Loop()
    each = F.cross_entropy(model(masked).flatten(0, 1), labels.flatten(), reduction="none").view(12, 4)
    found = loss_of(model, masked, labels, lengths, loss=nn.CrossEntropyLoss())
    assert found == pytest.approx(each[own].mean().item(), rel=1e-4)
    some = torch.tensor([0, -100, 2, 3])
    reduced = Loop(reduced=True)
    assert loss_of(reduced, x, some, loss=F.cross_entropy) == pytest.approx(cross_entropy(reduced(x), some), rel=1e-5)
    for loss, says in ((nn.CrossEntropyLoss, "give an object"), (F.cross_entropy, "use loss='ce_rate'")):
        with pytest.raises(UsageError, match=says):
            loss_of(model, x, some, loss=loss)
    flags = torch.rand(4, 10) < 0.5
    assert loss_of(reduced, x, flags, loss="mse") == pytest.approx(loss_of(reduced, x, flags.float(), loss="mse"))


def test_a_whole_result_with_one_tensor():
    class Named(Loop):
        def forward(self, x: Tensor) -> object:
            return {"spk": super().forward(x), "name": "net"}

    x, y = torch.rand(12, 4, INPUTS), torch.arange(4)
    loss = lambda result, t: F.cross_entropy(result["spk"].sum(0), t, reduction="none")  # noqa: E731
    train(Named(), [(x, y)], 1, output="all", loss=loss, device="cpu", progress=False)
    assert loss_of(Named(), x, y, output="all", loss=loss) == pytest.approx(loss_of(Loop(), x, y), rel=1e-5)
    with pytest.raises(UsageError, match="reads one output, but output= chose several"):

        class Two(Loop):
            def forward(self, x: Tensor) -> object:
                return (out := super().forward(x)), out.sum(0)

        loss_of(Two(), x, y, output="all", loss=nn.CrossEntropyLoss())


def test_residual_credit_of_membranes():
    class Membranes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.lif = nn.Linear(INPUTS, 10), snn.Leaky(0.9)

        def forward(self, x: Tensor) -> Tensor:
            mem, outputs = self.lif.init_leaky(), []
            for now in x:
                _, mem = self.lif(self.fc(now), mem)
                outputs.append(mem)
            return torch.stack(outputs)

    x, y = torch.rand(12, 4, INPUTS), torch.arange(4)
    train(Membranes(), [(x, y)] * 2, 1, estimator=ULR(credit="residual", copies=4), device="cpu", progress=False)
    assert diagnose(Membranes(), (x, y), draws=4, reference_draws=8).rows


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_two_inputs_of_a_small_batch_are_no_sequences(samples):
    class Two(Loop):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return super().forward(torch.cat([left, right], -1))

    parts, y = [torch.rand(samples, 7, 10), torch.rand(samples, 7, 10)], torch.arange(samples)
    own = cross_entropy(Loop(turned=True)(torch.cat(parts, -1)).sum(1), y)
    assert loss_of(Two(turned=True), parts, y, layout="BT") == pytest.approx(own, rel=1e-5)
    static = Two(steps=4)
    own = cross_entropy(static(parts[0][:, 0], parts[1][:, 0]).sum(0), y)
    assert loss_of(static, [part[:, 0] for part in parts], y, layout="B") == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("kind", [list, tuple])
def test_sequences_of_a_small_batch_are_no_inputs(samples, kind):
    class Flat(Loop):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(2))

    x, y = torch.rand(samples, 7, 2, 10), torch.arange(samples)
    own = cross_entropy(Loop()(x.flatten(2).transpose(0, 1)).sum(0), y)
    assert loss_of(Flat(), kind(x.unbind(0)), y) == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("lengths", [(12, 5, 7), (6, 6, 6)])
@pytest.mark.parametrize("layout", ["TB", "BT"])
def test_sequences_with_targets_of_their_own(layout, lengths):
    model = Loop(turned=layout == "BT")
    xs, ys = [torch.rand(t, INPUTS) for t in lengths], [torch.randint(10, (t,)) for t in lengths]
    plain = Loop()
    each = [F.cross_entropy(plain(x[:, None])[:, 0], y) for x, y in zip(xs, ys, strict=True)]
    own = torch.stack(each).mean().item()
    assert loss_of(model, xs, ys, loss="ce_rate", layout=layout) == pytest.approx(own, rel=1e-4)
    values = [F.one_hot(y, 10).float() for y in ys]
    own = sum(((plain(x[:, None])[:, 0] - v) ** 2).sum(1).mean().item() for x, v in zip(xs, values, strict=True)) / 3
    assert loss_of(model, xs, values, loss="mse", layout=layout) == pytest.approx(own, rel=1e-4)
    classes = [torch.tensor(i) for i in range(3)]
    assert loss_of(model, xs, classes, layout=layout) == pytest.approx(loss_of(model, xs, [0, 1, 2], layout=layout))
    packed = nn.utils.rnn.pack_sequence(xs, enforce_sorted=False)
    assert loss_of(model, packed, [0, 1, 2], layout=layout) == pytest.approx(
        loss_of(model, xs, [0, 1, 2], layout=layout)
    )


def test_inputs_keep_their_types():
    class Tokens(Loop):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, INPUTS)

        def forward(self, x: Tensor, token: Tensor, mask: Tensor) -> Tensor:
            assert mask.dtype == torch.bool and not token.is_floating_point()
            return super().forward(torch.where(mask[..., None], x, 0.0) + self.embedding(token))

    x, token, mask = torch.rand(12, 4, INPUTS), torch.tensor([0, 1, 4, 2]), torch.rand(12, 4) < 0.5
    model, y = Tokens(), torch.arange(4)
    own = cross_entropy(model(x, token, mask).sum(0), y)
    assert loss_of(model, {"token": token, "x": x, "mask": mask}, y) == pytest.approx(own, rel=1e-5)


def test_a_model_of_one_time_step():
    class Fixed(Loop):
        def forward(self, x: Tensor) -> Tensor:
            assert len(x) == 1
            return super().forward(x)

    x, y = torch.rand(1, 4, INPUTS), torch.arange(4)
    assert loss_of(Fixed(), x, y) == pytest.approx(cross_entropy(Loop()(x).sum(0), y), rel=1e-5)


def test_probabilities_of_as_many_classes_as_steps_and_samples():
    x, y = torch.rand(4, 4, INPUTS), torch.rand(4, 4).softmax(-1)
    model = Loop(classes=4)
    assert loss_of(model, x, y) == pytest.approx(cross_entropy(model(x).sum(0), y), rel=1e-5)


def test_models_that_take_all_inputs_as_one():
    class OfDict(Loop):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return super().forward(torch.cat([batch["left"], batch["right"]], -1))

    class OfList(Loop):
        def forward(self, parts: list[Tensor]) -> Tensor:
            return super().forward(torch.cat(list(parts), -1))

    x, y = torch.rand(7, 4, INPUTS), torch.arange(4)
    own = cross_entropy(Loop()(x).sum(0), y)
    parts = {"left": x[..., :8], "right": x[..., 8:]}
    assert loss_of(OfDict(), parts, y) == pytest.approx(own, rel=1e-5)
    assert loss_of(OfList(), tuple(parts.values()), y) == pytest.approx(own, rel=1e-5)


def test_collections_of_metrics():
    metrics = beside_torchvision("torchmetrics")
    x, y = torch.rand(7, 4, INPUTS), torch.arange(4)
    both = metrics.MetricCollection(
        {
            "a": metrics.Accuracy(task="multiclass", num_classes=10),
            "f": metrics.F1Score(task="multiclass", num_classes=10),
        }
    )
    found = evaluate(Loop(), [(x, y)], metrics={"m": both}, device="cpu")
    assert found["m_a"] == pytest.approx(found["accuracy"]) and "m_f" in found
    with pytest.raises(UsageError, match="returned dict"):
        evaluate(Loop(), [(x, y)], metrics={"m": lambda o, t: {}}, device="cpu")
