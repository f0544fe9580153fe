"""Pictures with channels last in memory: kernels give the same numbers, and models train the same."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import library_of
from ulr_snn import LIF, ULR, Fold, Gaussian, LeakyReadout, Logistic, attach
from ulr_snn.credit.pooling import SpikePooling
from ulr_snn.kernels import dispatch, sparse
from ulr_snn.kernels.layout import Views, channels_last, free_layout, laid, shown, stored
from ulr_snn.kernels.limits import limits
from ulr_snn.kernels.pool import Pool, empty_like
from ulr_snn.kernels.state import State
from ulr_snn.noise.firing import law_of
from ulr_snn.noise.random import Drawer, Noise

SHAPE = 5, 4, 6, 3, 7  # [T, B, C, H, W]
BOTH = pytest.mark.parametrize("last", [False, True], ids=["first", "last"])


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_layouts_are_views_of_one_another():
    x = random(SHAPE, 0)
    y = laid(x, last=True)
    assert channels_last(y) and not channels_last(x) and torch.equal(x, y) and y.shape == x.shape
    assert stored(y).is_contiguous() and torch.equal(shown(stored(y)), x) and laid(y, last=True) is not x
    assert laid(x, last=False).data_ptr() == x.data_ptr() and laid(y, last=True).data_ptr() == y.data_ptr()
    assert channels_last(torch.randn(4, 6, 3, 7).contiguous(memory_format=torch.channels_last))
    assert not any(map(channels_last, (x[:, :, :1, 0], x[0, 0], x.transpose(3, 4), x.transpose(0, 1))))
    with Pool().used():
        assert channels_last(empty_like(y)) and channels_last(empty_like(y, 2)) and not channels_last(empty_like(x))


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("law", [None, Logistic(), Gaussian()], ids=["deterministic", "logistic", "gaussian"])
def test_scans_and_credit_give_the_same(reset, law):
    """Of each neuron with its own leak, threshold and noise, in parts of time, with padding."""
    beta, threshold, scale = (0.3 + 0.5 * random(SHAPE[2:], seed).sigmoid() for seed in (1, 2, 3))
    neuron, lengths, found = LIF(beta, threshold, reset), torch.tensor([5, 3, 1, 4]), []
    neuron.lengths = lengths
    for last in (False, True):
        state = State(*(random(SHAPE[1:], seed).abs() for seed in (4, 5)))
        sample = torch.arange(SHAPE[1], dtype=torch.int32)
        drawer = law and Drawer(Noise(3, 5, sample, sample // 2, sample % 2 == 1), law, 2, SHAPE[0], scale)
        current = laid(2 * random(SHAPE, 6), last)
        with torch.no_grad():
            spikes, x, _ = neuron.fired(current, drawer, state)
            again = neuron.fired(current, drawer, State(*(random(SHAPE[1:], seed).abs() for seed in (4, 5))), spikes)
        assert torch.equal(again[0], spikes) and channels_last(spikes) is channels_last(x) is last
        a, later = laid(random(SHAPE, 7), last), random(SHAPE[1:], 8)
        given = x, law_of(law) if law else "logistic", scale, lengths, spikes, beta, threshold, reset
        over = torch.tensor([0.5, 1.0, 2.0, 80.0])
        total, currents = dispatch.credit(a, *given, later, True, over=over)
        mixed = dispatch.credit(laid(a, not last), *given, random(SHAPE[1:], 8), False, overwrite=True, over=over)
        same = dispatch.credit(a[:1].expand(SHAPE), *given, random(SHAPE[1:], 8), False)
        slopes = dispatch.slopes(x, given[1], scale, lengths, over)
        leak = dispatch.leak_gradient(currents, x, scale, threshold, spikes, reset)
        leaky = dispatch.leaky(a, spikes, beta, reset)
        assert torch.equal(mixed[1], currents)
        assert all(channels_last(each) is last for each in (total, currents, mixed[1], same[1], slopes, leaky))
        drawn = spikes, x, state.membrane, state.spikes
        found.append([drawn, (total, currents, later, same[1], slopes, leak, leaky)])
    assert all(torch.equal(one, other) for one, other in zip(*(each[0] for each in found), strict=True))
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-6)
    assert found[0][0][0].unique().numel() == 2


@pytest.mark.parametrize("law", ["logistic", "gaussian"])
def test_draws_step_by_step_give_the_same(law):
    words = tuple(torch.randint(-(2**31), 2**31, SHAPE[:2], dtype=torch.int32) for _ in range(2))
    scale, over = 0.5 + random(SHAPE[2:], 1).sigmoid(), torch.tensor([0.5, 1.0, 2.0, 4.0])
    given = SimpleNamespace(law=law, scale=scale, words=words, mirrored=None)
    drives, found = random(SHAPE, 2), []
    for last in (False, True):
        draw = dispatch.StepDraw(given, laid(drives[0], last), torch.tensor([5, 3, 1, 4]), over)
        entry = laid(drives[1], last).requires_grad_()
        spikes = [draw(0, laid(drives[0], last)), draw.linked(1, entry), draw(2, laid(drives[2], not last))]
        (g,) = torch.autograd.grad(spikes[1].sum(), entry)
        assert torch.equal(g, draw.slope[1]) and all(channels_last(each) is last for each in (*spikes, g))
        found.append([*spikes, *draw.slope[:3], draw.farthest])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("windows", [(2, 2, 0), (3, 2, 1), ((1, 3), (2, 1), (0, 1))], ids=str)
def test_pooling_of_spikes_gives_the_same(windows):
    spikes, found = (random((10, 6, 9, 8), 0) > 0.8).float(), []
    for last in (False, True):
        x = laid(spikes, last).requires_grad_()
        with SpikePooling():
            out = nn.functional.max_pool2d(x, *windows)
        (g,) = torch.autograd.grad(out, x, laid(random(out.shape, 1), last))
        assert type(out.grad_fn).__name__ == "_OrBackward" and channels_last(out) is channels_last(g) is last
        found.append((out, g))
        assert dispatch.window_sums(laid(spikes * 0.5, last), ((2, 2), (2, 2), (0, 0)), (4, 4))[1] is False
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_of_events_give_the_same(stride, monkeypatch):
    monkeypatch.setattr(limits, "share", 10.0)
    module, frames, found = nn.Conv2d(2, 5, 3, stride, 1), (random((8, 2, 9, 7), 0) > 1.5).float(), []
    for last in (False, True):
        with free_layout(last):
            rows = sparse.Rows.of(frames.flatten(1))
            out = sparse.convolution(frames.shape[1:], rows, module.weight, module.bias, stride, 1)
        g = laid(random(tuple(out.shape), 1), last)
        found.append([out, *torch.autograd.grad(out, list(module.parameters()), g)])
        assert channels_last(out) is last
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(found[0][0], module(frames))


# -- models ------------------------------------------------------------------------------------------------


def deep() -> nn.Module:
    """A chain of all that keeps the layout, and a readout."""
    front = Fold(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)), LIF(0.8, 0.5, "zero", True, True)
    middle = Fold(nn.MaxPool2d(2), nn.Conv2d(8, 6, 3, padding=1)), LIF()
    return nn.Sequential(*front, *middle, Fold(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(24, 4)), LeakyReadout())


class Looping(nn.Module):
    """Neurons of a loop over time, written as people do. flat: how a picture becomes a row."""

    def __init__(self, flat: str) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.neurons, self.out, self.flat = LIF(), nn.Linear(8 * 16, 4), flat

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(self.convolution(x.flatten(0, 1)))
        spikes = self.neurons(rows.view(*x.shape[:2], *rows.shape[1:]))
        pooled = nn.functional.max_pool2d(spikes.flatten(0, 1), 2)
        flat = pooled.view(len(pooled), -1) if self.flat == "view" else pooled.flatten(1)
        return self.out(flat.unflatten(0, x.shape[:2]))


def gradients(
    model: nn.Module, free: bool, monkeypatch: pytest.MonkeyPatch, narrow: int = 0, **options
) -> tuple[list[Tensor], set]:
    """Gradients of two steps, and the layouts in which layers of neurons got currents of pictures in the second."""
    seen, own = set(), dispatch.scan

    def scan(current: Tensor, *others: object) -> object:
        seen.update({channels_last(current, 2)} if current.ndim == 5 else ())
        return own(current, *others)

    monkeypatch.setattr(dispatch, "scan", scan)
    monkeypatch.setattr("ulr_snn.model.bound.free_layout", lambda asked: free_layout(asked and free))
    monkeypatch.setattr(limits, "smallest", 256)
    monkeypatch.setattr(limits, "block", 1 << 12)
    monkeypatch.setattr(limits, "narrow", narrow)
    torch.manual_seed(0)
    x = (random((6, 5, 2, 8, 8), 1) > 0.5).float()
    found = []
    with attach(model, ULR(**options), "ce_count", seed=3) as ulr:
        for _ in range(2):
            model.zero_grad()
            seen.clear()
            ulr.backward(x, torch.arange(5) % 4)
            found += [q.grad.clone() for q in model.parameters()]
    monkeypatch.undo()
    return found, seen


@pytest.mark.parametrize("make", [deep, lambda: Looping("flatten")], ids=["chain", "loop"])
@pytest.mark.parametrize("narrow", [0, 4])
@pytest.mark.parametrize("options", [{}, {"maps": "learned"}, {"credit": "residual", "copies": 4}], ids=str)
def test_models_get_the_same_gradients(make, narrow, options, monkeypatch):
    """Narrow pictures, behind the pooling of the chain, have channels first, and others last."""
    found = []
    for free in (False, True):
        torch.manual_seed(0)
        grads, seen = gradients(make(), free, monkeypatch, narrow, **options)
        assert seen == ({True, False} if free and narrow and make is deep else {free})
        found.append(grads)
    largest = max(float(g.norm()) for g in found[0])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-4 * one.norm() + 1e-5 * largest


@pytest.mark.parametrize(("flat", "free"), [("view", False), ("flatten", True)])
def test_models_that_view_pictures_keep_channels_first(flat, free, monkeypatch):
    torch.manual_seed(0)
    grads, seen = gradients(Looping(flat), True, monkeypatch)
    assert seen == {free} and all(g.isfinite().all() for g in grads)


class Tutorial(nn.Module):
    """A loop of snnTorch that views pictures. leak: of a readout in the model's own code, behind a chain; None: there
    is none."""

    def __init__(self, leak: float | None) -> None:
        import snntorch

        super().__init__()
        self.first, self.second, self.leak = nn.Conv2d(2, 8, 3), nn.Linear(72, 4), leak
        self.inner, self.outer = snntorch.Leaky(0.8), snntorch.Leaky(0.9) if leak is None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner, outer, y, found = self.inner.init_leaky(), torch.zeros(()), 0.0, []
        for now in x:
            spikes, inner = self.inner(nn.functional.max_pool2d(self.first(now), 2), inner)
            current = self.second(spikes.view(len(now), -1))
            if self.leak is None:
                y, outer = self.outer(current, outer)
            else:
                y = self.leak * y + current
            found.append(y)
        return torch.stack(found)


@pytest.mark.parametrize("leak", [None, 0.5], ids=["chain", "tail"])
def test_chains_have_channels_last_whatever_the_models_own_code_does(leak, monkeypatch):
    library_of("snntorch")
    found = []
    for free in (False, True):
        torch.manual_seed(0)
        grads, seen = gradients(Tutorial(leak), free, monkeypatch)
        assert seen == {free}
        found.append(grads)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_views_that_need_channels_first_are_noted():
    x, flat = random((4, 6, 3, 7), 0), random((4, 6), 0)
    for reshape, expected in (
        (lambda: x.view(4, -1), True),
        (lambda: x.view(4, 6, 21), True),
        (lambda: x.view(24, 3, 7), True),
        (lambda: [picture.view(-1) for picture in x], True),
        (lambda: x.flatten(2).view(4, -1), True),
        (lambda: x.view(2, 2, 6, 3, 7), False),
        (lambda: x.view(2, 2, 6, 3, 7).view(4, 6, 3, 7), False),
        (lambda: x.flatten(1), False),
        (lambda: x.mean((2, 3), keepdim=True).view(4, 6), False),
        (lambda: flat.view(2, 2, 6).view(4, 6).view(24), False),
        (lambda: x.view(torch.int32), False),
        (lambda: x[:0].view(0, 18, 7), False),
    ):
        with Views(nn.Identity()) as views:
            reshape()
        assert views.found is expected
    assert Views(torch.jit.trace(nn.Conv2d(2, 3, 3), torch.rand(1, 2, 5, 5))).found


def test_losses_may_view_outputs():
    model = nn.Sequential(Fold(nn.Conv2d(2, 8, 3)), LIF(), Fold(nn.Conv2d(8, 3, 1)))
    seen = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(outputs)
        return outputs.view(*outputs.shape[:2], -1).square().mean((0, 2))

    with attach(model, ULR(), loss, seed=0) as ulr:
        for _ in range(2):
            ulr.backward(torch.rand(4, 3, 2, 8, 8), torch.zeros(3))
    assert len(seen) >= 2


def test_a_layer_without_effect_is_found_behind_a_convolution():
    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.out = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 4, 3), nn.Linear(64, 3)
            self.neurons, self.watched, self.last = LIF(), LIF(), LIF()

        def forward(self, x: Tensor) -> Tensor:
            spikes = self.neurons(self.first(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
            current = self.second(spikes.flatten(0, 1)).unflatten(0, x.shape[:2])
            self.watched(current)  # as a monitor does
            return self.out(self.last(current).flatten(2))

    torch.manual_seed(0)
    with attach(Watched(), ULR(), "ce_count", seed=0) as ulr:
        ulr.backward(torch.rand(6, 5, 2, 8, 8), torch.arange(5) % 3)
        assert ulr.structure.noiseless == {"watched"}


@pytest.mark.parametrize("channels", [1, 2])
def test_gray_pictures_too(channels, monkeypatch):
    seen, own = [], dispatch.scan
    monkeypatch.setattr(dispatch, "scan", lambda x, *others: seen.append(channels_last(x, 2)) or own(x, *others))
    model = nn.Sequential(Fold(nn.Conv2d(channels, 8, 3)), LIF(), nn.Flatten(2), nn.Linear(288, 3))
    with attach(model, ULR(), "ce_count", seed=0) as ulr:
        for _ in range(2):
            seen.clear()
            ulr.backward(torch.rand(4, 3, channels, 8, 8), torch.arange(3))
    assert seen[0] and model[0][0].weight.grad.any()


def test_sequences_of_other_forms_scan():
    """Two axes of features with samples last in memory, no time steps, and another default type."""
    current = random((4, 8, 6, 5), 0)
    turned = current.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(LIF()(turned), LIF()(current))
    one, other = (dispatch.leaky(x, None, torch.tensor(0.9), "none") for x in (turned, current))
    assert torch.equal(one, other)
    assert LIF()(torch.zeros(0, 2, 3)).shape == (0, 2, 3)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(dispatch.leaky(current, None, torch.tensor(0.9, dtype=torch.float32), "none"), other)
    finally:
        torch.set_default_dtype(torch.float32)
