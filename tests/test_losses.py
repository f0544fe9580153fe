"""Per-sample losses: against PyTorch, padding left out, one value a sample."""

import itertools
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import separable
from ulr_snn import LIF, ULR, Independent, Online, TimeAverage, UsageError, WeightNoise, attach, plan, train
from ulr_snn.losses.evaluation import by_flips
from ulr_snn.losses.named import LOSSES, NamedLoss, resolve, total
from ulr_snn.memory.chunks import ChunkLimits, TimeChunks
from ulr_snn.model.targets import Leaf, Targets

STEPS, BATCH, CLASSES = 5, 4, 3
torch.manual_seed(0)
OUTPUTS = torch.randn(STEPS, BATCH, CLASSES, dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1, 2])
VALUES = torch.randn(BATCH, CLASSES, dtype=torch.float64)


def target(name: str) -> torch.Tensor:
    return VALUES if name == "mse" else LABELS


def test_cross_entropy_of_counts():
    ours = resolve("ce_count")(OUTPUTS, LABELS, None)
    torch.testing.assert_close(ours, F.cross_entropy(OUTPUTS.sum(0), LABELS, reduction="none"))
    reduced = resolve("ce_count")(OUTPUTS.sum(0), LABELS, None)
    torch.testing.assert_close(reduced, ours)


def test_cross_entropy_of_rates():
    steps = [F.cross_entropy(now, LABELS, reduction="none") for now in OUTPUTS]
    torch.testing.assert_close(resolve("ce_rate")(OUTPUTS, LABELS, None), torch.stack(steps).mean(0))
    single = resolve("ce_rate")(OUTPUTS[0], LABELS, None)
    torch.testing.assert_close(single, steps[0])


def test_squared_error():
    expected = ((OUTPUTS - VALUES) ** 2).sum(2).mean(0)
    torch.testing.assert_close(resolve("mse")(OUTPUTS, VALUES, None), expected)
    torch.testing.assert_close(resolve("mse")(OUTPUTS, VALUES.expand_as(OUTPUTS), None), expected)
    torch.testing.assert_close(resolve("mse")(OUTPUTS[0], VALUES, None), ((OUTPUTS[0] - VALUES) ** 2).sum(1))


def test_a_negative_return_ignores_targets_and_has_no_gradient():
    rewards = OUTPUTS[..., :1].clone().requires_grad_()
    loss = resolve("negative_return")(rewards, LABELS, None)
    torch.testing.assert_close(loss, -OUTPUTS[..., 0].sum(0))
    assert not loss.requires_grad
    with pytest.raises(UsageError, match="give it rewards"):
        resolve("negative_return")(OUTPUTS[0], LABELS, None)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_object_is_taken_in_place_of_its_name(name):
    mask = (torch.arange(STEPS)[:, None] < torch.tensor([5, 3, 1, 4])).double()[..., None]
    by_name, objective = resolve(name), resolve(LOSSES[name])
    torch.testing.assert_close(objective(OUTPUTS, target(name), mask), by_name(OUTPUTS, target(name), mask))
    assert (objective.of_totals, objective.steps) == (by_name.of_totals, by_name.steps)
    assert list(objective.own.values()) == [name]


@pytest.mark.parametrize("name", LOSSES)
def test_padding_counts_for_nothing(name):
    lengths = torch.tensor([5, 3, 1, 4])
    mask = (torch.arange(STEPS)[:, None] < lengths).double()[..., None]
    filled = torch.where(mask.bool(), OUTPUTS, torch.full_like(OUTPUTS, 7.0))
    together = resolve(name)(filled, target(name), mask)
    for sample, length in enumerate(lengths):
        one = slice(sample, sample + 1)
        alone = resolve(name)(OUTPUTS[:length, one], target(name)[one], None)
        torch.testing.assert_close(together[one], alone)
    torch.testing.assert_close(total(filled, mask)[1], OUTPUTS[:3, 1].sum(0))


