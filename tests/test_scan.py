"""The time scan, and its derivative with the spikes held fixed."""

import pytest
import torch
from torch import Tensor

from ulr_snn import LIF, LeakyReadout, RecurrentLIF
from ulr_snn.kernels.reference import leaky_drive, scan

STEPS, BATCH, NEURONS = 6, 3, 4
RESETS = ["subtract", "zero", "none"]


def loop(current: Tensor, beta: Tensor, threshold: Tensor, reset: str, spikes: Tensor) -> Tensor:
    """Drive at given spikes, by the equations."""
    u, before, drives = torch.zeros_like(current[0]), torch.zeros_like(current[0]), []
    for t in range(len(current)):
        if reset == "zero":
            u = beta * u * (1 - before) + current[t]
        elif reset == "subtract":
            u = beta * u + current[t] - threshold * before
        else:
            u = beta * u + current[t]
        drives.append(u - threshold)
        before = spikes[t]
    return torch.stack(drives)


def draw(shared: bool, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """current, beta, threshold, spikes."""
    generator = torch.Generator().manual_seed(seed)
    shape = () if shared else (NEURONS,)
    current = torch.rand(STEPS, BATCH, NEURONS, dtype=torch.float64, generator=generator)
    beta = 0.5 + 0.4 * torch.rand(shape, dtype=torch.float64, generator=generator)
    threshold = 0.8 + 0.4 * torch.rand(shape, dtype=torch.float64, generator=generator)
    spikes = (torch.rand(STEPS, BATCH, NEURONS, generator=generator) < 0.4).double()
    return tuple(value.to(device) for value in (current, beta, threshold, spikes))


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per neuron"])
@pytest.mark.parametrize("reset", RESETS)
def test_drive_and_its_derivative_equal_a_plain_loop(reset, shared, device):
    current, beta, threshold, spikes = draw(shared, device)
    inputs = [value.requires_grad_() for value in (current, beta, threshold)]
    ours, plain = leaky_drive(*inputs, reset, spikes), loop(*inputs, reset, spikes)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    credit = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(1)).to(device)
    expected = torch.autograd.grad(plain, inputs, credit)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs, credit), expected, rtol=1e-11, atol=1e-12)
    # the same where the drive is guard over
    known = leaky_drive(*inputs, reset, spikes, plain.detach())
    assert torch.equal(known.detach(), plain.detach())
    torch.testing.assert_close(torch.autograd.grad(known, inputs, credit), expected, rtol=1e-11, atol=1e-12)
    other = next(r for r in RESETS if r != reset)
    wrong = torch.autograd.grad(loop(*inputs, other, spikes), inputs, credit)
    assert not torch.allclose(
        wrong[0] + wrong[1].sum() + wrong[2].sum(), expected[0] + expected[1].sum() + expected[2].sum()
    )


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per neuron"])
@pytest.mark.parametrize("reset", RESETS)
def test_gradcheck(reset, shared):
    current, beta, threshold, spikes = draw(shared, torch.device("cpu"))
    inputs = [value.requires_grad_() for value in (current, beta, threshold)]
    assert torch.autograd.gradcheck(lambda *i: leaky_drive(*i, reset, spikes), inputs)


def test_partial_derivatives_are_not_computed_in_vain():
    current, beta, threshold, spikes = draw(True, torch.device("cpu"))
    drive = leaky_drive(current, beta.requires_grad_(), threshold, "zero", spikes)
    gradient = torch.autograd.grad(drive.sum(), [current, beta] if current.requires_grad else [beta])
    plain = loop(current, beta, threshold, "zero", spikes)
    torch.testing.assert_close(gradient[0], torch.autograd.grad(plain.sum(), beta)[0])


