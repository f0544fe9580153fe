"""Results and targets as people bring them: several outputs, targets over time, losses of libraries, own metrics."""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import beside_torchvision
from ulr_snn import LIF, ULR, LeakyReadout, TimeAverage, UsageError, attach, compare, evaluate, plan, train

STEPS, BATCH, INPUTS, CLASSES = 7, 5, 6, 3
unread = pytest.mark.filterwarnings("ignore:no gradient reaches")  # of a head that no loss reads
Pair = namedtuple("Pair", "first second")
CPU = {"device": "cpu", "progress": False}


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


FORMS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"logits": a, "hidden": b},
    "namedtuple": lambda a, b: Pair(a, b),
    "dataclass": lambda a, b: Output(a, b),
}
FIRST = {"tuple": 0, "list": 0, "dict": "logits", "namedtuple": 0, "dataclass": "logits"}
SECOND = {"tuple": 1, "list": -1, "dict": "hidden", "namedtuple": "second", "dataclass": "hidden"}


class Heads(nn.Module):
    """Two readouts of one hidden layer: one over time, one summed over time."""

    def __init__(self, form: str = "tuple") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = FORMS[form]
        self.into, self.lif = nn.Linear(INPUTS, 16), LIF()
        self.a, self.b = nn.Linear(16, CLASSES), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> object:
        spikes = self.lif(self.into(x))
        return self.form(self.a(spikes), self.b(spikes).sum(0))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(STEPS, BATCH, INPUTS, generator=generator) < 0.5).float() * 2, torch.arange(BATCH) % CLASSES


def gradients(
    model: nn.Module, x: object, y: object, loss: object, lengths: Tensor | None = None, **options: object
) -> dict[str, Tensor]:
    model.zero_grad()
    with attach(model, loss=loss, seed=3, **options) as ulr:
        for _ in range(2):
            ulr.backward(x, y, lengths=lengths)
    return {name: q.grad.clone() for name, q in model.named_parameters() if q.grad is not None and q.grad.any()}


def second(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


@unread
@pytest.mark.parametrize("form", FORMS)
def test_what_the_loss_reads(form):
    """Every way to choose an output gives the gradient of the model that returns it alone."""

    class Alone(Heads):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[self.which]

    x, y = data()
    alone = Alone()
    for which, loss, name in ((0, "ce_count", FIRST[form]), (1, second, SECOND[form])):
        alone.which = which
        expected = gradients(alone, x, y, loss)
        chosen = FORMS[form](0, 1)
        pick = (lambda result, name=name: result[name]) if isinstance(chosen, dict) else None
        for output in (name, pick, None if which == 0 else name):
            if output is None and which:
                continue
            found = gradients(Heads(form), x, y, loss, output=output)
            assert found.keys() == expected.keys()
            for key, g in expected.items():
                torch.testing.assert_close(found[key], g)
    assert {"b.weight"} & gradients(Heads(form), x, y, second, output=SECOND[form]).keys()
    assert not {"b.weight", "b.bias"} & gradients(Heads(form), x, y, "ce_count").keys()


@unread
def test_a_loss_of_all_outputs():
    """Its value is the user's own, and its gradient the sum of those of the parts."""

    def loss(result: Output, targets: Tensor) -> Tensor:
        assert isinstance(result, Output) and result.logits.ndim == 3 and result.hidden.shape[1] == 4
        return 2 * F.cross_entropy(result.logits.sum(0), targets, reduction="none") + second(result.hidden, targets)

    x, y = data()
    model = Heads("dataclass")
    with torch.no_grad():
        assert evaluate(model, [(x, y)], loss=loss, output="all", device="cpu")["loss"] == pytest.approx(
            loss(model(x), y).mean().item()
        )
    with attach(model, loss=loss, output="all", seed=3) as ulr:
        estimate = ulr.backward(x, y)
    assert estimate.outputs.logits.shape == (1, STEPS, BATCH, CLASSES) and estimate.outputs.hidden.shape == (
        1,
        BATCH,
        4,
    )
    whole = gradients(model, x, y, loss, output="all")
    parts = gradients(model, x, y, "ce_count"), gradients(model, x, y, second, output="hidden")
    for name in ("a.weight", "b.weight"):
        torch.testing.assert_close(whole[name], 2 * parts[0].get(name, 0) + parts[1].get(name, 0))
    result = train(model, [(x, y)] * 20, 5, loss=loss, output="all", val_loader=[(x, y)], **CPU)
    assert result.history[-1]["val_loss"] < 0.5 * result.history[0]["val_loss"]
    assert result.history[-1]["val_accuracy"] is None


@unread
def test_a_loss_of_ones_own_has_to_choose():
    x, y = data()
    for use in (
        lambda o: plan(Heads(), (x, y), loss=second, output=o),
        lambda o: train(Heads(), [(x, y)], 1, loss=second, output=o, **CPU),
    ):
        with pytest.raises(UsageError, match=r"returns 2 outputs.*choose by output="):
            use(None)
        use(1)
    assert "outputs: the loss reads the first, of 2 that the model returns" in plan(Heads(), (x, y)).engine
    for wrong, says in (
        (2, "no part of the model's result"),
        ("logits", "no part"),
        (1.5, "no index, key or function"),
    ):
        with pytest.raises(UsageError, match=says):
            plan(Heads(), (x, y), loss=second, output=wrong)
    with pytest.raises(UsageError, match="a loss with a name reads one output"):
        plan(Heads(), (x, y), output="all")


# -- targets -------------------------------------------------------------------------------------------------


def readout(outputs: int = CLASSES) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, 16), LIF(), nn.Linear(16, outputs), LeakyReadout(0.5))