def test_a_callable_sees_padding_as_zeros():
    mask = torch.ones(STEPS, BATCH, 1, dtype=torch.float64)
    mask[2:, 1] = 0
    seen = []

    def loss(outputs, targets):
        seen.append(outputs)
        return outputs.abs().sum((0, 2))

    value = resolve(loss)(OUTPUTS, LABELS, mask)
    assert torch.equal(seen[0], OUTPUTS * mask)
    torch.testing.assert_close(value[1], OUTPUTS[:2, 1].abs().sum())


@pytest.mark.parametrize("name", LOSSES)
def test_a_sample_has_the_loss_it_has_alone(name):
    together = resolve(name)(OUTPUTS, target(name), None)
    assert together.shape == (BATCH,)
    for sample in range(BATCH):
        one = slice(sample, sample + 1)
        torch.testing.assert_close(resolve(name)(OUTPUTS[:, one], target(name)[one], None), together[one])


def test_losses_of_snntorch_and_torch_are_taken_apart_into_samples():
    """Their mean over the batch is what they give themselves."""
    functional = pytest.importorskip("snntorch.functional")
    names = ("ce_count_loss", "ce_rate_loss", "ce_max_membrane_loss", "mse_count_loss", "mse_membrane_loss")
    for loss in (getattr(functional, name)() for name in names):
        values = resolve(loss)(OUTPUTS.float(), LABELS, None)
        assert values.shape == LABELS.shape
        torch.testing.assert_close(values.mean(), loss(OUTPUTS.float(), LABELS).squeeze())
        assert loss.reduction == "mean"
    goal = torch.rand_like(OUTPUTS)
    for loss in (torch.nn.MSELoss(), torch.nn.MSELoss(reduction="sum")):
        values = resolve(loss)(OUTPUTS, goal, None)
        assert values.shape == LABELS.shape
        torch.testing.assert_close(values.mean(), loss(OUTPUTS, goal))


def test_a_loss_object_that_gives_one_number_all_the_same_is_refused():
    class Stubborn:
        reduction = "mean"

        def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return outputs.mean()

    with pytest.raises(UsageError, match="one value a sample"):
        resolve(Stubborn())(OUTPUTS, LABELS, None)


def test_named_losses_agree_with_snntorch():
    functional = pytest.importorskip("snntorch.functional")
    ours = resolve("ce_count")(OUTPUTS, LABELS, None).mean()
    torch.testing.assert_close(ours, functional.ce_count_loss()(OUTPUTS, LABELS))
    ours = resolve("ce_rate")(OUTPUTS, LABELS, None).mean()
    torch.testing.assert_close(ours, functional.ce_rate_loss()(OUTPUTS, LABELS).squeeze(), check_dtype=False)


@pytest.mark.parametrize(
    ("loss", "targets", "says"),
    [
        ("hinge", LABELS, "hinge"),
        (lambda outputs, targets: outputs.sum(), LABELS, "shape ()"),
        (lambda outputs, targets: outputs.sum(0), LABELS, "shape (4, 3)"),
        (lambda outputs, targets: 0.5, LABELS, "one value"),
        ("ce_count", LABELS + 1, "1 to 3"),
        ("ce_rate", LABELS - 1, "-1 to 1"),
        ("ce_count", LABELS.double(), "float64"),
        ("ce_count", LABELS[:, None], "(4, 1)"),
    ],
)
def test_wrong_uses_are_named(loss, targets, says):
    with pytest.raises(UsageError) as error:
        resolve(loss)(OUTPUTS, targets, None)
    assert says in str(error.value)


