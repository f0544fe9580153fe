"""Credit of all layers in one backward pass is the credit of one layer after another."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ulr_snn import LIF, ULR, Fold, LeakyReadout, Logistic, RecurrentLIF, TimeAverage, attach
from ulr_snn.credit.linked import Linked
from ulr_snn.kernels import dispatch
from ulr_snn.memory.step import Step
from ulr_snn.noise.random import Drawer, Noise

STEPS, BATCH, INPUTS = 6, 5, 7


class Sums(nn.Module):
    """Spikes of a layer reach all later ones, as in a residual net; batch norm couples the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.into = Fold(nn.Linear(INPUTS, 8), nn.BatchNorm1d(8))
        self.maps = nn.ModuleList(Fold(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)) for _ in range(3))
        self.lifs = nn.ModuleList(LIF(reset=reset) for reset in ("subtract", "zero", "none", "subtract"))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lifs[0](self.into(x))
        for through, lif in zip(self.maps, self.lifs[1:], strict=True):
            x = x + lif(through(x).roll(1, 0))
        return self.out(x).mean(0)


def recurrent() -> nn.Module:
    layers = nn.Linear(INPUTS, 9), RecurrentLIF(9, learn_beta=True, learn_threshold=True), nn.Linear(9, 6)
    return nn.Sequential(*layers, RecurrentLIF(6), nn.Linear(6, 3), LeakyReadout(), TimeAverage())


def leaks() -> nn.Module:
    first, second = LIF(torch.full((9,), 0.7), learn_beta=True), LIF(0.8, reset="zero", learn_beta=True)
    return nn.Sequential(nn.Linear(INPUTS, 9), first, nn.Linear(9, 6), second, nn.Linear(6, 3), TimeAverage())