class Static(nn.Module):
    """Returns outputs of any shape without a time axis."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape
        self.net = readout(torch.Size(shape).numel())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).mean(0).view(-1, *self.shape)


def loss_of(model: nn.Module, x: object, y: object, loss: object, **options: object) -> float:
    return evaluate(model, [(x, y)], loss=loss, device="cpu", **options)["loss"]


def batch_first(model: nn.Module) -> nn.Module:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x.transpose(0, 1)).transpose(0, 1)

    return Turned()


VALUES = torch.rand(STEPS, BATCH, CLASSES, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, CLASSES, (STEPS, BATCH), generator=torch.Generator().manual_seed(2))
MANY = (torch.rand(BATCH, CLASSES, generator=torch.Generator().manual_seed(3)) < 0.5).float()
PARTLY = torch.where(torch.rand(STEPS, BATCH, generator=torch.Generator().manual_seed(4)) < 0.4, -100, LABELS)
WEIGHT = torch.tensor([0.2, 1.0, 3.0])
OBJECTS = {  # model, targets, a loss of torch
    "values over time": (readout, VALUES, nn.MSELoss()),
    "sum": (readout, VALUES, nn.MSELoss(reduction="sum")),
    "smooth": (readout, VALUES, nn.SmoothL1Loss()),
    "many labels": (lambda: Static(CLASSES), MANY, nn.BCEWithLogitsLoss(pos_weight=WEIGHT)),
    "labels": (lambda: Static(CLASSES), LABELS[0], nn.CrossEntropyLoss(label_smoothing=0.1)),
    "weighted": (lambda: Static(CLASSES), LABELS[0], nn.CrossEntropyLoss(weight=WEIGHT)),
    "ignored": (lambda: Static(CLASSES), torch.tensor([0, -100, 2, 1, -100]), nn.CrossEntropyLoss(weight=WEIGHT)),
    "another ignored": (lambda: Static(CLASSES), LABELS[0], nn.CrossEntropyLoss(ignore_index=1)),
    "soft": (lambda: Static(CLASSES), VALUES[0].softmax(-1), nn.CrossEntropyLoss()),
    "divergence": (lambda: Static(CLASSES), VALUES[0].softmax(-1), nn.KLDivLoss(reduction="sum")),
    "number": (lambda: Static(), VALUES[0, :, 0], nn.MSELoss()),
    "image": (lambda: Static(1, 2, 2), torch.rand(BATCH, 1, 2, 2), nn.L1Loss()),
    "maps": (lambda: Static(CLASSES, 2, 2), torch.randint(0, CLASSES, (BATCH, 2, 2)), nn.CrossEntropyLoss()),
}


@pytest.mark.product
@pytest.mark.parametrize("name", OBJECTS)
def test_the_loss_of_an_object_is_what_it_gives_itself(name):
    make, targets, loss = OBJECTS[name]
    model, (x, _) = make(), data()
    with torch.no_grad():
        own = loss(model(x), targets).item()
    assert loss_of(model, x, targets, loss) == pytest.approx(own, rel=1e-5)
    assert loss.reduction in ("mean", "sum")
    if name == "values over time":
        turned = batch_first(model)
        assert loss_of(turned, x.transpose(0, 1), targets.transpose(0, 1), loss, layout="BT") == pytest.approx(own)
        assert loss_of(model, x.transpose(0, 1), targets.transpose(0, 1), loss, layout="BT") == pytest.approx(own)
    before = {n: q.clone() for n, q in model.named_parameters()}
    result = train(model, [(x, targets)] * 30, 2, loss=loss, val_loader=[(x, targets)], **CPU)
    assert result.history[-1]["val_loss"] < own
    assert any((q - before[n]).any() for n, q in model.named_parameters())
    with torch.no_grad():
        assert result.history[-1]["val_loss"] == pytest.approx(loss(model(x), targets).item(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("layout", ["TB", "BT"])
def test_targets_over_time(layout):
    """Named losses and losses of one's own, in the batch's layout, against their formulas."""
    x, _ = data()
    model = readout()
    with torch.no_grad():
        outputs = model(x)
    turn = (lambda part: part.transpose(0, 1)) if layout == "BT" else (lambda part: part)
    seen = batch_first(model) if layout == "BT" else model
    options = {"layout": layout}
    expected = ((outputs - VALUES) ** 2).sum(2).mean()
    assert loss_of(seen, turn(x), turn(VALUES), "mse", **options) == pytest.approx(expected.item())
    each = F.cross_entropy(outputs.flatten(0, 1), LABELS.flatten(), reduction="none")
    assert loss_of(seen, turn(x), turn(LABELS), "ce_rate", **options) == pytest.approx(each.mean().item())
    flat = nn.CrossEntropyLoss()
    assert loss_of(seen, turn(x), turn(LABELS), flat, **options) == pytest.approx(each.mean().item())
    kept = F.cross_entropy(outputs.flatten(0, 1), PARTLY.flatten(), reduction="none").view(STEPS, BATCH)
    rates = kept.sum(0) / (PARTLY >= 0).sum(0)
    assert loss_of(seen, turn(x), turn(PARTLY), "ce_rate", **options) == pytest.approx(rates.mean().item())
    found = evaluate(seen, [(turn(x), turn(PARTLY))], loss="ce_rate", device="cpu", **options)
    right = (outputs.argmax(-1) == PARTLY)[PARTLY >= 0].float().mean()
    assert found["accuracy"] == pytest.approx(right.item())

    def own(result: Tensor, targets: Tensor) -> Tensor:
        assert result.shape == targets.shape == turn(VALUES).shape
        return ((result - targets) ** 2).mean((1, 2) if layout == "BT" else (0, 2))

    assert loss_of(seen, turn(x), turn(VALUES), own, **options) == pytest.approx(expected.item() / CLASSES)
    one = readout(1)
    single = batch_first(one) if layout == "BT" else one
    with torch.no_grad():
        expected = ((one(x)[..., 0] - VALUES[..., 0]) ** 2).mean().item()
    for values in (VALUES[..., :1], VALUES[..., 0]):
        assert loss_of(single, turn(x), turn(values), "mse", **options) == pytest.approx(expected)
    result = train(
        single,
        [(turn(x), turn(VALUES[..., 0]))] * 40,
        3,
        loss="mse",
        val_loader=[(turn(x), turn(VALUES[..., 0]))],
        **CPU,
        **options,
    )
    assert result.history[-1]["val_loss"] < 0.6 * expected and result.history[-1]["train_accuracy"] is None


@pytest.mark.parametrize(
    "estimator",
    [ULR(), ULR(copies=4, credit="global"), ULR(credit="residual", copies=4)],
    ids=["auto", "global", "residual"],
)
def test_copies_keep_their_targets(estimator):
    """Targets over time and targets of samples give the same step where they say the same."""
    x, y = data()
    models = []
    for loss, targets in (
        ("ce_rate", y),
        ("ce_rate", y.expand(STEPS, BATCH)),
        (nn.CrossEntropyLoss(), y.expand(STEPS, BATCH)),
    ):
        models.append(readout())
        with attach(models[-1], estimator, loss=loss, seed=3) as ulr:
            for _ in range(2):
                ulr.backward(x, targets)
    for model in models[1:]:
        for q, other in zip(model.parameters(), models[0].parameters(), strict=True):
            torch.testing.assert_close(q.grad, other.grad)


class Square(nn.Module):
    """As many time steps, samples and features as one another. form: that of a sample's outputs."""

    def __init__(self, size: int, form: tuple[int, ...], reduced: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        count = torch.Size(form).numel()
        self.layers, self.reduced = nn.Sequential(nn.Linear(size, 6), LIF(), nn.Linear(6, count)), reduced
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        found = self.layers(x).unflatten(-1, self.form)
        return found.mean(0) if self.reduced else found


def of_maps(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none").flatten(1).mean(1)


def of_labels(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, targets.float(), reduction="none").mean(1)


@pytest.mark.parametrize("credit", ["global", "residual"])
@pytest.mark.parametrize(
    ("form", "reduced", "loss", "kind"),
    [
        ((3, 4, 2), True, of_maps, "maps"),
        ((4,), True, of_labels, "int"),
        ((4,), True, of_labels, "bool"),
        ((4, 2, 2), False, "mse", "values"),
        ((4,), False, "mse", "bool"),
    ],
)
def test_targets_of_samples_are_told_from_targets_over_time_by_the_outputs(credit, form, reduced, loss, kind):
    """Their first axes are as long as those of time and samples."""
    size = 4
    model = Square(size, form, reduced)
    x = (torch.rand(size, size, size, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    torch.manual_seed(0)
    targets = {
        "maps": torch.randint(3, (size, *form[1:])),
        "int": torch.randint(2, (size, *form)),
        "bool": torch.rand(size, *form) < 0.5,
        "values": torch.randn(size, *form),
    }[kind]
    with torch.no_grad():
        outputs = model(x)
    own = loss(outputs, targets) if callable(loss) else ((outputs - targets.float()) ** 2).flatten(2).sum(2).mean(0)
    assert loss_of(model, x, targets, loss) == pytest.approx(own.mean().item(), rel=1e-5)
    with attach(model, ULR(credit=credit, copies=4), loss=loss) as ulr:
        assert ulr.backward(x, targets).loss.shape == (size,)


def test_a_picture_with_as_many_channels_as_time_steps():
    x, _ = data()
    x = x[:2]
    model, goal = Static(2, 3, 3), torch.rand(BATCH, 2, 3, 3)
    with torch.no_grad():
        own = F.mse_loss(model(x), goal).item()
    assert loss_of(model, x, goal, nn.MSELoss()) == pytest.approx(own, rel=1e-5)


def test_long_sequences_keep_their_targets_in_chunks():
    x, _ = data()
    found = []
    for memory in ("auto", "replay"):
        model = readout()
        with attach(model, ULR(memory=memory, maps="exact"), loss="mse", seed=3) as ulr:
            for _ in range(2):
                ulr.backward(x, VALUES)
        found.append([q.grad for q in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_online_learning_reads_the_target_of_each_step():
    from ulr_snn import Online

    x, _ = data()
    model = readout()
    before = loss_of(model, x, VALUES, "mse")
    train(model, [(x, VALUES)] * 20, 2, loss="mse", estimator=Online(), **CPU)
    assert loss_of(model, x, VALUES, "mse") < 0.8 * before
    with attach(readout(), Online(), loss="mse") as ulr:
        losses = [estimate.loss for estimate in ulr.steps(x, VALUES)]
    assert len(losses) == STEPS


def test_ignored_and_soft_labels_of_named_losses():
    x, y = data()
    model = readout()
    with torch.no_grad():
        totals = model(x).sum(0)
    some = torch.tensor([0, -100, 2, 1, -100])
    found = evaluate(model, [(x, some)], device="cpu")
    each = F.cross_entropy(totals, some, reduction="none")
    assert found["loss"] == pytest.approx(F.cross_entropy(totals, some).item()) and each[1] == 0
    assert found["accuracy"] == pytest.approx((totals.argmax(1) == some)[some >= 0].float().mean().item())
    soft = VALUES[0].softmax(-1)
    found = evaluate(model, [(x, soft)], device="cpu")
    assert found["loss"] == pytest.approx(F.cross_entropy(totals, soft).item()) and found["accuracy"] is None
    for loss in ("zero_one", "latency"):
        assert evaluate(model, [(x, torch.full((BATCH,), -100))], loss=loss, device="cpu")["loss"] == 0
    for targets, says in (
        (LABELS, "use 'ce_rate'"),
        (y + 1, "labels go from 1 to 3"),
        (VALUES[0, :, :2], "class indices"),
    ):
        with pytest.raises(UsageError, match=says):
            plan(model, (x, targets))


@pytest.mark.parametrize("loss", ["ce_count", "ce_rate", "zero_one", "latency", "steps"])
def test_the_mean_of_a_named_loss_is_that_of_labelled_samples(loss):
    """Samples without a label change neither the loss nor the gradient of the others, in all copies."""
    x, y = data()
    kept, name = 2, "ce_rate" if loss == "steps" else loss
    y = LABELS if loss == "steps" else y
    some = y.clone()
    some[..., kept:] = -100
    model = nn.Sequential(readout(), LIF()) if loss == "latency" else readout()
    whole = evaluate(model, [(x, some)], loss=name, device="cpu")
    alone = evaluate(model, [(x[:, :kept], y[..., :kept])], loss=name, device="cpu")
    assert whole["loss"] == pytest.approx(alone["loss"]) and whole["accuracy"] == pytest.approx(alone["accuracy"])
    several = [
        evaluate(model, [batch], loss=name, samples=3, device="cpu")
        for batch in ((x, some), (x[:, :kept], y[..., :kept]))
    ]
    assert several[0]["bound"] == pytest.approx(several[1]["bound"])
    batches = [(x, some), (x, torch.full_like(some, -100)), (x[:, :kept], y[..., :kept])]
    assert evaluate(model, batches, loss=name, device="cpu")["loss"] == pytest.approx(alone["loss"])

    def own(outputs: Tensor, targets: Tensor) -> Tensor:  # whose mean over all samples is that over labelled ones
        if loss == "ce_count":
            return F.cross_entropy(outputs.sum(0), targets, reduction="none") * BATCH / kept
        each = F.cross_entropy(outputs.flatten(0, 1), targets.expand(outputs.shape[:2]).flatten(), reduction="none")
        return each.view(outputs.shape[:2]).mean(0) * BATCH / kept

    for estimator in (ULR(), ULR(credit="global", copies=4)) if name.startswith("ce") else ():
        ours = gradients(model, x, some, name, estimator=estimator)
        for key, gradient in gradients(model, x, some, own, estimator=estimator).items():
            torch.testing.assert_close(ours[key], gradient, rtol=1e-4, atol=1e-5, msg=key)


def test_targets_may_be_a_tree():
    x, y = data()
    box = torch.rand(BATCH, 4)

    def loss(result: tuple[Tensor, Tensor], targets: dict[str, Tensor]) -> Tensor:
        classes, boxes = result
        return F.cross_entropy(classes.sum(0), targets["class"], reduction="none") + (
            (boxes - targets["box"]) ** 2
        ).mean(1)

    model = Heads()
    targets = {"class": y, "box": box.numpy()}
    for estimator in (ULR(), ULR(credit="global", copies=4)):
        result = train(model, [(x, targets)] * 10, 1, loss=loss, output="all", estimator=estimator, **CPU)
    assert result.history[-1]["train_accuracy"] is None
    with torch.no_grad():
        own = loss(model(x), {"class": y, "box": box}).mean().item()
    assert loss_of(model, x, targets, loss, output="all") == pytest.approx(own, rel=1e-5)
    with pytest.raises(UsageError, match="give a loss and metrics of your own"):
        plan(model, (x, (y, box)))


def test_an_autoencoder_needs_no_targets():
    class Auto(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(16, 32), LIF(), nn.Linear(32, 16))

        def forward(self, image: Tensor) -> Tensor:
            return self.net(image.flatten(1).expand(STEPS, -1, -1)).mean(0).view(image.shape)

    image = torch.rand(24, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for loader in ([image] * 40, [(image,)] * 40, [{"image": image}] * 40):
        model = Auto()
        with torch.no_grad():
            before = F.mse_loss(model(image), image).item()
        result = train(model, loader, 2, loss=nn.MSELoss(), layout="B", val_loader=loader[:1], **CPU)
        with torch.no_grad():
            after = F.mse_loss(model(image), image).item()
        assert result.history[-1]["val_loss"] == pytest.approx(after, rel=1e-4) and after < 0.3 * before
    named = evaluate(model, [image], loss="mse", layout="B", device="cpu")["loss"]
    assert named == pytest.approx(16 * after, rel=1e-4)


# -- lengths -------------------------------------------------------------------------------------------------


class Reduced(nn.Module):
    """Two heads: one over time, the other reduced over time."""

    def __init__(self, by: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.lif = nn.Linear(INPUTS, 8), LIF()
        self.over_time, self.static, self.by, self.average = nn.Linear(8, CLASSES), nn.Linear(8, 2), by, TimeAverage()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        spikes = self.lif(2 * self.hidden(x))
        averages = {
            "average": lambda: self.average(spikes),
            "average of outputs": lambda: spikes,
            "mean": lambda: spikes.mean(0),
            "both": lambda: spikes.mean(0) + 0 * self.average(spikes),
        }
        static = self.static(averages[self.by]())
        return {"over_time": self.over_time(spikes), "static": self.average(static) if static.ndim > 2 else static}


PADDED = torch.tensor([3, STEPS, 2, STEPS, 1])


@unread
@pytest.mark.parametrize("by", ["average", "average of outputs"])
def test_a_head_without_time_beside_one_over_time_leaves_padding_out(by):
    x, y = data()
    model, seen = Reduced(by), []

    def of_static(result: dict[str, Tensor], targets: Tensor) -> Tensor:
        seen.append(result["static"].detach())
        return (result["static"] ** 2).sum(1) + 0 * result["over_time"].sum((0, 2))

    def alone(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs**2).sum(1)

    with torch.no_grad():
        expected = torch.cat([model(x[:length, [i]])["static"] for i, length in enumerate(PADDED)])
    found = evaluate(
        model,
        [(x, y, PADDED)],
        loss=of_static,
        output="all",
        metrics={"first": lambda result, _: result["static"][:, 0]},
        device="cpu",
    )
    torch.testing.assert_close(seen[-1], expected)
    assert found["first"] == pytest.approx(expected[:, 0].mean().item(), rel=1e-4)
    together = gradients(model, x, y, of_static, output="all", lengths=PADDED)
    for name, gradient in gradients(Reduced(by), x, y, alone, output="static", lengths=PADDED).items():
        torch.testing.assert_close(together[name], gradient, msg=name)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("by", ["mean", "both"])
@pytest.mark.parametrize("output", ["all", "static"])
def test_a_head_that_is_reduced_over_padding_is_refused(by, output, sparse):
    x, y = data()

    def loss(result: object, targets: Tensor) -> Tensor:
        return (result["static"] if isinstance(result, dict) else result).sum(1)

    with pytest.raises(UsageError, match="padding included, so that lengths cannot be kept"):
        evaluate(Reduced(by), [(x.to_sparse() if sparse else x, y, PADDED)], loss=loss, output=output, device="cpu")


# -- metrics -------------------------------------------------------------------------------------------------


def test_metrics_stand_beside_the_loss(tmp_path):
    import json

    metrics = beside_torchvision("torchmetrics")
    x, y = data()

    def right(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.sum(0).argmax(1) == targets).float()

    own = {
        "right": right,
        "half": lambda outputs, targets: 0.5,
        "f1": metrics.F1Score(task="multiclass", num_classes=CLASSES, average="macro"),
        "matrix": metrics.ConfusionMatrix(task="multiclass", num_classes=CLASSES),
    }
    model = readout()
    batches = [(x, y), (x[:, :2], y[:2])]
    result = train(model, batches, 3, val_loader=batches, metrics=own, run_dir=tmp_path / "run", **CPU)
    last = result.history[-1]
    assert last["train_right"] == pytest.approx(last["train_accuracy"])
    assert last["val_right"] == pytest.approx(last["val_accuracy"]) and last["val_half"] == 0.5
    with torch.no_grad():
        outputs = [model(x).sum(0) for x, _ in batches]
    expected = metrics.F1Score(task="multiclass", num_classes=CLASSES, average="macro")
    expected.update(torch.cat(outputs), torch.cat([y for _, y in batches]))
    assert last["val_f1"] == pytest.approx(expected.compute().item())
    assert sum(map(sum, last["val_matrix"])) == 7 and not own["f1"].update_called
    kept = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert kept["test_f1"] == pytest.approx(last["val_f1"]) and kept["test_accuracy"] == last["val_accuracy"]
    assert evaluate(model, batches, metrics=own, device="cpu")["f1"] == pytest.approx(last["val_f1"])
    table = compare(readout(), batches, batches, ("ulr",), epochs=1, metrics=own, **CPU)
    assert table.rows[0]["history"][-1]["val_right"] == pytest.approx(table.rows[0]["accuracy"])
    values = metrics.MeanSquaredError()
    found = evaluate(model, [(x, VALUES)], loss="mse", metrics={"error": values}, device="cpu")
    assert found["error"] == pytest.approx(found["loss"] / CLASSES) and found["accuracy"] is None


def test_metrics_of_torchmetrics_are_losses_too():
    metrics = beside_torchvision("torchmetrics")
    x, _ = data()
    model = readout()
    plain = loss_of(model, x, VALUES, nn.MSELoss())
    assert loss_of(model, x, VALUES, metrics.MeanSquaredError()) == pytest.approx(plain)
    ours = gradients(model, x, VALUES, metrics.MeanSquaredError())
    for name, g in gradients(model, x, VALUES, nn.MSELoss()).items():
        torch.testing.assert_close(ours[name], g)
    with pytest.raises(UsageError, match="better when higher"):
        plan(model, (x, VALUES), loss=metrics.R2Score())


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ({"loss": len}, "has a meaning of its own"),
        ({"x": "accuracy"}, "function or torchmetrics object"),
        ([len], "function or torchmetrics object"),
        ({"x": lambda outputs, targets: outputs}, "return one number, or one for each sample"),
    ],
)
def test_wrong_metrics_are_named(metrics, says):
    with pytest.raises(UsageError, match=says):
        train(readout(), [data()], 1, metrics=metrics, **CPU)


@pytest.mark.parametrize("samples", [3, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_objects_of_torchmetrics_over_time(samples, padded):
    """Time steps are so many samples, without padding, also where there are as many samples as classes."""
    metrics = beside_torchvision("torchmetrics")
    x, _ = data()
    x, labels, goal = x[:, :samples], LABELS[:, :samples], VALUES[:, :samples]
    lengths = torch.tensor([STEPS, 3, 2, 5, 3])[:samples] if padded else torch.full((samples,), STEPS)
    own = torch.arange(STEPS)[:, None] < lengths
    model = readout()
    with torch.no_grad():
        outputs = model(x)
    right = (outputs.argmax(-1) == labels)[own].float().mean().item()
    accuracy = {"right": metrics.Accuracy(task="multiclass", num_classes=CLASSES)}
    found = evaluate(model, [(x, labels, lengths)], loss="ce_rate", metrics=accuracy, device="cpu")
    assert found["right"] == pytest.approx(right) == pytest.approx(found["accuracy"])
    errors = {"squared": metrics.MeanSquaredError(), "absolute": metrics.MeanAbsoluteError()}
    found = evaluate(model, [(x, goal, lengths)], loss=errors["squared"], metrics=errors, device="cpu")
    each = outputs - goal
    assert found["squared"] == pytest.approx((each[own] ** 2).mean().item(), rel=1e-5)
    assert found["absolute"] == pytest.approx(each[own].abs().mean().item(), rel=1e-5)
    alone = [(each[:length, i] ** 2).mean() for i, length in enumerate(lengths)]
    assert found["loss"] == pytest.approx(torch.stack(alone).mean().item(), rel=1e-5)


@pytest.mark.parametrize("index", [-1, 0, 255])
@pytest.mark.parametrize("steps", [False, True])
def test_accuracy_leaves_out_the_labels_that_the_loss_leaves_out(index, steps):
    x, _ = data()
    model = readout() if steps else nn.Sequential(readout(), TimeAverage())
    labels = (LABELS if steps else torch.tensor([1, 2, 0, 1, 2])).clone()
    (labels[:3] if steps else labels)[..., ::2] = index
    with torch.no_grad():
        right = (model(x).argmax(-1) == labels)[labels != index].float().mean().item()
    rest = torch.where(labels == index, 1, labels)
    loss = nn.CrossEntropyLoss(ignore_index=index)
    batches = [(x, labels), (x, rest if index else labels)]
    with torch.no_grad():
        kept = torch.cat([(model(x).argmax(-1) == y)[y != index] for _, y in batches]).float()
    assert evaluate(model, batches[:1], loss=loss, device="cpu")["accuracy"] == pytest.approx(right)
    assert evaluate(model, batches, loss=loss, device="cpu")["accuracy"] == pytest.approx(kept.mean().item())
    if not steps:
        own = partial(F.cross_entropy, ignore_index=index, reduction="none")
        assert evaluate(model, batches, loss=own, device="cpu")["accuracy"] == pytest.approx(kept.mean().item())


def test_targets_that_are_no_classes_of_the_outputs_have_no_accuracy():
    """It does not depend on the cut into batches."""
    x, _ = data()
    counts = torch.tensor([0, 9, 1, 2, 3])

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.sum((0, 2)) - targets) ** 2

    alone = [(x[:, i : i + 1], counts[i : i + 1]) for i in range(BATCH)]
    for batches in (alone, [(x, counts)]):
        assert evaluate(readout(), batches, loss=loss, device="cpu")["accuracy"] is None
        assert "calibration_error" not in evaluate(readout(), batches, loss=loss, samples=2, device="cpu")
    assert train(readout(), alone, 1, loss=loss, **CPU).history[0]["train_accuracy"] is None


@pytest.mark.parametrize("loss", ["zero_one", "ce_count", "ce_rate", "latency"])
def test_a_label_of_uint8_is_no_negative_number(loss):
    x, _ = data()
    model, labels = nn.Sequential(readout(200), LIF()), torch.full((BATCH,), 156, dtype=torch.uint8)
    found = evaluate(model, [(x, labels)], loss=loss, device="cpu")
    assert found == evaluate(model, [(x, labels.long())], loss=loss, device="cpu") and found["accuracy"] == 0


def test_population_codes_are_counted_by_class():
    functional = pytest.importorskip("snntorch.functional")
    x, y = data()
    model = nn.Sequential(readout(12), LIF())
    for loss in (
        functional.ce_count_loss(population_code=True, num_classes=CLASSES),
        functional.mse_count_loss(correct_rate=0.9, incorrect_rate=0.1, population_code=True, num_classes=CLASSES),
    ):
        result = train(model, [(x, y)] * 5, 1, loss=loss, val_loader=[(x, y)], **CPU)
        with torch.no_grad():
            own = functional.accuracy_rate(model(x), y, population_code=True, num_classes=CLASSES)
        assert result.history[-1]["val_accuracy"] == pytest.approx(float(own))
    grouped = evaluate(model, [(x, y)], output=lambda o: o.unflatten(-1, (CLASSES, -1)).sum(-1), device="cpu")
    assert grouped["accuracy"] == pytest.approx(float(own))


def test_schedules_by_the_loss_and_a_callback_that_ends_the_training():
    x, y = data()
    plateau = lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0)  # noqa: E731
    result = train(readout(), [(x, y)], 4, scheduler=plateau, val_loader=[(x, y)], **CPU)
    rates = [entry["lr"] for entry in result.history]
    assert rates[0] > rates[1] > rates[2] > rates[3]
    ended = train(readout(), [(x, y)], 9, callbacks=[lambda entry, model: entry["epoch"] == 2], **CPU)
    assert len(ended.history) == 2
    with pytest.raises(UsageError, match="LBFGS evaluates the loss several times"):
        train(readout(), [(x, y)], 1, optimizer=torch.optim.LBFGS, **CPU)


# -- losses that read more than the outputs


class Kept(nn.Module):
    """A net that keeps its spikes in an attribute, and has a head beside its outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.lif = nn.Linear(INPUTS, 8), LIF()
        self.out, self.beside = nn.Linear(8, CLASSES), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.spikes = self.lif(self.hidden(x))
        self.beside(self.spikes)
        return self.out(self.spikes)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.sum(0), targets, reduction="none")


@unread
@pytest.mark.parametrize("layer", ["hidden", "lif", "beside"])
@pytest.mark.parametrize("estimator", [None, ULR(credit="global"), ULR(credit="residual")])
def test_a_loss_of_what_a_hook_keeps_is_refused(layer, estimator):
    model, kept = Kept(), {}
    model.get_submodule(layer).register_forward_hook(lambda _, given, result: kept.update({layer: result}))
    x, y = torch.rand(STEPS, BATCH, INPUTS), torch.arange(BATCH) % CLASSES
    with pytest.raises(UsageError, match=r"besides its outputs, .* output='all'"):
        attach(model, estimator, lambda o, y: cross_entropy(o, y) + kept[layer].mean((0, 2))).backward(x, y)
    attach(model, estimator, lambda o, y: cross_entropy(o, y) + kept[layer].detach().mean((0, 2))).backward(x, y)
    attach(model, estimator, lambda o, y: cross_entropy(o, y) + model.hidden.weight.mean()).backward(x, y)


@unread
def test_a_loss_of_what_no_pass_leaves_is_refused():
    model = Kept()
    batch = torch.rand(STEPS, BATCH, INPUTS), torch.arange(BATCH) % CLASSES
    with pytest.raises(UsageError, match=r"'spikes' of Kept, .* output='all'"):
        train(model, [batch], 1, loss=lambda o, y: cross_entropy(o, y) + model.spikes.mean((0, 2)), **CPU)
    with pytest.raises(AttributeError, match="nothing"):
        train(model, [batch], 1, loss=lambda o, y: o.nothing, **CPU)
