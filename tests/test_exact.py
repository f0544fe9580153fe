"""Exact maps: products through the modules between layers, max pooling as an OR, secants, layers that nobody reads."""

import itertools
import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ulr_snn
from ulr_snn import LIF, ULR, Fold, Gaussian, Logistic, TimeAverage, UsageError, attach, plan
from ulr_snn.credit.direct import direct_credit, direct_effect
from ulr_snn.credit.pooling import SpikePooling
from ulr_snn.losses.named import resolve
from ulr_snn.model.batch import Batch
from ulr_snn.model.bound import BoundModel
from ulr_snn.model.call import Call
from ulr_snn.model.forward import Forward
from ulr_snn.model.passes import Pass
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.noise.secant import distances, secant
from ulr_snn.sites.binding import spiking_layers

STEPS, BATCH = 5, 3


# -- products ----------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Spikes of the first layer reach the second through a convolution and pooling, and the third by a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = LIF(), LIF(), LIF()
        self.into = Fold(nn.Conv2d(1, 2, 3, padding=1))
        self.between = Fold(nn.Conv2d(2, 2, 3, padding=1), nn.GroupNorm(1, 2))
        self.out = nn.Linear(2 * 4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(3 * self.into(x))
        b = self.second(3 * self.between(a))
        c = self.third(b + a.roll(1, 0) + 0.5)  # what is a step late
        return self.out(c.flatten(2)).mean(0)


class Attention(nn.Module):
    """Products of spikes with spikes."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 6)
        self.lifs, self.last, self.out = nn.ModuleList(LIF() for _ in range(3)), LIF(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = zip(self.lifs, (self.q, self.k, self.v), strict=True)
        q, k, v = (lif(3 * m(x)).unflatten(-1, (2, 3)) for lif, m in maps)
        return self.out(self.last((q @ k.mT @ v).flatten(-2) + 0.5)).mean(0)


def one_pass(model: nn.Module, x: Tensor, scale: float = 0.4) -> Pass:
    level = NoiseLevel(Logistic(scale))
    targets = torch.zeros(x.shape[1], dtype=torch.long)
    batch = Batch.of(model, x, targets, None, resolve("ce_count"))
    return Forward(BoundModel(model, Call(), Call(), None, spiking_layers(model)), level).run(batch, [0])


@pytest.mark.parametrize(
    ("make", "shape"), [(Residual, (1, 4, 4)), (Attention, (4,))], ids=["convolutions, sums, delays", "attention"]
)
def test_the_product_is_the_jacobian_at_fixed_spikes(make, shape):
    """Entry by entry, by central differences of the current in the spikes of every earlier layer."""
    torch.manual_seed(1)
    model = make().double()
    p = one_pass(model, torch.rand(STEPS, BATCH, *shape, dtype=torch.float64))
    for target in p.records[1:]:
        g = torch.randn_like(target.current)
        for source in p.records[: p.records.index(target)]:
            a = direct_credit([(target.arrived[0], g)], source)
            if a is None:
                continue
            change = torch.randn_like(a)
            (effect,) = direct_effect(target.arrived, [source], [change])
            torch.testing.assert_close((a * change).sum(), (effect * g).sum())
    expected = through(model, p)
    found = direct_credit([(p.records[-1].arrived[0], torch.ones_like(p.records[-1].current))], p.records[0])
    torch.testing.assert_close(found, expected)


def through(model: nn.Module, p: Pass) -> Tensor:
    """∂(sum of the last layer's current)/∂(each spike of the first), by changing one after another."""
    first, found = p.records[0].spikes.detach(), torch.zeros_like(p.records[0].spikes)
    held = [r.spikes.detach() for r in p.records]

    def total(changed: Tensor) -> Tensor:
        if isinstance(model, Residual):
            return (held[1] + changed.roll(1, 0) + 0.5).sum()
        q, k, v = (s.unflatten(-1, (2, 3)) for s in (changed, *held[1:3]))
        return (q @ k.mT @ v).sum()

    with torch.no_grad():
        for place in itertools.product(*map(range, first.shape)):
            up, down = first.clone(), first.clone()
            up[place] += 0.5
            down[place] -= 0.5
            found[place] = total(up) - total(down)
    return found


# -- max pooling -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "stride", "padding", "ceil"), [(2, 2, 0, False), (3, 2, 1, False), (3, 1, 1, True), (2, 2, 0, True)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["torch", "kernels"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_max_pooling_of_spikes_is_an_or(axes, dtype, size, stride, padding, ceil):
    """Its derivative in a spike is the difference that this spike makes, the others as they are."""
    torch.manual_seed(0)
    pool = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}[axes]
    x = (torch.rand(2, 1, *[5] * axes) < 0.3).to(dtype).requires_grad_()
    with SpikePooling():
        y = pool(x, size, stride, padding, ceil_mode=ceil)
    torch.testing.assert_close(y, pool(x.detach(), size, stride, padding, ceil_mode=ceil), rtol=0, atol=0)
    g, expected = torch.randn_like(y), torch.zeros_like(x)
    (found,) = torch.autograd.grad(y, x, g, retain_graph=True)
    with torch.no_grad():
        for place in itertools.product(*map(range, x.shape)):
            sides = []
            for value in (1.0, 0.0):
                changed = x.detach().clone()
                changed[place] = value
                sides.append((pool(changed, size, stride, padding, ceil_mode=ceil) * g).sum())
            expected[place] = sides[0] - sides[1]
    torch.testing.assert_close(found, expected)
    (other,) = torch.autograd.grad(pool(x, size, stride, padding, ceil_mode=ceil), x, g)
    assert not torch.allclose(other, expected)  # torch's own derivative


def test_max_pooling_of_other_numbers_is_torchs_own():
    x = torch.randn(2, 1, 4, 4, requires_grad=True)
    with SpikePooling():
        y = nn.MaxPool2d(2)(x)
    g = torch.randn_like(y)
    expected = torch.autograd.grad(functional.max_pool2d(x, 2), x, g)[0]
    assert torch.equal(torch.autograd.grad(y, x, g)[0], expected)


# -- secants -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("firing", [Logistic(), Gaussian()], ids=["logistic", "gaussian"])
def test_a_secant_is_exact_for_its_own_changes_and_tends_to_the_slope(firing):
    x = torch.linspace(-6, 6, 41, dtype=torch.float64)
    for distance in (0.3, 2.0, 5.0):
        k = secant(firing.probability, x, torch.tensor([distance]))
        difference = firing.probability(x + distance) - firing.probability(x - distance)
        torch.testing.assert_close(k * 2 * distance, difference)
        changes = torch.tensor([distance, -distance])[:, None]
        effects = firing.probability(x + changes) - firing.probability(x)
        errors = [(effects - slope * changes).square().sum(0) for slope in (k, k + 1e-3, k - 1e-3)]
        assert (errors[0] <= errors[1]).all() and (errors[0] <= errors[2]).all()  # the least-squares response
    near = secant(firing.probability, x, torch.tensor([1e-3]))
    torch.testing.assert_close(near, firing.slope(x), rtol=1e-5, atol=1e-7)


def test_distances_go_from_the_noise_to_the_farthest_membrane():
    both_sides = torch.tensor([81.0, 2.0])
    torch.testing.assert_close(distances(both_sides, 2), torch.tensor([3.0, 27.0]))  # 1, 3, 9, 27, 81
    torch.testing.assert_close(distances(torch.tensor([81.0, -20.0]), 2), torch.tensor([3.0, 27.0]))  # -20 is within 27
    torch.testing.assert_close(distances(torch.tensor([0.1, 0.2]), 4), torch.ones(4))  # all within the noise


@pytest.mark.parametrize("rest", [[81.0, -81.0], [81.0, -30.0], [-81.0, 81.0]])
def test_a_layer_far_from_its_threshold_has_credit(rest):
    """Such as a silent layer at rest."""
    found = distances(torch.tensor(rest), 2)
    torch.testing.assert_close(found, torch.tensor([81.0 ** (1 / 3), 81.0]))
    assert all(secant(Logistic().probability, torch.tensor([x]), found) > 1e-3 for x in (-81.0, 81.0))  # 0.25 / 81
    assert secant(Logistic().probability, torch.tensor([81.0]), torch.tensor([3.0, 27.0])) < 1e-20


def test_secants_come_from_the_step_before():
    """The first step has derivatives; the second the farthest distance of the first, in units of its own noise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), LIF(), TimeAverage(), nn.Linear(6, 3))
    x, y = torch.rand(STEPS, BATCH, 4), torch.tensor([0, 1, 2])
    with attach(model, ULR(firing=Logistic(0.1))) as ulr:
        ulr.backward(x, y)
        farthest = ulr.state_dict()["farthest"]["1"]
    drive = one_pass(model, x, 0.1).records[0].x
    torch.testing.assert_close(farthest, 0.1 * torch.stack([-drive.min(), drive.max()]).detach())
    with pytest.raises(UsageError, match="secants"):
        Logistic(secants=-1)


# -- what nobody reads, and what never fires ---------------------------------------------------------------


class TwoHeads(nn.Module):
    """The second head is given back, and no loss reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 8), LIF())
        self.head, self.other, self.monitor = nn.Linear(8, 3), nn.Linear(8, 5), LIF()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        spikes = self.trunk(x)
        return self.head(spikes), self.monitor(self.other(spikes))


