"""Properties of every batch, over shapes, dtypes, lengths, layouts and representations (hypothesis)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ulr_snn import LIF, ULR, Fold, LeakyReadout, Online, RecurrentLIF, Sobol, TimeAverage, UsageError, attach, evaluate

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
each = hypothesis.given
some = hypothesis.settings(derandomize=True, deadline=None, max_examples=20, database=None)

# A loss without a gradient may leave the readout alone, or take many passes, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:no gradient reaches", "ignore:the loss without_gradient gives")
CLASSES = 3
WHOLE = (torch.bool, torch.uint8, torch.int32, torch.int64)
DTYPES = (*WHOLE, torch.float16, torch.bfloat16, torch.float32, torch.float64)


# -- models of events [T, B, features], and losses ---------------------------------------------------------


def averaged(features: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 5), LIF(), nn.Linear(5, 4), LIF(), TimeAverage(), nn.Linear(4, CLASSES))


def spiking(features: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 5), LIF(), nn.Linear(5, CLASSES), LIF())


def recurrent(features: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 5), RecurrentLIF(5), nn.Linear(5, CLASSES), LeakyReadout())


def convolutional(features: int) -> nn.Module:
    first = Fold(nn.Unflatten(-1, (1, features)), nn.Conv1d(1, 3, 3, padding=1), nn.Flatten())
    return nn.Sequential(first, LIF(), nn.Linear(3 * features, CLASSES))


class Heads(nn.Module):
    """Two outputs, over time and for the sequence."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.hidden, self.lif = nn.Linear(features, 5), LIF()
        self.steps, self.whole = nn.Linear(5, CLASSES), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        spikes = self.lif(self.hidden(x))
        return {"steps": self.steps(spikes), "rest": [self.whole(spikes).mean(0)]}


def of_both(outputs: dict[str, Any], targets: Tensor) -> Tensor:
    first = nn.functional.cross_entropy(outputs["steps"].sum(0), targets.long(), reduction="none")
    return first + outputs["rest"][0].square().sum(1)


def without_gradient(outputs: Tensor, targets: Tensor) -> list[float]:
    outputs = outputs.sum(0) if outputs.ndim == 3 else outputs
    return (outputs.argmax(1) != targets).tolist()


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "averaged": averaged, "spiking": spiking, "recurrent": recurrent, "convolutional": convolutional
}  # fmt: skip
ESTIMATORS = {
    "default": ULR(),
    "feedback of 3": ULR(credit="feedback", copies=3, antithetic=False),
    "global": ULR(credit="global", copies=2),
    "residual": ULR(credit="residual", copies=4),
    "replayed": ULR(credit="feedback", memory="replay"),
    "copies in turn": ULR(credit="global", copies=4, memory="replay"),
    "Sobol": ULR(credit="global", sampling=Sobol(4)),
}
WITH_ONLINE = ESTIMATORS | {"online": Online()}  # for losses that are sums over time
LOSSES = ("ce_count", "ce_rate", "zero_one", without_gradient)


def made(model: str, features: int) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[model](features)


class Batch(NamedTuple):
    """counts: int64 [T, B, features], small enough for every dtype; lengths: [B]."""

    counts: Tensor
    y: Tensor
    lengths: Tensor

    def given(self, dtype: torch.dtype, sparse: bool = False) -> Tensor:
        x = self.counts.to(dtype)
        return x.to_sparse() if sparse else x