@pytest.mark.parametrize("kind", ["CTCLoss", "GaussianNLLLoss", "CosineEmbeddingLoss", "TripletMarginLoss"])
def test_losses_of_other_arguments_are_refused_by_name(kind):
    with pytest.raises(UsageError, match=f"the loss {kind} does not take two arguments; give a function"):
        resolve(getattr(torch.nn, kind)())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "kind",
    ["ce_rate", "ce_count", "mse_count", "ce_max_membrane", "mse_membrane", "ce_temporal", "mse_temporal", "weighted"],
)
def test_padding_counts_for_nothing_in_losses_of_snntorch(kind, reduction):
    functional = pytest.importorskip("snntorch.functional")
    weights = {"weight": torch.tensor([0.5, 1.0, 2.0])} if kind == "weighted" else {}
    loss = getattr(functional, f"{'ce_temporal' if weights else kind}_loss")(reduction=reduction, **weights)
    lengths = torch.tensor([5, 3, 1, 3])
    mask = (torch.arange(STEPS)[:, None] < lengths).float()[..., None]
    outputs = (OUTPUTS > 0).float() if weights or "temporal" in kind else OUTPUTS.float()
    outputs = outputs.where(mask.bool(), torch.ones(()))
    leaf = outputs.clone().requires_grad_()
    values = resolve(loss)(leaf, LABELS, mask)
    alone = [loss(outputs[:length, [i]], LABELS[[i]]).squeeze() for i, length in enumerate(lengths)]
    if reduction == "sum":
        expected = BATCH * torch.stack(alone)
    elif weights:
        own = weights["weight"][LABELS]
        expected = torch.stack(alone) * own * BATCH / own.sum()
    else:
        expected = torch.stack(alone)
    torch.testing.assert_close(values, expected)
    if values.requires_grad:
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        assert gradient.any() and not (gradient * (1 - mask)).any()
    longer = torch.nn.functional.pad
    more = resolve(loss)(longer(outputs, (0, 0, 0, 0, 0, 7)), LABELS, longer(mask, (0, 0, 0, 0, 0, 7)))
    torch.testing.assert_close(more, values.detach())


@pytest.mark.parametrize("over_time", [False, True])
def test_a_divergence_by_its_batch_mean_is_what_the_object_gives_itself(over_time):
    outputs = OUTPUTS.log_softmax(-1)
    goal = (OUTPUTS + VALUES).softmax(-1)
    outputs, goal = (outputs, goal) if over_time else (outputs[0], goal[0])
    loss = torch.nn.KLDivLoss(reduction="batchmean")
    torch.testing.assert_close(resolve(loss)(outputs, goal, None).mean(), loss(outputs, goal))
    if over_time:
        mask = (torch.arange(STEPS)[:, None] < torch.tensor([5, 3, 1, 3])).double()[..., None]
        parts = zip(range(BATCH), (5, 3, 1, 3), strict=True)
        alone = [loss(outputs[:length, i], goal[:length, i]) for i, length in parts]
        torch.testing.assert_close(resolve(loss)(outputs, goal, mask), BATCH * torch.stack(alone))


# -- losses of output spikes -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["latency", "zero_one"])
@pytest.mark.parametrize("padded", [False, True])
def test_flips_give_the_derivative_of_the_expected_loss(name, padded):
    """The mean of the effect of each spike over all patterns is ∂E[L]/∂p, by enumeration of 2^8 patterns."""
    steps, rows, features = 4, 3, 2
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(steps, rows, features, dtype=torch.float64, generator=generator).requires_grad_()
    lengths = torch.tensor([4, 2, 3]) if padded else None
    mask = None if lengths is None else (torch.arange(steps)[:, None] < lengths).double()[..., None]
    loss, targets = resolve(name).losses[0][1], Targets(Leaf(torch.tensor([0, 1, 0])))
    expected, found = torch.zeros(rows, dtype=torch.float64), torch.zeros_like(p)
    for pattern in itertools.product([0.0, 1.0], repeat=steps * features):
        spikes = torch.tensor(pattern, dtype=torch.float64).view(steps, 1, features).expand(-1, rows, -1)
        share = torch.where(spikes > 0, p, 1 - p).prod(2).prod(0)
        value, error = by_flips(loss, spikes, targets, mask)
        torch.testing.assert_close(value, loss(spikes, targets, mask))
        expected = expected + share * value
        found += share.detach()[:, None] * error
    (derivative,) = torch.autograd.grad(expected.sum(), p)
    torch.testing.assert_close(found, derivative, rtol=1e-9, atol=1e-12)
    wrong = found.flip(0)  # a wrong formula: time runs backwards
    assert name == "zero_one" or not torch.allclose(wrong, derivative)