def test_a_head_that_no_loss_reads_gets_no_noise_and_is_listed():
    torch.manual_seed(0)
    model = TwoHeads()
    x, y = torch.rand(STEPS, BATCH, 4), torch.tensor([0, 1, 2])
    plan = ulr_snn.plan(model, (x, y))
    assert "other.weight" in str(plan) and "nothing" in str(plan)
    with attach(model) as ulr, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            ulr.backward(x, y)
    assert any("other.weight" in str(w.message) for w in told)
    assert model.other.weight.grad is None and model.trunk[0].weight.grad is not None


@pytest.mark.parametrize("threshold", [1e9, math.inf])
def test_neurons_that_never_fire_are_readouts(threshold):
    """Their membrane is the prediction."""
    snntorch = pytest.importorskip("snntorch")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.hidden = nn.Linear(4, 8), snntorch.Leaky(beta=0.9)
            self.out = nn.Linear(8, 3)
            self.readout = snntorch.Leaky(beta=0.9, threshold=threshold, reset_mechanism="none")

        def forward(self, x: Tensor) -> Tensor:
            u, v, found = self.hidden.init_leaky(), self.readout.init_leaky(), []
            for now in x:
                spikes, u = self.hidden(3 * self.into(now), u)
                _, v = self.readout(self.out(spikes), v)
                found.append(v)
            return torch.stack(found)

    torch.manual_seed(0)
    model = Net()
    x, y = torch.rand(8, 16, 4), torch.arange(16) % 3
    result = ulr_snn.train(model, [(x, y)] * 30, 1, progress=False)
    assert math.isfinite(result.history[-1]["train_loss"])
    with attach(model) as ulr:
        assert all(torch.isfinite(ulr.backward(x, y).loss))
        assert ulr.learner.level.noiseless == {"readout"} or math.isinf(threshold)