@st.composite
def batches(draw: Callable, largest: int = 3, least_steps: int = 1) -> Batch:
    steps, samples, features = draw(st.integers(least_steps, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    counts = torch.randint(0, largest + 1, (steps, samples, features), generator=generator)
    lengths = torch.randint(1, steps + 1, (samples,), generator=generator)
    return Batch(counts, torch.randint(CLASSES, (samples,), generator=generator), lengths)


names = st.sampled_from(sorted(MODELS))
estimators = st.sampled_from(sorted(ESTIMATORS))
dtypes = st.sampled_from(DTYPES)


def gradients(
    model: nn.Module, x: Any, y: Any, estimator: Any = None, loss: Any = "ce_count", steps: int = 2, **options: Any
) -> tuple[Tensor, list[Tensor | None]]:
    """Returns the losses of the last step [B], and all gradients. More options are those of `attach` and `backward`."""
    lengths = options.pop("lengths", None)
    with attach(model, estimator, loss, **options) as ulr:
        for _ in range(steps):
            model.zero_grad()
            found = ulr.backward(x, y, lengths=lengths)
    return found.loss, [q.grad for q in model.parameters()]


def same(found: tuple[Tensor, list], expected: tuple[Tensor, list]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# -- (a) gradients or one sentence -------------------------------------------------------------------------


@some
@each(
    batches(),
    names,
    st.sampled_from(sorted(WITH_ONLINE)),
    st.sampled_from(LOSSES),
    dtypes,
    st.sampled_from([dtype for dtype in DTYPES if dtype.is_floating_point]),
    *[st.booleans()] * 3,
)
def test_a_step_gives_finite_gradients_or_one_sentence(
    batch, name, estimator, loss, dtype, weights, sparse, padded, first
):
    model = made(name, batch.counts.shape[-1]).to(weights)
    x, options = batch.given(dtype, sparse), {"lengths": batch.lengths} if padded else {}
    x, layout = (x.transpose(0, 1), "BT") if first else (x, "TB")
    try:
        losses, found = gradients(model, x, batch.y, WITH_ONLINE[estimator], loss, layout=layout, **options)
    except UsageError as error:
        assert "\n" not in str(error) and len(str(error)) < 400
        hypothesis.event(f"refused: {str(error)[:60]}")
        return
    assert losses.shape == batch.y.shape and bool(losses.isfinite().all())
    for q, gradient in zip(model.parameters(), found, strict=True):
        assert gradient is None or (gradient.shape == q.shape and gradient.dtype == q.dtype)
        assert gradient is None or bool(gradient.isfinite().all())
    assert any(gradient is not None for gradient in found)


ANY = st.one_of(
    st.sampled_from([None, [], (), {}, "text", 3, -1.5, float("nan"), [1, 2], [[1.0], [2.0]], {"x": 1}, object()]),
    st.builds(
        lambda shape, dtype: torch.zeros(shape).to(dtype),
        st.lists(st.integers(0, 4), max_size=4).map(tuple),
        st.sampled_from([*DTYPES, torch.complex64, torch.int8]),
    ),
)


@hypothesis.settings(some, max_examples=100)
@each(ANY, ANY, st.one_of(st.none(), ANY), names, st.sampled_from(["TB", "BT", "B"]))
def test_whatever_a_batch_holds_it_trains_or_is_refused(x, y, lengths, name, layout):
    try:
        losses, _ = gradients(made(name, 2), x, y, lengths=lengths, layout=layout, steps=1)
        assert bool(losses.isfinite().all())
    except UsageError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
        hypothesis.event("refused")


# -- (b) the form of a batch does not matter ---------------------------------------------------------------


@some
@each(batches(1), names, estimators, dtypes, st.booleans(), st.booleans())
def test_dtype_layout_and_representation_change_nothing(batch, name, estimator, dtype, sparse, first):
    hypothesis.assume(estimator != "replayed" or len(batch.y) > 1)
    make = lambda: made(name, batch.counts.shape[-1])  # noqa: E731
    expected = gradients(make(), batch.given(torch.float32), batch.y, ESTIMATORS[estimator])
    x = batch.given(dtype, sparse)
    x, options = (x.transpose(0, 1), {"layout": "BT"}) if first else (x, {})
    same(gradients(make(), x, batch.y, ESTIMATORS[estimator], **options), expected)


@some
@each(batches(), st.sampled_from([torch.uint8, torch.int32, torch.int64, torch.float64]), names)
def test_types_of_targets_and_arrays_change_nothing(batch, dtype, name):
    make = lambda: made(name, batch.counts.shape[-1])  # noqa: E731
    expected = gradients(make(), batch.given(torch.float32), batch.y)
    x, y = batch.given(dtype), batch.y.to(torch.uint8 if dtype == torch.float64 else dtype)
    for given in ((x, y), (x.numpy(), y.numpy()), (x, y.tolist()), (x.numpy()[:, ::1], batch.y)):
        same(gradients(make(), *given), expected)


# -- (c) padding does not matter ---------------------------------------------------------------------------


@some
@each(batches(), st.sampled_from(["spiking", "recurrent", "convolutional"]), estimators, st.integers(1, 9))
def test_what_lies_beyond_the_lengths_changes_nothing(batch, name, estimator, garbage):
    hypothesis.assume(estimator != "replayed" or (len(batch.y) > 1 and name != "recurrent"))
    make = lambda: made(name, batch.counts.shape[-1])  # noqa: E731
    steps = torch.arange(len(batch.counts))[:, None, None]
    clean = torch.where(steps < batch.lengths[:, None], batch.given(torch.float32), 0.0)
    other = torch.where(steps < batch.lengths[:, None], clean, float(garbage))
    expected = gradients(make(), clean, batch.y, ESTIMATORS[estimator], lengths=batch.lengths)
    same(gradients(make(), other, batch.y, ESTIMATORS[estimator], lengths=batch.lengths), expected)


@some
@each(batches(), st.sampled_from(["spiking", "recurrent", "convolutional"]), st.integers(1, 5))
def test_evaluation_takes_no_notice_of_more_padding(batch, name, more):
    model = made(name, batch.counts.shape[-1])
    x = batch.given(torch.float32)
    padded = torch.cat([x, torch.full((more, *x.shape[1:]), 2.0)])
    found = [evaluate(model, [(given, batch.y, batch.lengths)], device="cpu") for given in (x, padded)]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
    assert found[0]["accuracy"] == found[1]["accuracy"]


# -- (d) one time step, (e) the order of samples -----------------------------------------------------------


@some
@each(batches(), names, estimators, st.integers(1, 5), dtypes)
def test_one_time_step_trains(batch, name, estimator, samples, dtype):
    model = made(name, batch.counts.shape[-1])
    x, y = batch.given(dtype)[:1, :samples], batch.y[:samples]
    hypothesis.assume(estimator != "replayed" or len(y) > 1)
    losses, found = gradients(model, x, y, ESTIMATORS[estimator])
    assert losses.shape == y.shape and all(g is None or bool(g.isfinite().all()) for g in found)
    evaluate(model, [(x, y)], device="cpu")


@some
@each(batches(), names, st.randoms(use_true_random=False), st.booleans())
def test_the_order_of_samples_changes_no_evaluation(batch, name, draw, padded):
    order = draw.sample(range(len(batch.y)), len(batch.y))
    model, x = made(name, batch.counts.shape[-1]), batch.given(torch.float32)
    lengths = (batch.lengths,) if padded and name != "averaged" else ()
    expected = evaluate(model, [(x, batch.y, *lengths)], device="cpu")
    found = evaluate(model, [(x[:, order], batch.y[order], *(part[order] for part in lengths))], device="cpu")
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["accuracy"] == expected["accuracy"]


# -- several outputs ---------------------------------------------------------------------------------------


@some
@each(batches(), st.sampled_from(["default", "global", "residual"]), dtypes, st.booleans())
def test_several_outputs_train_in_every_form_of_batch(batch, estimator, dtype, sparse):
    def step(x: Tensor) -> tuple[Tensor, list]:
        torch.manual_seed(0)
        model = Heads(batch.counts.shape[-1])
        return gradients(model, x, batch.y, ESTIMATORS[estimator], of_both, output="all")

    x = (batch.counts > 0).to(dtype)
    expected = step(x.float())
    assert all(g is not None and bool(g.isfinite().all()) for g in expected[1])
    same(step(x.to_sparse() if sparse else x), expected)