@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 1.0, 2.0])])
def test_snntorchs_losses_of_spike_times(weight):
    """They are taken apart into samples. Spikes are flipped, since their own derivative is a surrogate."""
    functional = pytest.importorskip("snntorch.functional")
    snn = pytest.importorskip("snntorch")
    spikes = (torch.rand(9, 16, 3, generator=torch.Generator().manual_seed(0)) < 0.2).float()
    labels = torch.arange(16) % 3
    for loss in (functional.ce_temporal_loss(weight=weight), functional.mse_temporal_loss(on_target=1, off_target=8)):
        values = resolve(loss)(spikes, labels, None)
        assert values.shape == (16,) and not values.requires_grad
        torch.testing.assert_close(values.mean(), loss(spikes, labels))
    if weight is None:
        torch.manual_seed(0)
        first, second = snn.Leaky(0.9, init_hidden=True), snn.Leaky(0.9, init_hidden=True)
        model = torch.nn.Sequential(torch.nn.Linear(5, 32), first, torch.nn.Linear(32, 3), second)
        timed = {"timed": lambda outputs, y: functional.accuracy_temporal(outputs, y)}
        result = train(model, separable(), 30, loss=loss, metrics=timed, progress=False, device="cpu")
        assert result.history[-1]["train_timed"] > 0.7 and result.metrics["forward_passes"] < 40 * 48


# -- losses with parameters --------------------------------------------------------------------------------


def averaging(x: Tensor) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(x.shape[2], 6), LIF(), TimeAverage(), nn.Linear(6, CLASSES))


class Prototypes(nn.Module):
    """Distances of the mean outputs to learned points, and a penalty of a model's weights."""

    def __init__(self, model: nn.Module, penalty: float) -> None:
        super().__init__()
        self.points, self.penalty = nn.Parameter(torch.eye(CLASSES)), penalty
        self.weights = [model[0].weight, model[-1].weight]

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        means = outputs.mean(0) if outputs.ndim == 3 else outputs
        distances = (means[:, None] - self.points).square().sum(2)
        return F.cross_entropy(-distances, targets, reduction="none") + self.penalty * sum(
            weight.abs().sum() for weight in self.weights
        )


@pytest.mark.parametrize(
    "estimator",
    [
        ULR(),
        ULR(copies=4),
        ULR(credit="global", copies=4),
        ULR(credit="residual", copies=4),
        ULR(memory=TimeChunks(limits=ChunkLimits(whole=0, short=0, roomy=1, together=(1, 1)))),
        ULR(memory="replay"),
    ],
    ids=["one pass", "copies", "global", "residual", "chunks", "replay"],
)
def test_parameters_of_a_loss_get_their_gradient(estimator):
    """That of a penalty is its derivative, and that of the points the mean over samples and copies."""
    x, y = separable()[0]
    found = []
    for penalty in (0.0, 0.1):
        model = averaging(x)
        loss = Prototypes(model, penalty)
        with attach(model, estimator, loss, seed=1) as ulr:
            for _ in range(2):
                model.zero_grad()
                loss.zero_grad()
                estimate = ulr.backward(x, y)
        found.append([q.grad for q in (model[0].weight, model[-1].weight, loss.points)])
    for without, penalised, weight in zip(*found, (model[0].weight, model[-1].weight), strict=False):
        torch.testing.assert_close(penalised - without, 0.1 * weight.sign(), rtol=1e-4, atol=1e-5)
    outputs = estimate.packed
    expected = torch.stack([loss(each.detach(), y).mean() for each in outputs]).mean()
    (points,) = torch.autograd.grad(expected, loss.points)
    torch.testing.assert_close(found[1][2], points, rtol=1e-4, atol=1e-6)