@pytest.mark.parametrize("threshold", [0.0, 1, -0.2])
def test_thresholds_of_zero_of_whole_numbers_and_below_zero_train(threshold):
    snntorch = pytest.importorskip("snntorch")
    torch.manual_seed(0)
    layer = lambda **k: snntorch.Leaky(beta=0.9, init_hidden=True, threshold=threshold, **k)  # noqa: E731
    model = nn.Sequential(nn.Linear(4, 8), layer(), nn.Linear(8, 3), layer(output=True))
    x, y = torch.rand(8, 16, 4), torch.arange(16) % 3
    result = ulr_snn.train(model, [(x, y)] * 20, 1, progress=False)
    assert math.isfinite(result.history[-1]["train_loss"])


# -- the model's own code, neurons as scans ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["IFNode", "LIFNode", "ParametricLIFNode"])
@pytest.mark.parametrize("options", [{}, {"v_reset": 0.1}, {"v_reset": None}])
def test_multi_step_nodes_run_as_scans_with_the_nodes_own_spikes(kind, options):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    functions = pytest.importorskip("spikingjelly.activation_based.functional")
    from ulr_snn.adapters import adapt

    node = getattr(neuron, kind)(step_mode="m", **options)
    adapted = adapt(node, "node")
    if not adapted.scans:
        assert options == {"v_reset": None} and kind != "IFNode"  # what leaks after the reset is no scan of ours
        return
    x = 2 * torch.randn(12, 3, 7, generator=torch.Generator().manual_seed(0))
    theirs = node(x)
    functions.reset_net(node)
    current, ours = adapted.as_scan(x, None)
    assert torch.equal(ours.fired(current)[0], theirs)


class Steady:
    """A site of neurons that fire whenever they can; their gradient goes straight through."""

    def begin(self, current: Tensor) -> None:
        pass

    def fire(self, drive: Tensor) -> Tensor:
        return (drive >= 0).to(drive) + drive - drive.detach()

    def end(self, states: list) -> None:
        self.states = states


