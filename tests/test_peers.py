"""Surrogate BPTT: its scan against plain autograd step by step, its binding, and that it learns."""

import pytest
import torch
from torch import nn

from tests.helpers import averaging
from ulr_snn import LIF, RecurrentLIF, SpikeBudget, TimeAverage, UsageError, train
from ulr_snn.model.neurons import step_mask
from ulr_snn.peers.expected import ExpectedGradientBPTT
from ulr_snn.peers.surrogate import FUNCTIONS, SurrogateBPTT
from ulr_snn.sites.binding import bind_sites

PEERS = [SurrogateBPTT("atan", 2.0), SurrogateBPTT("fast_sigmoid", 5.0)]


class PlainSpike(torch.autograd.Function):
    """One step's spikes, with a surrogate derivative: the textbook form."""

    @staticmethod
    def forward(ctx, drive, peer):
        ctx.save_for_backward(drive)
        ctx.peer = peer
        return (drive > 0).to(drive.dtype)

    @staticmethod
    def backward(ctx, gradient):
        (drive,) = ctx.saved_tensors
        return gradient * ctx.peer.derivative(drive), None


def plain(neuron: LIF, current: torch.Tensor, peer: SurrogateBPTT, lengths=None) -> torch.Tensor:
    """The neuron's equations in a loop that autograd follows; in the reset, spikes as the peer says."""
    mask = None if lengths is None else step_mask(lengths, current)
    u = s = torch.zeros_like(current[0])
    spikes = []
    for t, now in enumerate(current):
        reset = s.detach() if peer.detach_reset else s
        kept = u * (1 - reset) if neuron.reset == "zero" else u
        u = neuron.beta.clamp(0, 1) * kept + now
        if neuron.recurrent is not None:
            u = u + neuron.recurrent(s)
        if neuron.reset == "subtract":
            u = u - neuron.threshold * reset
        s = PlainSpike.apply(u - neuron.threshold, peer)
        s = s if mask is None else s * mask[t]
        spikes.append(s)
    return torch.stack(spikes)


def gradients(spikes: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, spikes.numel(), dtype=spikes.dtype).view_as(spikes)
    return [spikes.detach(), *torch.autograd.grad((spikes * weights).sum(), leaves)]