def snntorch_steps(name: str, **options: object) -> nn.Module:
    snn = pytest.importorskip("snntorch")

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(INPUTS, 8), nn.Linear(8, 8)
            self.first = getattr(snn, name)(*[8, 8] * (name == "SLSTM"), **options)
            self.last, self.out = snn.Leaky(beta=0.8, learn_threshold=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            state = (x.new_zeros(x.shape[1], 8),) * 2 if name == "SLSTM" else ()
            before, outputs = x.new_zeros(x.shape[1], 8), []
            u = self.last.init_leaky()
            for now in x:
                spikes, *state = self.first(self.a(now), *state)
                spikes, u = self.last(self.b(spikes) + before, u)
                before = 0.3 * spikes.roll(1, 1) if name == "Leaky" else before
                outputs.append(self.out(spikes))
            return torch.stack(outputs)

    return Steps()


def norse_steps() -> nn.Module:
    norse = pytest.importorskip("norse.torch")

    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.first = nn.Linear(INPUTS, 8), norse.LIFRecurrentCell(8, 8)
            self.b, self.last, self.out = nn.Linear(8, 6), norse.LIFCell(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            one, two, outputs = None, None, []
            for now in x:
                spikes, one = self.first(20 * self.a(now), one)
                spikes, two = self.last(20 * self.b(spikes), two)
                outputs.append(self.out(spikes))
            return torch.stack(outputs)

    return Cells()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "sums": Sums,
    "recurrent": recurrent,
    "leaks": leaks,
    "Synaptic": lambda: snntorch_steps("Synaptic", alpha=0.7, beta=0.8, learn_threshold=True),
    "Leaky, reset at once": lambda: snntorch_steps("Leaky", beta=0.8, reset_delay=False),
    "SLSTM": lambda: snntorch_steps("SLSTM", reset_mechanism="subtract", threshold=0.1),
    "Norse": norse_steps,
}


def gradients(make: Callable[[], nn.Module], linked: bool, monkeypatch, dtype: torch.dtype, **options) -> list[Tensor]:
    """After two steps, of which the second has secants."""
    torch.manual_seed(0)
    model = make().to(dtype)
    generator = torch.Generator().manual_seed(1)
    x = 2 * torch.rand(STEPS, BATCH, INPUTS, generator=generator, dtype=dtype)
    lengths = torch.tensor([6, 3, 1, 5, 6]) if options.pop("lengths", False) else None
    if not linked:
        monkeypatch.setattr(Step, "links", False)
    with attach(model, ULR(firing=Logistic(0.2), **options), "ce_rate", seed=3) as ulr:
        for _ in range(2):
            model.zero_grad()
            ulr.backward(x, torch.arange(BATCH) % 3, lengths=lengths)
        assert ulr.prepared(x, torch.arange(BATCH) % 3, None, lengths).links == linked
    monkeypatch.undo()
    return [q.grad for q in model.parameters() if q.requires_grad]


@pytest.mark.parametrize("options", [{}, {"copies": 2}], ids=["one copy", "two"])
@pytest.mark.parametrize("name", MODELS)
def test_linked_credit_is_that_of_one_layer_after_another(name, options, monkeypatch):
    apart, linked = (gradients(MODELS[name], flag, monkeypatch, torch.float64, **options) for flag in (False, True))
    for one, other in zip(apart, linked, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)
    assert sum(float(g.abs().sum()) > 0 for g in linked) == len(linked)


@pytest.mark.parametrize("name", ["recurrent", "leaks", "Synaptic", "Norse"])
def test_padding_takes_no_part(name, monkeypatch):
    options = {"lengths": True}
    apart, linked = (gradients(MODELS[name], flag, monkeypatch, torch.float64, **options) for flag in (False, True))
    for one, other in zip(apart, linked, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["leaks", "Synaptic", "Norse"])
def test_kernels_draw_the_same_spikes_and_give_the_same_credit(name, monkeypatch):
    """In single precision, on a CPU."""
    with_kernel = gradients(MODELS[name], True, monkeypatch, torch.float32)
    monkeypatch.setattr(dispatch, "kernels", lambda like: None)
    without = gradients(MODELS[name], True, monkeypatch, torch.float32)
    for one, other in zip(with_kernel, without, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_a_step_of_the_kernel_is_a_step_of_the_drawer():
    noise = Noise(3, 5, torch.arange(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32))
    scale, drive = torch.rand(9) + 0.1, torch.randn(3, 4, 9)
    drawer = Drawer(noise, Logistic(), 2, 3, scale)
    step = dispatch.StepDraw(drawer.draw(), drive[0], torch.tensor([3, 3, 1, 2]), None)
    spikes = torch.stack([step(*now) for now in enumerate(drive)])
    own = (torch.arange(3)[:, None] < torch.tensor([3, 3, 1, 2]))[..., None]
    x = drive / scale
    assert torch.equal(spikes, torch.stack([drawer(*now) for now in enumerate(x)]) * own)
    torch.testing.assert_close(step.slope, Logistic().slope(x) / scale * own)
    torch.testing.assert_close(step.farthest, torch.stack([-x[own.expand_as(x)].min(), x[own.expand_as(x)].max()]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_learned_threshold_and_its_scale_get_the_gradient_of_the_drive_over_the_scale(dtype):
    """A product of the graph in single precision, as without a learned threshold, and no function in Python."""
    noise = Noise(3, 5, torch.arange(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32))
    scale = (torch.rand(9, generator=torch.Generator().manual_seed(0)) + 0.1).requires_grad_()
    drive, a = torch.randn(2, 3, 4, 9, generator=torch.Generator().manual_seed(1)).to(dtype)
    drive.requires_grad_()
    link = Linked.steps(Drawer(noise, Logistic(), 2, 3, scale), scale, None, None, False)
    fired = [link.fired(t, now) for t, now in enumerate(drive)]
    found = torch.autograd.grad(fired, [drive, scale], list(a))
    x = drive.double() / scale.double()
    drawer = Drawer(noise, Logistic(), 2, 3, scale.detach())
    for t, spikes in enumerate(fired):
        assert spikes.dtype == dtype and torch.equal(spikes, drawer(t, x[t].detach()).to(dtype))
        assert dtype != torch.float32 or "Function" not in type(spikes.grad_fn).__name__
    wanted = torch.autograd.grad(x, [drive, scale], a * Logistic().slope(x.detach()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=3e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
