"""Signals over time: their equations, windows and errors; FORCE and full-FORCE; the benchmark's measures."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import ulr_snn
from benchmarks import dynamics as benchmark
from benchmarks.force import Force, FullForce, least_squares, noise_current
from ulr_snn import data
from ulr_snn.data import dynamics
from ulr_snn.data.dynamics import SYSTEMS, TRIAL, clock, lorenz, solve, trial, van_der_pol, windows
from ulr_snn.data.registry import SIGNALS

DT = 0.005
TIMES = np.arange(400) * DT


def period(signal, dt):
    """Mean time between upward passages through zero, interpolated."""
    up = np.flatnonzero((signal[:-1] < 0) & (signal[1:] >= 0))
    passages = (up - signal[up] / (signal[up + 1] - signal[up])) * dt
    return np.diff(passages).mean()


@pytest.mark.parametrize(
    ("name", "seconds"),
    [("sine", 0.2), ("sawtooth", 0.2), ("van-der-pol-harmonic", 0.32), ("van-der-pol-relaxation", 0.58)],
)
def test_periods(name, seconds):
    assert period(trial(name, 0.001)[1:, 0], 0.001) == pytest.approx(seconds, rel=0.02)


def test_the_sawtooth_rises_and_falls_in_straight_lines():
    signal = trial("sawtooth", DT)[:, 0]
    bends = np.abs(np.diff(signal, 2)) > 1e-9
    assert bends.sum() == 20 and np.abs(signal).max() == pytest.approx(1.0)


def test_the_product_is_that_of_two_sines():
    both = [np.sin(2 * np.pi * hertz * TIMES) for hertz in (4, 6)]
    np.testing.assert_allclose(trial("product", DT)[:, 0], both[0] * both[1], atol=1e-12)


def test_the_second_half_of_the_accordion_is_the_first_backwards_with_its_sign_turned():
    signal = trial("accordion", DT)[:, 0]
    np.testing.assert_allclose(signal[201:], -signal[1:200][::-1], atol=1e-9)
    assert np.abs(np.diff(signal)).max() < 2 * np.pi * 5 * DT * 1.01, "its frequency goes up to 5 Hz"


@pytest.mark.parametrize(
    ("derivative", "start"),
    [(van_der_pol(0.5), (0.1, 0.1)), (van_der_pol(5.0), (0.1, 0.1)), (lorenz, (-8.0, 8.0, 27.0))],
)
def test_the_solver_agrees_with_scipy(derivative, start):
    found = solve(derivative, start, TIMES)
    true = solve_ivp(lambda _, y: derivative(y), (0, 2), start, t_eval=TIMES, rtol=1e-11, atol=1e-11, method="DOP853")
    np.testing.assert_allclose(found, true.y.T, atol=2e-5)


@pytest.mark.parametrize("name", SYSTEMS)
def test_signals_do_not_depend_on_the_time_step_and_are_of_order_one(name):
    fine, coarse = trial(name, 0.0025), trial(name, DT)
    np.testing.assert_allclose(fine[::2], coarse, atol=1e-4)
    assert 0.5 < np.abs(coarse).max() < 1.2
    assert coarse.shape == (400, 3 if name == "lorenz" else 1)


def test_the_lorenz_signal_visits_both_lobes():
    x = trial("lorenz", DT)[:, 0]
    assert x.min() < -0.3 and x.max() > 0.3


def test_the_clock_is_one_half_sine_after_another():
    drive = clock(400)
    assert drive.shape == (400, 10) and ((drive > 0).sum(1) <= 1).all()
    np.testing.assert_allclose(drive[:40, 0], np.sin(np.pi * np.arange(40) / 40))
    np.testing.assert_allclose(drive[120:160, 3], drive[:40, 0])


@pytest.mark.parametrize("name", SYSTEMS)
def test_windows_are_parts_of_the_repeated_trial(name):
    train, test = data.load(f"dynamics/{name}", seconds=0.5, seed=3, samples=8)
    assert (len(train), len(test)) == (8, 2)
    drive, signal = torch.from_numpy(clock(400)).float(), torch.from_numpy(trial(name, DT)).float()
    for x, y in train:
        assert x.shape == (100, 10) and y.shape == (100, signal.shape[1])
        fits = [k for k in range(400) if torch.equal(x, drive.roll(-k, 0)[:100])]
        assert len(fits) == 1
        distance = (y - signal.roll(-fits[0], 0)[:100]).abs().max()
        assert 0.05 < distance < 0.3 if name == "noisy-product" else distance == 0


def test_noise_is_new_in_each_window():
    train, _ = windows("noisy-product", seconds=TRIAL, samples=64)
    clean, _ = windows("product", seconds=TRIAL, samples=64)
    assert torch.equal(train.inputs, clean.inputs)
    noise = train.targets - clean.targets
    assert noise.std().item() == pytest.approx(0.05, rel=0.03)
    assert torch.corrcoef(noise[..., 0].T).fill_diagonal_(0).abs().max() < 0.3


def test_seeds_set_the_windows():
    first, again, other = (windows("noisy-product", seed=seed, samples=8) for seed in (1, 1, 2))
    assert torch.equal(first[0].targets, again[0].targets) and torch.equal(first[1].inputs, again[1].inputs)
    assert not torch.equal(first[0].inputs, other[0].inputs)
    assert not torch.equal(first[0].inputs[:, :2], first[1].inputs)


def test_batches_have_time_first_for_inputs_and_targets():
    train, _ = data.load("dynamics/lorenz", seconds=0.5, samples=8)
    x, y = next(iter(data.loader(train, batch_size=4)))
    assert x.shape == (100, 4, 10) and y.shape == (100, 4, 3)
    assert torch.equal(x[:, 1], train[1][0]) and torch.equal(y[:, 1], train[1][1])


def test_targets_over_time_are_padded_as_their_recordings():
    items = [(torch.ones(n, 2), torch.full((n, 3), float(n))) for n in (2, 4)]
    x, y, lengths = data.collate(items)
    assert x.shape == (4, 2, 2) and y.shape == (4, 2, 3) and lengths.tolist() == [2, 4]
    assert y[:, 0, 0].tolist() == [2, 2, 0, 0] and y[:, 1, 0].tolist() == [4] * 4


def test_the_names_for_type_checkers_are_those_of_the_registry():
    assert get_args(dynamics.Name) == tuple(f"dynamics/{name}" for name in SYSTEMS)
    assert set(get_args(dynamics.Name)) == set(SIGNALS)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("dynamics/cosine", {}, ["dynamics/cosine", *get_args(dynamics.Name)]),
        ("dynamics/sine", {"dt": 0.0}, ["dt=0.0"]),
        ("dynamics/sine", {"dt": 0.3}, ["dt=0.3"]),
        ("dynamics/sine", {"dt": 0.0033}, ["dt=0.0033"]),
        ("dynamics/sine", {"seconds": 0.0}, ["seconds=0.0"]),
        ("dynamics/sine", {"samples": 3}, ["samples=3"]),
        ("dynamics/sine", {"time_bins": 10, "binary": True}, ["binary, time_bins"]),
        ("digits", {"seconds": 1.0}, ["digits", "seconds"]),
    ],
)
def test_wrong_names_and_options_are_refused_in_a_sentence(name, options, words):
    with pytest.raises(ulr_snn.UsageError) as error:
        data.load(name, **options)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_an_index_beyond_the_windows_ends_an_iteration():
    train, _ = windows("sine", samples=4)
    assert len(list(train)) == 4
    with pytest.raises(IndexError):
        train[4]


# -- FORCE ---------------------------------------------------------------------------------------------------


def test_least_squares_is_that_of_ridge_regression():
    random = np.random.default_rng(0)
    rows, targets, rate = random.standard_normal((30, 5)), random.standard_normal(30), 0.1
    p, w = rate * np.eye(5), np.zeros(5)
    for row, target in zip(rows, targets, strict=True):
        w -= (w @ row - target) * least_squares(p, row)
    gram = rows.T @ rows + np.eye(5) / rate
    np.testing.assert_allclose(p, np.linalg.inv(gram), atol=1e-12)
    np.testing.assert_allclose(w, np.linalg.solve(gram, rows.T @ targets), atol=1e-12)


def learned(method, trials):
    """Error of a small reservoir on a test without a reset, and its firing rate."""
    train, _ = windows("sine", seconds=TRIAL * trials, samples=4)
    _, test = windows("sine", seconds=2 * TRIAL, samples=8)
    x, y = (np.ascontiguousarray(part.double().numpy()) for part in train[0])
    net = method.fit(x, y, DT, seed=0)
    outputs, rate = net.run(test.inputs.double().numpy())
    return benchmark.normalised_error(outputs, test.targets.numpy()), rate, net


@pytest.mark.slow
@pytest.mark.parametrize("method", [Force, FullForce])
def test_a_small_reservoir_learns_a_sine(method):
    error, rate, net = learned(method(gain=0.15, drive=40.0, neurons=200), trials=8)
    assert error < 0.15 and 10 < rate < 100
    x = windows("sine", samples=4)[1].inputs.double().numpy()
    clean, again, noisy = (net.run(x, noise)[0] for noise in (0.0, 0.0, 0.5))
    assert np.array_equal(clean, again) and not np.array_equal(clean, noisy)


@pytest.mark.parametrize("method", [Force(neurons=500), FullForce(feedback=30.0, neurons=500)])
def test_a_reservoir_goes_on_without_a_clock_after_a_pulse(method):
    dt = 0.0025
    times = np.arange(3200) * dt
    pulse = (times[:, None] < 0.05).astype(float)
    net = method.fit(pulse, np.sin(2 * np.pi * 5 * times)[:, None], dt, seed=1)
    outputs, _ = net.run(pulse[:1600, None])
    assert outputs[800:].std() == pytest.approx(math.sqrt(0.5), abs=0.15)
    assert period(outputs[800:, 0, 0], dt) == pytest.approx(0.2, rel=0.05)


def test_force_keeps_its_recurrent_weights_and_full_force_learns_them():
    for method, fixed in ((Force, True), (FullForce, False)):
        drawn = benchmark_weights(method, trials=1)
        trained = benchmark_weights(method, trials=2)
        assert np.array_equal(drawn, trained) == fixed


def benchmark_weights(method, trials):
    return learned(method(gain=0.1, drive=40.0, neurons=60), trials)[2].weights


def test_noise_is_in_units_of_threshold_minus_reset():
    """A leaky membrane without spikes, driven by the noise alone."""
    random = np.random.default_rng(0)
    current = noise_current(DT) * random.standard_normal(20_000)
    v, found = 0.0, []
    for value in current:
        v = value + (v - value) * math.exp(-DT / 0.010)
        found.append(v)
    assert np.std(found) == pytest.approx(25.0, rel=0.05)


# -- the benchmark -------------------------------------------------------------------------------------------


def test_the_normalised_error():
    targets = np.array([[1.0], [-2.0]])
    assert benchmark.normalised_error(targets, targets) == 0
    assert benchmark.normalised_error(np.zeros((2, 1)), targets) == 1
    assert benchmark.normalised_error(np.array([[1.0], [0.0]]), targets) == pytest.approx(0.8)
    assert benchmark.normalised_error(np.array([[math.nan], [0.0]]), targets) == math.inf


def test_the_noise_at_which_the_error_doubles_is_between_the_levels():
    assert benchmark.doubling(1.0, [1.0, 1.5, 2.5, 3.0, 4.0]) == pytest.approx(0.15)
    assert benchmark.doubling(1.0, [1.0, 1.0, 1.0, 1.5, 1.9]) is None
    assert benchmark.doubling(1.0, [3.0, 1.0, 1.0, 1.0, 1.0]) == pytest.approx(0.025)


def test_ulr_learns_a_signal():
    torch.set_num_threads(1)
    net = benchmark.trained("sine", "ulr", {}, seed=0, effort=120)
    _, test = benchmark.signals("sine", 0, seconds=1.0, samples=16)
    before = benchmark.Recurrent(10, 1)
    errors = [
        benchmark.normalised_error(each.run(test.inputs.numpy(), 0.0, 0)[0], test.targets.numpy())
        for each in (before, net)
    ]
    assert errors[1] < 0.4 < errors[0]


def test_bptt_takes_the_tuned_settings():
    net = benchmark.Recurrent(10, 1)
    optimizer = benchmark.optimizer_of(net.model, {"lr": 0.01, "slope": 3.0, "readout": 6})["optimizer"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.06]
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert given == {id(p) for p in net.model.parameters()}
    assert benchmark.optimizer_of(net.model, {}) == {}


def test_runs_keep_their_rows_and_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "OUTPUTS", tmp_path)
    path = tmp_path / "dynamics.csv"
    settings = {"gain": 0.1, "feedback": 10.0, "drive": 40.0, "neurons": 40}
    for _ in range(2):
        row = benchmark.Ledger(path, scale=0.02).row("final", "sine", "force", settings, 0)
        assert len(benchmark.rows(path)) == 1
    assert float(row["error"]) > 0 and row["machine"] and row["torch"] and row["date"]
    assert (tmp_path / "sine-force.npy").exists()
    table = benchmark.table(path)
    assert f"| sine |  |  | {row['error']} |  |" in table
    benchmark.draw(tmp_path / "dynamics.png")
    assert (tmp_path / "dynamics.png").stat().st_size > 10_000


def test_both_kinds_of_methods_are_tuned_over_as_many_points():
    points = [len(benchmark.Block.of(written).points()) for written in benchmark.GRIDS.values()]
    assert points == [12, 12, 12]