@pytest.mark.parametrize("lengths", [None, torch.tensor([7, 3, 5, 1])])
@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize("function", list(FUNCTIONS))
def test_the_scan_agrees_with_plain_autograd(function, detach_reset, reset, recurrent, lengths):
    torch.manual_seed(0)
    peer = SurrogateBPTT(function, 3.0, detach_reset)
    options = {"reset": reset, "learn_beta": True, "learn_threshold": True}
    beta = torch.full((5,), 0.8)
    neuron = (RecurrentLIF(5, beta, **options) if recurrent else LIF(beta, **options)).double()
    current = (0.8 * torch.randn(7, 4, 5, dtype=torch.float64) + 0.4).requires_grad_()
    leaves = [current, *neuron.parameters()]
    with bind_sites(neuron, [peer], lengths):
        ours = gradients(neuron(current), leaves)
    assert 0 < ours[0].sum() < ours[0].numel()
    for a, b in zip(ours, gradients(plain(neuron, current, peer, lengths), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_an_attached_reset_agrees_with_autograd_through_the_neuron_itself():
    torch.manual_seed(0)
    peer = SurrogateBPTT("atan", detach_reset=False)
    neuron = RecurrentLIF(5).double()
    current = torch.randn(7, 4, 5, dtype=torch.float64, requires_grad=True)
    leaves = [current, *neuron.parameters()]
    through = neuron.run(current, lambda t, drive: PlainSpike.apply(drive, peer))[0]
    with bind_sites(neuron, [peer], None):
        ours = gradients(neuron(current), leaves)
    for a, b in zip(ours, gradients(through, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.function)
def test_the_derivatives_are_those_of_the_docstring(peer):
    primitives = {
        "atan": lambda d: torch.atan(torch.pi / 2 * peer.slope * d) / torch.pi,
        "fast_sigmoid": lambda d: d / (1 + peer.slope * d.abs()),
    }
    d = torch.tensor([-2.0, -0.3, -1e-3, 0.2, 1.5], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(primitives[peer.function](d).sum(), d)
    torch.testing.assert_close(peer.derivative(d.detach()), expected)


def net(recurrent: bool = False) -> nn.Sequential:
    hidden = RecurrentLIF(16) if recurrent else LIF()
    return nn.Sequential(nn.Linear(6, 16), hidden, nn.Linear(16, 16), LIF(), TimeAverage(), nn.Linear(16, 3))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Each class drives two of the six inputs."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(30) % 3
    rate = 0.1 + 0.6 * nn.functional.one_hot(y, 3).repeat_interleave(2, 1)
    return (torch.rand(10, 30, 6, generator=generator) < rate).float(), y


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.function)
def test_a_short_training_lowers_the_loss_and_leaves_the_model_unbound(peer, recurrent):
    torch.manual_seed(0)
    model, (x, y) = net(recurrent), batch()
    options = {"lr": 1e-2, "clip": 1.0, "device": "cpu", "progress": False}
    result = train(model, [(x, y)] * 10, epochs=4, estimator=peer, **options)
    assert result.history[-1]["train_loss"] < 0.6 * result.history[0]["train_loss"]
    assert result.metrics["forward_passes"] == 4 * 10 * 30
    assert all(set(m.__dict__).isdisjoint({"site", "lengths"}) for m in model.modules())


def test_backward_adds_to_grad_and_reports_the_step():
    torch.manual_seed(0)
    model, (x, y) = net(), batch()
    with PEERS[0].attach(model, "ce_count", seed=0, interface=False) as attached:
        estimate = attached.backward(x.transpose(0, 1), y)
        once = [p.grad.clone() for p in model.parameters()]
        attached.backward(x.transpose(0, 1), y)
    assert estimate.loss.shape == (30,) and estimate.outputs.shape == (1, 30, 3)
    assert not estimate.loss.requires_grad and not estimate.outputs.requires_grad
    for p, g in zip(model.parameters(), once, strict=True):
        assert g.abs().sum() > 0
        torch.testing.assert_close(p.grad, 2 * g)
    again = PEERS[0].attach(model, "ce_count", 0, False)
    again.load_state_dict(attached.state_dict())
    assert (again.step, again.forward_passes) == (2, 60)


def test_an_error_leaves_the_model_unbound():
    model, (x, y) = net(), batch()
    attached = PEERS[0].attach(model, "ce_count", 0, True)
    with pytest.raises(UsageError, match="4 features"):
        attached.backward(x[..., :4], y)  # the first layer takes six inputs
    assert all("site" not in m.__dict__ for m in model.modules())
    attached.backward(x, y)


def test_a_loss_that_is_not_finite_stops():
    model, (x, y) = net(), batch()
    with torch.no_grad():
        model[-1].weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="step 1"):
        PEERS[0].attach(model, "ce_count", 0, True).backward(x, y)


@pytest.mark.parametrize("options", [{"function": "step"}, {"slope": 0.0}])
def test_wrong_options_are_errors(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        SurrogateBPTT(**options)


@pytest.mark.parametrize("peer", [SurrogateBPTT(), ExpectedGradientBPTT()], ids=["surrogate", "expected"])
def test_layers_may_come_and_go_between_steps(peer):
    model, x, y = averaging(6, 4, (7,)), (torch.rand(5, 3, 6) < 0.5).float(), torch.tensor([0, 1, 3])
    attached = peer.attach(model, {"ce_count": 1.0, SpikeBudget(1.0): 1.0}, 0, True)
    attached.backward(x, y)
    model[1] = LIF(0.5)
    model.insert(2, nn.Linear(7, 7))
    model.insert(3, LIF(0.8))
    attached.step = 0
    changed = attached.backward(x, y).loss
    fresh = peer.attach(model, {"ce_count": 1.0, SpikeBudget(1.0): 1.0}, 0, True).backward(x, y).loss
    assert changed.shape == fresh.shape
    if isinstance(peer, SurrogateBPTT):
        assert torch.equal(changed, fresh)
    model[1] = nn.Identity()
    model[3] = nn.Identity()
    with pytest.raises(UsageError, match="no spiking layer"):
        attached.backward(x, y)
