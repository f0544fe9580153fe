"""What must always hold (DESIGN section 5): models left as they were, seeds, copies, padding, no path
through a spike."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import errors
from tests.statistics import compare_means
from ulr_snn import LIF, ULR, Fold, LeakyReadout, Logistic, RecurrentLIF, TimeAverage, attach
from ulr_snn.credit.feedback import FeedbackLimits
from ulr_snn.credit.kinds import Auto, Feedback, Residual
from ulr_snn.model.graph import leaves
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.noise.random import Noise
from ulr_snn.sites.binding import bind

STEPS, BATCH, PIXELS, CLASSES = 7, 6, 5, 3
# Feedback shows both kinds of its steps within three: pairs that refresh it, and single passes. All kinds of it are at
# work in `dense`, whose first layer is too wide for learning from its recurrent current.
LIMITS = FeedbackLimits(entries=80, warm_up=1)
CREDITS = [
    ULR(credit="global", copies=4),
    ULR(credit="global", copies=2, antithetic=False),
    ULR(credit=Feedback(refresh=2, limits=LIMITS), maps="learned"),
    ULR(credit=Feedback(limits=LIMITS), maps="learned", copies=4),
    ULR(credit=Residual(limits=LIMITS), maps="learned", copies=4),
    ULR(credit=Feedback(limits=LIMITS)),
    ULR(credit=Residual(limits=LIMITS), copies=4),
]
NAMES = ["global-4", "global-2-independent", "feedback", "feedback-4", "residual", "exact", "exact-residual"]
each_credit = pytest.mark.parametrize("estimator", CREDITS, ids=NAMES)


def dense(seed: int = 0) -> nn.Sequential:
    """Learnable leaks and thresholds, recurrence, two resets; membranes over time."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(PIXELS, 9),
        RecurrentLIF(9, 0.8, learn_beta=True),
        nn.LayerNorm(9),
        nn.Linear(9, 8),
        RecurrentLIF(8, 0.7, reset="zero", learn_threshold=True),
        nn.Linear(8, CLASSES),
        LeakyReadout(0.9, learn_beta=True),
    ).double()


def averaged() -> nn.Sequential:
    return nn.Sequential(*dense()[:5], TimeAverage(), nn.Linear(8, CLASSES)).double()


def normed() -> nn.Sequential:
    """Convolution, batch norm, pooling, dropout."""
    torch.manual_seed(1)
    return nn.Sequential(
        Fold(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)),
        LIF(0.8),
        Fold(nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(0.4), nn.Linear(16, 8), nn.BatchNorm1d(8)),
        LIF(0.8),
        TimeAverage(),
        nn.Linear(8, CLASSES),
    ).double()


def data(shape: tuple[int, ...] = (PIXELS,), seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(STEPS, BATCH, *shape, generator=generator) < 0.5).double()
    return x, torch.randint(CLASSES, (BATCH,), generator=generator)


def moved(device: torch.device, model: nn.Module, *tensors: Tensor) -> list:
    return [model.to(device), *(tensor.to(device) for tensor in tensors)]


def gradients(model: nn.Module, batch: tuple, estimator: ULR, steps: int = 3, **settings) -> list[Tensor | None]:
    """Gradients added up over some steps at unchanged weights."""
    lengths = settings.pop("lengths", None)
    model.zero_grad()
    with attach(model, estimator, **settings) as ulr:
        for _ in range(steps):
            ulr.backward(*batch, lengths=lengths)
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_close(ours: list, expected: list, tolerance: float = 1e-11) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# -- the model stays what it was ---------------------------------------------------------------------------


class Broken(RuntimeError):
    pass


def snapshot(model: nn.Module) -> list[set[str]]:
    return [set(vars(module)) for module in model.modules()]


def image_data() -> tuple[Tensor, Tensor]:
    return data((1, 4, 4))


@pytest.mark.parametrize(("make", "batch"), [(dense, data), (normed, image_data)], ids=["dense", "normed"])
@each_credit
def test_the_model_is_as_it_was_after_steps_and_exceptions(make, batch, estimator, device):
    model, x, y = moved(device, make(), *batch())
    before, keys, attributes = model.eval()(x), list(model.state_dict()), snapshot(model)

    def broken_loss(outputs, targets):
        raise Broken

    def broken_hook(*_):
        raise Broken

    def same() -> None:
        assert torch.equal(model.eval()(x), before)
        assert list(model.state_dict()) == keys and snapshot(model) == attributes
        twin, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert torch.equal(twin(x), before) and torch.equal(thawed(x), before)

    with attach(model, estimator) as ulr:
        same()
        ulr.backward(x, y)
        same()
        with pytest.raises(Broken):
            ulr.backward(x, y, broken_loss)
        same()
        handle = model[-1].register_forward_hook(broken_hook)
        with pytest.raises(Broken):
            ulr.backward(x, y)
        handle.remove()
        same()
        ulr.backward(x, y)
    same()


