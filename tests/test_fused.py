"""The fused scans on a CPU give what the reference gives."""

import multiprocessing
import os

import pytest
import torch
from torch import Tensor, nn

from ulr_snn import LIF, ULR, Fold, Gaussian, LeakyReadout, Logistic, RecurrentLIF, TimeAverage, attach
from ulr_snn.credit.maps import Full
from ulr_snn.credit.recurrence import Recurrence
from ulr_snn.kernels import dispatch
from ulr_snn.kernels.pool import Pool
from ulr_snn.kernels.reference import leaky_drive
from ulr_snn.kernels.state import State
from ulr_snn.kernels.weight_cache import once, weight_cache
from ulr_snn.model.neurons import SpikingNeuron, step_mask
from ulr_snn.noise.random import Drawer, Noise
from ulr_snn.sites.records import Record

pytest.importorskip("numba", reason="the fused scans on a CPU are made by numba")

SHAPES = [(1, 1, 1), (7, 3, 5), (9, 4, 2, 3, 3), (20, 8, 67)]  # [T, B, ...]
RESETS = ["subtract", "zero", "none"]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_reset = pytest.mark.parametrize("reset", RESETS)


@pytest.fixture
def reference(monkeypatch):
    """Switches the kernels off."""
    return lambda: monkeypatch.setattr(dispatch, "choice", lambda like: ("reference", "asked for"))


def neuron_of(shape: tuple[int, ...], reset: str, recurrent: bool) -> LIF:
    """Leak and threshold of each neuron."""
    torch.manual_seed(1)
    beta, threshold = 0.5 + 0.5 * torch.rand(shape[2:]), 0.5 + torch.rand(shape[2:])
    return RecurrentLIF(shape[2], beta, threshold, reset) if recurrent else LIF(beta, threshold, reset)