def test_parameters_of_a_loss_get_their_gradient_at_every_time_step():
    x, y = separable()[0]
    torch.manual_seed(0)
    model, factors = nn.Sequential(nn.Linear(x.shape[2], 6), LIF(), nn.Linear(6, CLASSES)), nn.Parameter(torch.ones(1))

    def each_step(outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        return torch.stack([F.cross_entropy(now * factors, targets, reduction="none") for now in outputs])

    loss = NamedLoss(lambda *given: each_step(*given).mean(0), steps=each_step)
    with attach(model, Online(), loss, total_steps=10) as ulr:
        for estimate in ulr.steps(x, y):
            (expected,) = torch.autograd.grad(each_step(estimate.packed[0], y, None).mean() / len(x), factors)
            torch.testing.assert_close(factors.grad, expected)
            factors.grad = None


@pytest.mark.parametrize("kind", ["with a gradient", "without a gradient"])
def test_a_penalty_changes_no_other_gradient(kind):
    """Also of parameters with noise of their own, and of losses without a gradient."""
    x, y = separable()[0]
    found = []
    for penalty in (0.0, 0.1):
        model = averaging(x)
        loss = Prototypes(model, penalty)

        def of_batch(outputs, targets, loss=loss):
            return loss(outputs if kind == "with a gradient" else outputs.detach(), targets)

        estimator = ULR(copies=4, noise={"0.weight": WeightNoise(), "outputs": None})
        with attach(model, estimator, of_batch, seed=1) as ulr:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the loss has no gradient
                for _ in range(2):
                    model.zero_grad()
                    ulr.backward(x, y)
            found.append([ulr.structure.credit.name, *(q.grad for q in (model[0].weight, model[-1].weight))])
    assert found[0][0] == found[1][0]
    for without, penalised, weight in zip(found[0][1:], found[1][1:], (model[0].weight, model[-1].weight), strict=True):
        torch.testing.assert_close(penalised - without, 0.1 * weight.sign(), rtol=1e-3, atol=1e-4)


def test_parameters_that_the_loss_alone_reads_are_trained_if_they_are_the_models():
    x, y = separable()[0]
    model = averaging(x)
    loss = Prototypes(model, 0.0)
    model.register_parameter("points", loss.points)
    assert ("points", "3x3", "exact, of the loss itself") in plan(model, (x, y), loss=loss).rows
    before = loss.points.detach().clone()
    train(model, [(x, y)] * 3, 1, loss=loss, progress=False)
    assert not torch.equal(before, loss.points)


def test_mixed_samples_without_a_label_count_for_nothing():
    """The step is that of the labelled samples alone."""
    x, y = separable()[0]
    half, found = len(y) // 2, []
    for events, labels in ((x[:, :half], y[:half]), (x, torch.cat([y[:half], torch.full_like(y[half:], -100)]))):
        model = averaging(x)
        with attach(model, ULR(credit="global", sampling=Independent(4, multi_sample=True)), seed=1) as ulr:
            ulr.backward(events, labels)
        found.append([q.grad for q in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_an_ignore_index_of_none_ignores_nothing():
    class Focal(nn.Module):
        ignore_index = None

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(outputs.sum(0), targets, reduction="none")

    x, y = separable()[0]
    model = nn.Sequential(nn.Linear(x.shape[2], 6), LIF(), nn.Linear(6, CLASSES))
    assert train(model, [(x, y)], 1, loss=Focal(), progress=False).history[0]["train_accuracy"] is not None


@pytest.mark.filterwarnings("error:Using a target size")
@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.L1Loss(), nn.HuberLoss(reduction="sum"), nn.BCEWithLogitsLoss()])
def test_values_of_a_single_feature_need_no_axis_of_their_own(loss):
    outputs, values = OUTPUTS[..., :1], torch.rand(STEPS, BATCH, dtype=torch.float64)
    objective = resolve(loss)
    for seen, targets in ((outputs[0], values[0]), (outputs, values)):
        found = objective(seen, Targets(Leaf(targets, over_time=targets.ndim > 1)))
        torch.testing.assert_close(found.mean(), loss(seen[..., 0], targets))


def test_labels_that_a_loss_of_values_refuses_are_told():
    with pytest.raises(UsageError, match=r"BCEWithLogitsLoss got .*int64 \(4, 3\), .*give targets of floats"):
        resolve(nn.BCEWithLogitsLoss())(OUTPUTS[0], VALUES.long())


def test_a_function_of_torch_with_options_is_the_object_with_them():
    options = {"weight": torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64), "label_smoothing": 0.1}
    found = resolve(partial(F.cross_entropy, **options))(OUTPUTS[0], LABELS)
    torch.testing.assert_close(found.mean(), F.cross_entropy(OUTPUTS[0], LABELS, **options))
    assert found.shape == (BATCH,)