@pytest.mark.parametrize(("make", "batch"), [(dense, data), (normed, image_data)], ids=["dense", "normed"])
def test_deterministic_firing_of_a_bound_model_is_the_unbound_model(make, batch, device):
    model, x, _ = moved(device, make().eval(), *batch())
    before = model(x)
    with bind(model, NoiseLevel(Logistic())):
        assert torch.equal(model(x), before)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(model(1 - x), before)


# -- seeds and copies --------------------------------------------------------------------------------------


@each_credit
def test_the_same_seed_gives_the_same_gradients(estimator, device):
    model, x, y = moved(device, dense(), *data())
    one, again = (gradients(model, (x, y), estimator, seed=3) for _ in range(2))
    for a, b in zip(one, again, strict=True):
        assert torch.equal(a, b)
    other = gradients(model, (x, y), estimator, seed=4)
    assert not torch.allclose(one[0], other[0], rtol=1e-3)
    torch.manual_seed(123)  # torch's own generator has no say
    assert torch.equal(gradients(model, (x, y), estimator, seed=3)[0], one[0])


@pytest.mark.parametrize("coupled", [nn.Dropout(0.0), nn.BatchNorm1d(8, momentum=0.0)], ids=["dropout", "norm"])
@each_credit
def test_copies_in_one_pass_or_one_pass_a_copy(estimator, coupled, device):
    """A module in training mode that couples rows forces a pass for each copy; here it changes no number."""

    class Ignored(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0 * super().forward(x)

    model, ignored = averaged(), Ignored(copy.deepcopy(coupled)).double().requires_grad_(False)
    split = nn.Sequential(*model[:4], Fold(ignored), *model[4:])
    split, x, y = moved(device, split, *data())  # and the model with it: they share their layers
    together = gradients(model, (x, y), estimator)
    apart = gradients(split, (x, y), estimator)
    kept = [g for g, p in zip(apart, split.parameters(), strict=True) if p.requires_grad]
    assert_close(kept, together)


@each_credit
def test_dropout_draws_once_and_alike_for_all_copies(estimator, device):
    model, x, y = moved(device, nn.Sequential(*averaged()[:5], TimeAverage(), nn.Dropout(0.5)).double(), *data())
    y = y % 2

    def state() -> Tensor:
        return torch.cuda.get_rng_state() if device.type == "cuda" else torch.get_rng_state()

    for step in range(2):
        torch.manual_seed(step)
        model(x)
        expected = state()
        torch.manual_seed(step)
        with attach(model, estimator) as ulr:
            outputs = ulr.backward(x, y).outputs  # [K, B, 8]
        assert torch.equal(state(), expected)
        alive = (outputs != 0).flatten(1).any(0)
        dropped = ~alive
        assert dropped.any()
        if len(outputs) >= 4:  # a unit that any copy shows was dropped in none of them
            assert alive.float().mean() < 0.7


@each_credit
def test_running_statistics_come_from_the_first_copy_alone(estimator, device):
    batch = image_data()
    model, x, y = moved(device, normed(), *batch)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    alone = copy.deepcopy(model)
    with attach(model, estimator) as ulr:
        ulr.backward(x, y)
    sample = torch.arange(BATCH, dtype=torch.int32, device=device)
    noise = Noise(0, 0, sample, torch.zeros_like(sample))
    with bind(alone, NoiseLevel(estimator.firing, progress=0.5), noise), torch.no_grad():
        alone(x)
    for (name, ours), expected in zip(model.named_buffers(), alone.buffers(), strict=True):
        assert torch.equal(ours, expected), name
        if name.endswith("num_batches_tracked"):
            assert ours == 1


# -- losses and parameters ---------------------------------------------------------------------------------


def constant(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0 * outputs.flatten(1).sum(1) + 3 if outputs.ndim < 3 else 0 * outputs.sum((0, 2)) + 3


@each_credit
def test_a_constant_loss_has_no_gradient_at_all_where_there_is_a_baseline(estimator, device):
    model, x, y = moved(device, dense(), *data())
    for gradient in gradients(model, (x, y), estimator, loss=constant):
        exactly = estimator.credit.name == "feedback"
        assert gradient is None or gradient.abs().max() <= (0 if exactly else 1e-14)


@each_credit
@pytest.mark.parametrize("drive", [-1e4, 1e4], ids=["silent", "saturated"])
def test_neurons_without_any_innovation_do_no_harm(estimator, drive, device):
    """Where every spike is certain, gradients are zero, and nothing that is learned becomes NaN."""
    model, x, y = moved(device, averaged().float(), *data())
    bias = model[0].bias.detach().clone()
    with attach(model, estimator) as ulr:
        for value in (drive, drive, None):
            with torch.no_grad():
                model[0].bias.copy_(bias if value is None else torch.full_like(bias, value))
                model[3].bias.fill_(value or 0.0)
            for _ in range(4):
                model.zero_grad()
                ulr.backward(x, y)
                finite = [bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None]
                assert all(finite)


@pytest.mark.slow
def test_a_constant_loss_has_no_gradient_on_average(device):
    """Without any baseline (the first step of a single copy)."""
    model, x, y = moved(device, dense(), data()[0].repeat(1, 200, 1), data()[1].repeat(200))
    estimator = ULR(credit="global", copies=1, firing=Logistic(1.0))  # no entry rests on rare spikes: near normal
    rows = []
    for seed in range(24):
        found = gradients(model, (x, y), estimator, steps=1, loss=constant, seed=seed)
        rows.append(torch.stack([g.flatten()[0] for g in found[:-1]]))
    draws = torch.stack(rows)
    verdict = compare_means("zero gradient", draws, torch.zeros(draws.shape[1]))
    assert draws.abs().max() > 0 and verdict.agrees, verdict
    assert not compare_means("zero gradient", draws + 0.1, torch.zeros(draws.shape[1]), spending=False).agrees


@each_credit
def test_frozen_parameters_get_no_gradient_and_change_nothing_else(estimator, device):
    model, x, y = moved(device, dense(), *data())
    everything = gradients(model, (x, y), estimator)
    names = [name for name, _ in model.named_parameters()]
    for frozen in ("0.weight", "1.recurrent.weight", "1.beta", "3.bias", "4.threshold", "5.weight"):
        part = copy.deepcopy(model)
        part.get_parameter(frozen).requires_grad_(False)
        found = gradients(part, (x, y), estimator)
        assert found[names.index(frozen)] is None
        expected = [None if name == frozen else g for name, g in zip(names, everything, strict=True)]
        assert_close(found, expected)


def test_backward_adds_to_gradients_and_counts_its_passes():
    model, (x, y) = dense(), data()
    fresh = gradients(model, (x, y), CREDITS[0], steps=1)
    model.zero_grad()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with attach(model, CREDITS[0]) as ulr:
        estimate = ulr.backward(x, y)
    assert_close([p.grad for p in model.parameters()], [g + 1 for g in fresh])
    assert estimate.loss.shape == (BATCH,) and estimate.outputs.shape == (4, STEPS, BATCH, CLASSES)
    assert ulr.forward_passes == 4 * BATCH
    losses = [nn.functional.cross_entropy(o.sum(0), y, reduction="none") for o in estimate.outputs]
    torch.testing.assert_close(estimate.loss, torch.stack(losses).mean(0))


@pytest.mark.parametrize("warm_up", [1, FeedbackLimits().warm_up, 10])
def test_the_usual_step_of_feedback_is_one_forward_pass(warm_up):
    model, (x, y) = dense(), data()
    with attach(
        model, ULR(credit=Auto(refresh=4, limits=FeedbackLimits(entries=80, warm_up=warm_up)), maps="learned")
    ) as ulr:
        copies = [ulr.backward(x, y).stats["copies"] for _ in range(17)]
    assert copies == [2] * warm_up + [2 if step % 4 == 0 else 1 for step in range(warm_up, 17)]
    assert ulr.forward_passes == (sum(copies) + 1) * BATCH  # one to see what depends on the events


@pytest.mark.parametrize("neuron", [LIF(), RecurrentLIF(8)], ids=["feed-forward", "recurrent"])
def test_nothing_to_learn_from_the_outputs_needs_no_pair(neuron):
    """The only layer's spikes reach the loss directly, and its recurrent current says the rest: no second copy."""
    model, (x, y) = nn.Sequential(nn.Linear(PIXELS, 8), neuron, *averaged()[5:]).double(), data()
    with attach(model) as ulr:
        assert [ulr.backward(x, y).stats["copies"] for _ in range(6)] == [1] * 6


class Unused(nn.Sequential):
    """Two parameters that nothing comes of: one that is never used, one whose use is cut off."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.idle, self.cut = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.cut.detach()


@each_credit
def test_a_parameter_without_gradient_is_named_once(estimator, device):
    model, x, y = moved(device, Unused(*averaged()).double(), *data())
    quiet = dataclasses.replace(estimator or ULR(), noise={"idle": None, "cut": None})
    with attach(model, quiet) as ulr:
        with pytest.warns(UserWarning, match="no gradient reaches idle, cut;") as warned:
            ulr.backward(x, y)
        assert len(warned) == 1
        ulr.backward(x, y)  # said once: warnings are errors here
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {"idle", "cut"}
    with attach(model, estimator) as ulr, pytest.warns(UserWarning, match="no gradient reaches idle;"):
        ulr.backward(x, y)  # the one that something comes of learns from noise on itself
    assert {name for name, p in model.named_parameters() if p.grad is None} == {"idle"}
    model.idle.requires_grad_(False)
    model.cut.requires_grad_(False)
    gradients(model, (x, y), estimator)


def test_a_loss_without_gradient_names_the_readout(device):
    model, x, y = moved(device, averaged(), *data())

    quiet = ULR(noise={"6": None, "outputs": None})
    with attach(model, quiet, errors) as ulr, pytest.warns(UserWarning, match=r"reaches 6\.weight, 6\.bias;"):
        ulr.backward(x, y)
    assert {name for name, p in model.named_parameters() if p.grad is None} == {"6.weight", "6.bias"}
    unsmoothed = ULR(noise={"outputs": None})
    with attach(model, unsmoothed, errors) as ulr:  # of its own accord it learns from noise on its weights
        ulr.backward(x, y)
    assert all(p.grad is not None for p in model.parameters())


# -- events: padding, axes, dtypes -------------------------------------------------------------------------


def summed(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss of one's own, which knows nothing of padding."""
    values = outputs.sum(0) if outputs.ndim == 3 else outputs
    return (values.sum(1) - targets) ** 2


def spiking() -> nn.Sequential:
    return dense()[:5]


@pytest.mark.product
@pytest.mark.parametrize("loss", ["ce_count", "ce_rate", summed], ids=["ce_count", "ce_rate", "own"])
@pytest.mark.parametrize("make", [dense, averaged, spiking], ids=["leaky readout", "time average", "spikes"])
@each_credit
def test_a_padded_sample_is_that_sample(make, loss, estimator, device):
    model, x, y = moved(device, make(), *data())
    estimator = dataclasses.replace(estimator, firing=Logistic(1.0))  # the copies of one sample differ
    length = 4
    alone = x[:length, :1], y[:1]
    padded = x[:, :1].clone(), y[:1]
    padded[0][length:] = 17.0
    expected = gradients(model, alone, estimator, steps=1, seed=1, loss=loss)
    lengths = torch.tensor([length], device=device)
    assert_close(gradients(model, padded, estimator, steps=1, seed=1, loss=loss, lengths=lengths), expected)
    assert any(g is not None and g.abs().max() > 1e-6 for g in expected)
    unmarked = gradients(model, padded, estimator, steps=1, seed=1, loss=loss)
    different = [not torch.allclose(a, b, rtol=1e-3) for a, b in zip(unmarked, expected, strict=True) if b is not None]
    assert any(different)
    with attach(model, estimator, loss) as ulr:
        one, other = ulr.backward(*alone).loss, None
    with attach(model, estimator, loss) as ulr:
        other = ulr.backward(*padded, lengths=lengths).loss
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@each_credit
def test_what_stands_in_the_padding_makes_no_difference(estimator, device):
    model, x, y = moved(device, dense(), *data())
    lengths = torch.tensor([3, 7, 1, 5, 7, 2], device=device)
    together = gradients(model, (x, y), estimator, steps=1, lengths=lengths)
    scrambled = x.clone()
    for sample, length in enumerate(lengths):
        scrambled[length:, sample] = 9.0
    assert_close(gradients(model, (scrambled, y), estimator, steps=1, lengths=lengths), together)


@pytest.mark.parametrize("name", ["leaky readout", "time average"])
def test_readouts_hold_or_leave_out_the_padding(name, device):
    readout = {"leaky readout": LeakyReadout(0.8), "time average": TimeAverage()}[name].to(device)
    current = torch.rand(5, 2, 3, device=device)
    readout.lengths = torch.tensor([3, 5], device=device)
    ours = readout(current)
    readout.lengths = None
    short, whole = readout(current[:3, :1]), readout(current[:, 1:])
    if name == "time average":
        torch.testing.assert_close(ours, torch.cat([short, whole]))
    else:
        torch.testing.assert_close(ours[:3, :1], short)
        torch.testing.assert_close(ours[:, 1:], whole)
        assert torch.equal(ours[3:, 0], short[2:].expand(2, 1, 3)[:, 0])


@each_credit
def test_axes_and_dtypes_of_events_make_no_difference(estimator, device):
    model, x, y = moved(device, dense(), *data())
    expected = gradients(model, (x, y), estimator)
    swapped = gradients(model, (x.transpose(0, 1).contiguous(), y), estimator, time_first=False)
    assert_close(swapped, expected, 0.0)
    for dtype in (torch.uint8, torch.bool, torch.int64, torch.float32, torch.float16):
        assert_close(gradients(model, (x.to(dtype), y), estimator), expected, 0.0)


@each_credit
def test_float32_gives_the_gradients_of_float64(estimator, device):
    model, x, y = moved(device, dense(), *data())
    expected = gradients(model, (x, y), estimator)
    single = gradients(copy.deepcopy(model).float(), (x.float(), y), estimator)
    for ours, other in zip(single, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - other).norm() <= 1e-4 * other.norm() + 1e-6


# -- no path through a spike -------------------------------------------------------------------------------


def test_no_gradient_path_passes_through_a_spike():
    model, (x, _) = dense(), data()
    sample = torch.arange(BATCH, dtype=torch.int32)
    with bind(model, NoiseLevel(Logistic()), Noise(0, 0, sample, torch.zeros_like(sample))) as records:
        outputs = model(x)
    first, second = records
    parameters = {id(p): name for name, p in model.named_parameters()}
    spikes = {id(first.spikes): "first", id(second.spikes): "second"}

    def reached(tensor: Tensor) -> set[str]:
        return {(parameters | spikes).get(leaf, "unknown") for leaf in leaves([tensor])}

    assert first.spikes.grad_fn is None and second.spikes.grad_fn is None
    assert reached(first.x) == {
        "0.weight",
        "0.bias",
        "1.recurrent.weight",
        "1.beta",
        "1.threshold",
    } & reached(first.x)
    assert {"0.weight", "0.bias", "1.recurrent.weight", "1.beta"} <= reached(first.x)
    own = {"2.weight", "2.bias", "3.weight", "3.bias", "4.threshold", "4.recurrent.weight"}
    assert own | {"first"} == reached(second.x)
    assert reached(outputs) == {"second", "5.weight", "5.bias", "6.beta"}


def test_an_unbound_net_gives_hidden_layers_no_gradient():
    model, (x, y) = dense(), data()
    nn.functional.cross_entropy(model(x).sum(0), y).backward()
    found = {name for name, p in model.named_parameters() if p.grad is not None}
    assert found == {"5.weight", "5.bias", "6.beta"}


# -- saved and loaded --------------------------------------------------------------------------------------


@each_credit
def test_a_loaded_attachment_goes_on_as_the_saved_one(estimator, device):
    model, x, y = moved(device, dense(), *data())
    settings = {"estimator": estimator, "seed": 9}

    def go_on(ulr, steps: int) -> list[Tensor]:
        found = []
        for _ in range(steps):
            model.zero_grad()
            ulr.backward(x, y)
            found += [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
        return found

    with attach(model, **settings) as ulr:
        go_on(ulr, 5)
        file = io.BytesIO()
        torch.save(ulr.state_dict(), file)
        expected, passes = go_on(ulr, 6), ulr.forward_passes
    file.seek(0)
    state = torch.load(file, weights_only=True)
    with attach(model, **settings) as ulr:
        ulr.load_state_dict(state)
        assert_close(go_on(ulr, 6), expected)
        assert ulr.forward_passes == passes
    with attach(model, **settings) as ulr:
        other = go_on(ulr, 6)
    assert not torch.allclose(torch.cat([g.flatten() for g in other]), torch.cat([g.flatten() for g in expected]))