@pytest.mark.parametrize("kind", ["IFNode", "LIFNode", "ParametricLIFNode"])
@pytest.mark.parametrize("options", [{}, {"v_reset": 0.1}, {"v_reset": None}, {"decay_input": False}])
def test_steps_of_nodes_are_the_nodes_own(kind, options):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    from ulr_snn.adapters import adapt

    if kind == "IFNode" and "decay_input" in options:
        return
    found = []
    for module_kind in (getattr(neuron, kind), type("Own", (getattr(neuron, kind),), {})):  # which nobody knows
        node = module_kind(detach_reset=False, **options).double()
        x = (2 * torch.randn(9, 3, 7, generator=torch.Generator().manual_seed(0))).double().requires_grad_()
        site = Steady()
        adapted = adapt(node, "node") if module_kind.__name__ != "Own" else None
        if adapted is not None:
            with adapted.bound(site):
                spikes = torch.stack([node(now) for now in x])
            (membrane,) = site.states
        else:
            node.__dict__["surrogate_function"] = site.fire
            spikes, membrane = torch.stack([node(now) for now in x]), node.v
        (spikes * torch.arange(9.0).view(-1, 1, 1)).sum().backward()
        found.append([spikes, membrane, x.grad, *(q.grad for q in node.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["LIF", "LSNN"])
@pytest.mark.parametrize("recurrent", [False, True], ids=["feed forward", "recurrent"])
def test_steps_of_norse_are_norses_own(recurrent, kind):
    norse = pytest.importorskip("norse.torch")
    from ulr_snn.adapters.norse import rebound, written_out

    torch.manual_seed(0)
    module = getattr(norse, f"{kind}RecurrentCell" if recurrent else f"{kind}Cell")(*[7, 7] * recurrent).double()
    x = (20 * torch.rand(9, 3, 7)).double().requires_grad_()
    site, found = Steady(), []
    for run in (
        written_out(module.activation, module.p, site.fire),
        rebound(module.activation, lambda drive, method, alpha: site.fire(drive)),
    ):
        state, spikes = module.state_fallback(x[0]), []
        own = (module.input_weights, module.recurrent_weights) if recurrent else ()
        weights = [weight.detach().requires_grad_() for weight in own]
        for now in x:
            fired, state = run(now, state, *weights, module.p, module.dt)
            spikes.append(fired)
        total = (torch.stack(spikes) * torch.arange(9.0).view(-1, 1, 1)).sum()
        found.append([*spikes, *state, *torch.autograd.grad(total, [x, *weights])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert written_out(module.activation, norse.LIFParameters(v_leak=torch.tensor(0.1)), site.fire) is None


def test_a_scan_in_a_model_with_batch_norm_gives_the_gradient_of_the_nodes_own_steps(monkeypatch):
    """Same noise, same gradient, in double precision; the leak of parametric nodes included."""
    pytest.importorskip("spikingjelly.activation_based.neuron")
    from spikingjelly.activation_based import functional as functions
    from spikingjelly.activation_based import layer, neuron

    from ulr_snn.adapters.spikingjelly import Node

    torch.manual_seed(0)
    model = nn.Sequential(
        *(layer.Conv2d(1, 4, 3, padding=1, bias=False), layer.BatchNorm2d(4), neuron.ParametricLIFNode()),
        *(layer.MaxPool2d(2), layer.Flatten(), layer.Linear(16, 3), neuron.LIFNode()),
    ).double()
    functions.set_step_mode(model, "m")
    x, y = 3 * torch.rand(6, 5, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    found = []
    for scans in (True, False):
        if not scans:
            monkeypatch.setattr(Node, "scans", False)
        model.zero_grad()
        with attach(model, ULR(firing=Logistic(0.3, secants=0))) as ulr:
            ulr.backward(x, y)
        found.append({name: q.grad.clone() for name, q in model.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-9, atol=1e-12)


class Twice(nn.Module):
    """Runs one layer twice; the outputs read the second time without a derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.lif, self.b, self.out = nn.Linear(6, 5), LIF(), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.lif(self.a(x))
        return self.out(first) * self.lif(self.b(first)).detach().mean() * 3


def test_a_second_call_that_the_outputs_read_without_a_derivative_keeps_its_noise():
    torch.manual_seed(0)
    model = Twice()
    with torch.no_grad():
        model.a.weight.mul_(4)
        model.b.weight.mul_(4)
    x, y = torch.rand(10, 4, 6), torch.arange(4) % 3
    said = {site: credit for site, _, credit in plan(model, (x, y)).sites}
    assert said["lif#2"] == "learned from the outputs, resolved in time"