@pytest.mark.parametrize("reset", RESETS)
def test_scan_runs_the_equations(reset, device):
    current, beta, threshold, _ = draw(False, device)
    weight = torch.randn(NEURONS, NEURONS, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(device)
    times = []

    def fire(t: int, drive: Tensor) -> Tensor:
        times.append(t)
        return (drive > 0).to(drive.dtype)

    spikes, drive, none = scan(current, beta, threshold, reset, fire)
    assert none is None and times == list(range(STEPS))
    torch.testing.assert_close(drive, loop(current, beta, threshold, reset, spikes))
    assert torch.equal(spikes, (drive > 0).double())
    assert 0 < spikes.sum() < spikes.numel()
    spikes, drive, fed_back = scan(current, beta, threshold, reset, fire, lambda s: s @ weight.T)
    before = torch.cat([torch.zeros_like(spikes[:1]), spikes[:-1]])
    torch.testing.assert_close(fed_back, before @ weight.T)
    torch.testing.assert_close(drive, loop(current + before @ weight.T, beta, threshold, reset, spikes))


@pytest.mark.parametrize("reset", RESETS)
def test_recurrent_weights_have_the_derivative_at_fixed_spikes(reset):
    """Against finite differences of a plain loop in which the spikes do not move."""
    current, beta, threshold, _ = draw(True, torch.device("cpu"))
    neuron = RecurrentLIF(NEURONS, beta.item(), threshold.item(), reset).double()
    spikes, drive, fed_back = neuron.run(current, lambda t, d: (d > 0).to(d.dtype))
    credit = torch.randn(drive.shape, dtype=drive.dtype, generator=torch.Generator().manual_seed(3))
    ours = neuron.drive_at(current, spikes.detach(), drive.detach(), fed_back.detach())
    assert torch.equal(ours, drive)
    (gradient,) = torch.autograd.grad(ours, neuron.recurrent.weight, credit)
    before = torch.cat([torch.zeros_like(spikes[:1]), spikes[:-1]]).detach()
    weight, h = neuron.recurrent.weight.detach(), 1e-6

    def value(moved: Tensor) -> Tensor:
        kept = neuron.beta.detach(), neuron.threshold.detach()
        return (credit * loop(current + before @ moved.T, *kept, reset, spikes.detach())).sum()

    expected = torch.zeros_like(weight)
    for i in range(NEURONS):
        for j in range(NEURONS):
            step = torch.zeros_like(weight)
            step[i, j] = h
            expected[i, j] = (value(weight + step) - value(weight - step)) / (2 * h)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-8)


def test_unbound_neurons_fire_where_the_membrane_exceeds_the_threshold():
    spikes = LIF(0.5, 1.0, "subtract")(torch.tensor([0.8, 0.7, 1.0, 0.0, 0.0]).view(-1, 1, 1)).flatten()
    # u: 0.8, 1.1 (spike), 0.55 + 1.0 - 1.0 = 0.55, 0.275, ...
    assert spikes.tolist() == [0, 1, 0, 0, 0]
    spikes = LIF(0.5, 1.0, "zero")(torch.tensor([0.8, 0.7, 1.1, 0.9, 0.0]).view(-1, 1, 1)).flatten()
    # u: 0.8, 1.1 (spike), 1.1 (spike), 0.9, 0.45
    assert spikes.tolist() == [0, 1, 1, 0, 0]
    assert LIF(0.5, 1.0, "none")(torch.tensor([1.0, 1.0, 0.0]).view(-1, 1, 1)).flatten().tolist() == [0, 1, 0]


def test_leaks_are_clamped():
    current = torch.ones(4, 1, 1)
    readout = LeakyReadout(learn_beta=True)
    for learned, expected in ((1.5, [1.0, 2, 3, 4]), (-0.5, [1.0, 1, 1, 1])):
        readout.beta.data.fill_(learned)
        assert torch.equal(readout(current).flatten(), torch.tensor(expected))


def test_leaky_readout_is_the_leaky_sum():
    current = torch.rand(5, 2, 3)
    u, expected = torch.zeros(2, 3), []
    for now in current:
        u = 0.7 * u + now
        expected.append(u)
    torch.testing.assert_close(LeakyReadout(0.7)(current), torch.stack(expected))