def current_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return 1.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawer_of(
    shape: tuple[int, ...], firing: Logistic | Gaussian, mirrored: bool, steps: int, first: int = 0
) -> Drawer:
    sample = torch.arange(shape[1], dtype=torch.int32)
    noise = Noise(3, 5, sample, sample // 2, sample % 2 == 1 if mirrored else None)
    return Drawer(noise, firing, 2, steps, 0.2 + 0.1 * torch.rand(shape[2:]), first)


@each_shape
@each_reset
@pytest.mark.parametrize("recurrent", [False, True], ids=["", "recurrent"])
@pytest.mark.parametrize("law", [None, Logistic(), Gaussian()], ids=["deterministic", "logistic", "gaussian"])
def test_spikes_and_drives_equal_the_reference(shape, reset, recurrent, law, reference):
    if recurrent and len(shape) > 3:
        pytest.skip("recurrent layers have one axis of neurons")
    neuron, current = neuron_of(shape, reset, recurrent), current_of(shape)
    neuron.lengths = torch.arange(shape[1]) % shape[0] + 1

    def run() -> tuple[Tensor, Tensor, Tensor | None]:
        torch.manual_seed(2)
        return neuron.fired(current, law and drawer_of(shape, law, True, len(current)))

    with torch.no_grad():
        assert dispatch.kernels(current) is not None
        ours = run()
        reference()
        plain = run()
    assert ours[0].unique().numel() == min(2, current.numel())
    # Sums over recurrent sources are taken in another order: rounding, which only at a tie changes a spike.
    assert torch.equal(ours[0], plain[0])
    for mine, other in zip(ours[1:], plain[1:], strict=True):
        if not recurrent:
            assert mine is other is None or torch.equal(mine, other)
        else:
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@each_reset
@pytest.mark.parametrize("neurons", [10, 33, 1030])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_numbers_do_not_depend_on_the_rows_beside_them(padded, neurons, reset):
    """Narrow rows are processed together, and threads and ranks share the rows."""
    rows, own = 29, torch.arange(29) % 6 + 1
    neuron, current = neuron_of((6, rows, neurons), reset, False), current_of((6, rows, neurons))
    a, over = current_of(current.shape, 1), torch.tensor([1.5, 4.0, 12.0, 80.0])

    def run(some: int) -> list[Tensor]:
        torch.manual_seed(2)
        neuron.lengths = own[:some] if padded else None
        drawer = drawer_of((6, some, neurons), Logistic(), True, 6)
        spikes, x, _ = neuron.fired(current[:, :some], drawer)
        law = "logistic", drawer.scale, neuron.lengths
        leak = neuron.beta, neuron.threshold, neuron.reset
        credit = dispatch.credit(a[:, :some], x, *law, spikes, *leak, None, True, over=over)
        return [spikes, x, dispatch.slopes(x, *law, over), *credit]

    with torch.no_grad():
        whole = run(rows)
        for some in (1, 2, 11):
            assert all(torch.equal(part, every[:, :some]) for part, every in zip(run(some), whole, strict=True))


@each_reset
@pytest.mark.parametrize("kernels", [True, False], ids=["fused", "reference"])
def test_two_parts_of_time_equal_the_whole(reset, kernels, reference):
    shape = (9, 4, 6)
    neuron, current = neuron_of(shape, reset, True), current_of(shape)
    if not kernels:
        reference()

    def run(part: slice, state: State) -> Tensor:
        torch.manual_seed(2)
        drawer = drawer_of(shape, Logistic(), False, len(current[part]), part.start)
        return neuron.fired(current[part], drawer, state)[0]

    with torch.no_grad():
        state, rest = (State(torch.zeros(4, 6), torch.zeros(4, 6)) for _ in range(2))
        whole = run(slice(0, 9), rest)
        parts = [run(slice(0, 4), state), run(slice(4, 9), state)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(state.membrane, rest.membrane) and torch.equal(state.spikes, whole[-1])
    assert not torch.equal(run(slice(4, 9), State(torch.zeros(4, 6), torch.zeros(4, 6))), parts[1])  # the state matters


@each_shape
@each_reset
@pytest.mark.parametrize("recurrent", [False, True], ids=["", "recurrent"])
@pytest.mark.parametrize("law", [Logistic(), Gaussian()], ids=["logistic", "gaussian"])
def test_credit_and_filter_equal_the_reference(shape, reset, recurrent, law, reference):
    if recurrent and len(shape) > 3:
        pytest.skip("recurrent layers have one axis of neurons")
    neuron = neuron_of(shape, reset, False)
    a, x, later = current_of(shape, 1), current_of(shape, 2), current_of(shape[1:], 3)
    path = weight = None
    if recurrent:
        path, weight = Full(shape[2:], shape[2:]), current_of(shape[2:] * 2, 5) / shape[2]
    spikes = (current_of(shape, 4) > 0.5).float()
    mask = step_mask(torch.arange(shape[1]) % shape[0] + 1, x)
    record = Record("", neuron, x, torch.tensor(1.3), x, spikes, [spikes], law, mask)
    slope = mask * law.slope(x) / 1.3
    of_pass = slope.clone, spikes, record.membrane, path, weight, record.fused_credit
    recurrence = Recurrence(neuron, *of_pass)
    current = current_of(shape).requires_grad_()

    def run() -> tuple[Tensor, ...]:
        after = later.clone()
        drive = leaky_drive(current, neuron.beta, neuron.threshold, reset, spikes)
        found = *recurrence.credit(a, later=after), torch.autograd.grad(drive, current, a)[0]
        total, again = recurrence.credit(a.clone(), False, later.clone(), overwrite=True)
        assert total is None and torch.equal(again, found[1]) and torch.equal(after, found[1][0])
        _, everywhere = recurrence.credit(a[:1].expand(shape), False)
        torch.testing.assert_close(everywhere, recurrence.credit(a[:1].expand(shape).contiguous(), False)[1])
        return *found, everywhere

    ours = run()
    reference()
    for mine, other in zip(ours, run(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@each_reset
def test_rows_in_parts_are_those_of_the_whole(reset, some_threads):
    """Three threads share five rows."""
    shape, found = (7, 5, 18), []
    neuron, x, spikes = neuron_of(shape, reset, True), current_of(shape, 2), (current_of(shape, 4) > 0.5).float()
    a, weight, later = current_of(shape, 1), current_of((18, 18), 5) / 18, current_of(shape[1:], 3)
    for threads in (1, 3):
        some_threads(threads)
        torch.manual_seed(2)
        with torch.no_grad():
            fired = neuron.fired(x, drawer_of(shape, Logistic(), False, len(x)))
        given = a, x, "logistic", torch.tensor(0.5), None, spikes, neuron.beta, neuron.threshold, reset, later.clone()
        found.append(
            [*fired, *dispatch.credit(*given, True, weight=weight), dispatch.leaky(a, spikes, neuron.beta, reset)]
        )
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("law", [Logistic(), Gaussian()], ids=["logistic", "gaussian"])
def test_slopes_equal_the_density(law):
    x, scale = 4 * current_of((7, 3, 5)), 0.1 + torch.rand(5)
    lengths = torch.tensor([7, 2, 5])
    own = (torch.arange(7)[:, None] < lengths)[..., None]
    slopes = dispatch.slopes(x, type(law).__name__.lower(), scale, lengths)
    torch.testing.assert_close(slopes, law.slope(x) / scale * own, rtol=1e-5, atol=1e-7)
    assert not slopes[3:, 1].any() and slopes[3:, 0].any()


def nets() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    linear = torch.nn.Linear
    return {
        "dense": torch.nn.Sequential(
            linear(12, 9), LIF(), linear(9, 8), LIF(reset="zero"), TimeAverage(), linear(8, 3)
        ),
        "recurrent": torch.nn.Sequential(linear(12, 9), RecurrentLIF(9), linear(9, 3), LeakyReadout()),
        "learned": torch.nn.Sequential(linear(12, 9), LIF(learn_beta=True, learn_threshold=True), linear(9, 3)),
        "conv": torch.nn.Sequential(
            torch.nn.Unflatten(2, (1, 3, 4)), Fold(torch.nn.Conv2d(1, 2, 3, padding=1)), LIF(), torch.nn.Flatten(2),
            linear(24, 9), LIF(), TimeAverage(), linear(9, 3),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", nets())
@pytest.mark.parametrize("options", [{}, {"credit": "residual"}, {"credit": "global"}, {"copies": 2}], ids=str)
def test_gradients_equal_those_of_the_reference(name, options, reference):
    x = (torch.rand(8, 6, 12, generator=torch.Generator().manual_seed(5)) < 0.4).float() * 3
    y, lengths = torch.arange(6) % 3, torch.tensor([8, 8, 3, 8, 5, 8])

    def run() -> list[Tensor]:
        model = nets()[name]
        with attach(model, ULR(**options), seed=1, total_steps=20) as ulr:
            for _ in range(3):  # the feedback is learned by then
                model.zero_grad()
                ulr.backward(x, y, lengths=lengths)
        return [q.grad for q in model.parameters()]

    ours = run()
    reference()
    for mine, other in zip(ours, run(), strict=True):
        assert other.any() and (mine - other).norm() <= 1e-4 * other.norm()


def test_the_reference_does_what_has_no_kernel():
    assert dispatch.choice(torch.zeros(1)) == ("cpu", "float32 on a CPU")
    assert dispatch.choice(torch.zeros(1, dtype=torch.float64)) == ("reference", "no kernel for float64")

    class Own(LIF):  # may run in another way
        def run(self, current, fire, state=None):
            return super().run(2 * current, fire, state)

    current = current_of((5, 3, 4))
    assert torch.equal(Own()(current), LIF()(2 * current)) and not torch.equal(Own()(current), LIF()(current))
    assert SpikingNeuron.fired(LIF(), current)[0].any()


@pytest.mark.parametrize(
    "shape", [(3, 5, 7, 12), (1, 1, 1, 1), (2, 1, 24, 81), (4, 17, 17, 3), (2, 3, 5, 4), (0, 2, 2, 2)]
)
@pytest.mark.parametrize("cut", [False, True])
def test_turned_is_a_permutation(shape: tuple[int, ...], cut: bool):
    """Also of a part of a larger tensor, whose lines do not lie side by side."""
    n, high, across, channels = shape
    whole = torch.randn(n + 1, high + 2, across + 3, channels)
    x = whole[1:, 1 : high + 1, 2 : across + 2] if cut else torch.randn(shape)
    found = dispatch.turned(x)
    assert found.is_contiguous()
    assert torch.equal(found, x.permute(0, 3, 1, 2))
    assert not shape[0] or not torch.equal(found.flatten(), x.flatten()) or min(across * high, channels) == 1
    assert torch.equal(dispatch.turned(x.double()), x.double().permute(0, 3, 1, 2))


def test_weights_are_put_in_order_once_until_they_change():
    weight = nn.Parameter(torch.randn(5, 7))
    assert dispatch.transposed(weight).is_contiguous()
    with weight_cache():
        first = once(weight, "transposed", dispatch.transposed)
        assert once(weight, "transposed", dispatch.transposed) is first and torch.equal(first, weight.T)
        with Pool().used():
            columns = dispatch.in_columns(weight, 16)
            assert dispatch.in_columns(weight, 16) is columns and dispatch.in_columns(weight, 32) is not columns
        with Pool(lean=True).used():
            assert dispatch.in_columns(weight, 16) is not columns
        with torch.no_grad():
            weight += 1
        assert torch.equal(once(weight, "transposed", dispatch.transposed), weight.T) and not torch.equal(
            first, weight.T
        )
    assert once(weight, "transposed", dispatch.transposed) is not once(weight, "transposed", dispatch.transposed)


def test_float32_is_float32_whatever_the_default_is():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6), LIF(), RecurrentLIF(6), nn.Linear(6, 3)), torch.rand(5, 4, 8)
    expected = model(x)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(model(x), expected)
        with attach(model, seed=0) as ulr:
            ulr.backward(x, torch.zeros(4, dtype=torch.long))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(q.grad.dtype == torch.float32 for q in model.parameters())


def fire(x: Tensor) -> Tensor:
    return LIF()(x)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes do not fork here")
def test_forked_processes_live():
    x = torch.rand(5, 4, 8)
    expected = fire(x)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert torch.equal(pool.apply_async(fire, (x,)).get(60), expected)


def test_numbers_too_small_for_the_processor_to_be_quick_with_are_zero():
    """Far from the threshold p' times a small error is less than 1e-38, which made a step three times as long."""
    x = torch.tensor([-79.0, -50.0, 0.0, 50.0, 79.0]).repeat(3, 2, 1)
    for law in ("logistic", "gaussian"):
        slopes = dispatch.slopes(x, law, torch.tensor(0.5), None)
        assert not slopes[..., [0, 4]].any() and (slopes[..., 2] > 0.4).all()
    a, one, later = torch.full_like(x, 1e-12), torch.ones(5), torch.full((2, 5), 1e-35)
    spikes = torch.zeros_like(x)
    for reset in ("subtract", "zero", "none"):
        given = a.clone(), x, "logistic", torch.tensor(0.5), None, spikes, 0.9 * one, one, reset, later.clone()
        _, currents = dispatch.credit(*given, False, False)
        assert not currents[currents.abs() < 1e-30].any() and (currents[..., 2] > 0).all()
    broken = torch.full_like(x, float("nan"))
    assert dispatch.slopes(broken, "logistic", torch.tensor(0.5), None).isnan().all()
    given = broken, x, "logistic", torch.tensor(0.5), None, spikes, 0.9 * one, one, "none", later
    assert dispatch.credit(*given, False, False)[1].isnan().all()


def test_words_of_the_noise_are_the_same_from_the_kernel(monkeypatch):
    sample, stream = torch.arange(6, dtype=torch.int32) * 7919, torch.tensor([0, 1, 0, 2, 1, 5], dtype=torch.int32)
    found = Noise(2**40 + 3, 5, sample, stream).words(3, 11, 4)
    monkeypatch.setattr(dispatch, "row_words", lambda *about: None)
    assert all(map(torch.equal, found, Noise(2**40 + 3, 5, sample, stream).words(3, 11, 4)))
