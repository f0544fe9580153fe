"""Models of other libraries run as chains of our scans where they can: the same spikes and gradients as by their own
code; whatever does not fit is found, and runs by its own code."""

import copy
import re
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import prune

from tests.helpers import library_of
from ulr_snn import LIF, ULR, CurrentNoise, Logistic, Online, RecurrentLIF, SpikeBudget, attach, evaluate, plan, train
from ulr_snn.adapters import adapt
from ulr_snn.errors import UsageError
from ulr_snn.memory.chunks import ChunkLimits, TimeChunks
from ulr_snn.model.bound import BoundModel
from ulr_snn.model.call import model_outputs
from ulr_snn.model.chain import Chain
from ulr_snn.model.glue import MODULES, VIEWS
from ulr_snn.model.habits import Watched
from ulr_snn.model.tail import Blank

STEPS, BATCH = 9, 16


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def double() -> Iterator[None]:
    """Libraries make their states in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def snntorch() -> Any:
    return library_of("snntorch")


def norse() -> Any:
    return library_of("norse.torch")


def spikingjelly(part: str) -> Any:
    return library_of(f"spikingjelly.activation_based.{part}")


class Loop(nn.Module):
    """As in snnTorch's tutorials: a time loop, states passed by hand. between: what comes before the second neuron."""

    def __init__(self, neuron: Callable[[], nn.Module], readout: bool = True, tail: str = "stack") -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(5, 8), neuron()
        self.fc2, self.lif2 = nn.Linear(8, 8), neuron()
        self.fc3 = nn.Linear(8, 3) if readout else nn.Identity()
        self.tail = tail

    def between(self, t: int, current: Tensor) -> Tensor:
        return current

    def forward(self, x: Tensor) -> Any:
        one, two = [list(as_tuple(lif.reset_mem())) for lif in (self.lif1, self.lif2)]
        outputs, membranes = [], []
        for t in range(len(x)):
            spk, *one = self.lif1(self.fc1(x[t].flatten(1)), *one)
            one = [spk, *one] if hasattr(self.lif1, "recurrent") else one
            spk, *two = self.lif2(self.between(t, self.fc2(spk)), *two)
            two = [spk, *two] if hasattr(self.lif1, "recurrent") else two
            outputs.append(self.fc3(spk))
            membranes.append(two[-1])
        if self.tail == "mean":
            return torch.stack(outputs).mean(0)
        if self.tail == "membranes":
            return torch.stack(membranes)
        return torch.stack(outputs), torch.stack(membranes)


def as_tuple(item: Any) -> tuple[Any, ...]:
    return item if isinstance(item, tuple) else (item,)


def leaky(**options: Any) -> nn.Module:
    return Loop(lambda: snntorch().Leaky(0.8, **options))


def hidden() -> nn.Module:
    snn = snntorch()
    return nn.Sequential(
        nn.Flatten(), nn.Linear(5, 8), snn.Leaky(0.8, init_hidden=True),
        nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.0).eval()), snn.Leaky(0.7, init_hidden=True, output=True),
    )  # fmt: skip


def jelly(kind: str, mode: str = "s", first: str | None = None, **options: Any) -> nn.Module:
    neuron = spikingjelly("neuron")
    one, two = (getattr(neuron, each)(step_mode=mode, **options) for each in (first or kind, kind))
    return nn.Sequential(nn.Linear(5, 8), one, nn.Linear(8, 6), two, nn.Linear(6, 3))


def lifted() -> nn.Module:
    neuron, layer = spikingjelly("neuron"), spikingjelly("layer")
    return nn.Sequential(
        nn.Unflatten(2, (1, 1, 5)), layer.Conv2d(1, 3, (1, 3), padding=(0, 1), step_mode="m"),
        neuron.LIFNode(2.0, decay_input=False, step_mode="m"), layer.MaxPool2d((1, 2), step_mode="m"),
        layer.Flatten(step_mode="m"), layer.Linear(6, 3, step_mode="m"),
    )  # fmt: skip


def convolution() -> nn.Module:
    snn = snntorch()
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 3, padding=1), snn.Leaky(0.8, init_hidden=True), nn.AvgPool1d(2),
        nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def normed() -> nn.Module:
    """Batch norm and dropout in training mode, which see one time step at a time."""
    snn = snntorch()
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 3, padding=1, bias=False), nn.BatchNorm1d(3),
        snn.Leaky(0.8, init_hidden=True), nn.Dropout1d(0.0), nn.Flatten(), nn.Linear(15, 8, bias=False),
        nn.BatchNorm1d(8, track_running_stats=False), snn.Leaky(0.8, init_hidden=True), nn.Dropout(0.0),
        nn.Linear(8, 3),
    )  # fmt: skip


def recurrent(**options: Any) -> nn.Module:
    return Loop(lambda: snntorch().RLeaky(0.8, linear_features=8, **options))


def lif(**changed: Any) -> Any:
    """Parameters of Norse's LIF in the usual precision of a test; its own are made when it is imported."""
    usual = {"tau_syn_inv": 200.0, "tau_mem_inv": 100.0, "v_leak": 0.0, "v_th": 1.0, "v_reset": 0.0}
    return norse().LIFParameters(**usual | changed)


class Between(Loop):
    def __init__(self, between: Callable[[Loop, int, Tensor], Tensor]) -> None:
        super().__init__(lambda: snntorch().Leaky(0.8))
        self.how = between

    def between(self, t: int, current: Tensor) -> Tensor:
        return self.how(self, t, current)


class Pooled(nn.Module):
    """Functions of torch between modules, as tutorials write them."""

    def __init__(self) -> None:
        super().__init__()
        snn = snntorch()
        self.conv, self.lif1 = nn.Conv2d(1, 4, 3, padding=1), snn.Leaky(0.8)
        self.fc1, self.lif2, self.fc2 = nn.Linear(4, 8), snn.Leaky(0.7), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        mem1, mem2, outputs = self.lif1.init_leaky(), self.lif2.init_leaky(), []
        for step in x:
            spk, mem1 = self.lif1(functional.max_pool2d(self.conv(step.view(-1, 1, 1, 5)), (1, 2)), mem1)
            spk = functional.max_pool2d(functional.avg_pool2d(spk, 1), (1, 2)).relu()
            spk, mem2 = self.lif2(self.fc1(spk.flatten(1)), mem2)
            outputs.append(self.fc2(spk))
        return torch.stack(outputs)


def synaptic(**options: Any) -> nn.Module:
    return Loop(lambda: snntorch().Synaptic(0.7, 0.8, **options))


CHAINS: dict[str, Callable[[], nn.Module]] = {
    "Leaky, subtract": leaky,
    "Leaky, zero": lambda: leaky(reset_mechanism="zero"),
    "Leaky, none": lambda: leaky(reset_mechanism="none"),
    "Leaky, learned": lambda: leaky(learn_beta=True, learn_threshold=True),
    "Leaky, by neuron": lambda: Loop(
        lambda: snntorch().Leaky(0.8, threshold=torch.linspace(0.5, 1.5, 8), learn_threshold=True)
    ),
    "Leaky, leak above 1": lambda: Loop(lambda: snntorch().Leaky(1.3)),
    "Leaky, mean over time": lambda: Loop(lambda: snntorch().Leaky(0.8), tail="mean"),
    "Leaky, spikes": lambda: Loop(lambda: snntorch().Leaky(0.8), readout=False),
    "Leaky, a step a call": hidden,
    "Leaky, convolution": convolution,
    "Leaky, norms and dropout": normed,
    "Leaky, rectified": lambda: Between(lambda m, t, x: x.relu()),
    "Leaky, functions between": Pooled,
    "RLeaky, subtract": recurrent,
    "RLeaky, none": lambda: recurrent(reset_mechanism="none", learn_beta=True),
    "Synaptic, subtract": lambda: synaptic(),
    "Synaptic, none, learned": lambda: synaptic(reset_mechanism="none", learn_alpha=True, learn_beta=True),
    "Norse": lambda: norse().SequentialState(
        nn.Linear(5, 8),
        norse().LIFCell(lif()),
        nn.Linear(8, 6),
        norse().LIFCell(lif(v_th=0.6), dt=0.002),
        nn.Linear(6, 3),
    ),
    "Norse, whole sequences": lambda: norse().SequentialState(
        nn.Linear(5, 8), norse().LIF(lif(tau_syn_inv=torch.linspace(100, 300, 8))), nn.Linear(8, 3)
    ),
    "IFNode, hard reset": lambda: jelly("IFNode"),
    "IFNode, soft reset": lambda: jelly("IFNode", "m", v_reset=None),
    "LIFNode, decaying input": lambda: jelly("LIFNode", "m", tau=3.0),
    "LIFNode": lambda: jelly("LIFNode", decay_input=False, v_threshold=0.7),
    "LIFNode, rest": lambda: jelly("LIFNode", v_reset=-0.3, v_threshold=0.5),
    "SpikingJelly's layers": lifted,
}
ESTIMATORS = {
    "feedback": ULR(),
    "a pair": ULR(credit="feedback", copies=2),
    "residual": ULR(credit="residual", copies=4),
    "global": ULR(credit="global", copies=2),
}

LAYERWISE = ULR(credit="residual", layerwise=True, copies=4)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(STEPS, BATCH, 5, generator=generator) < 0.5).to(dtype) * 3
    return x, torch.randint(0, 3, (BATCH,), generator=generator)


def steps_of(
    model: nn.Module, estimator: ULR, data: tuple[Tensor, Tensor], own_code: bool, **options: Any
) -> tuple[list[Tensor], dict[str, list[Tensor]], list[Tensor]]:
    """Outputs and gradients of five steps that learn, and the weights afterwards."""
    torch.manual_seed(3)  # for noise of the model's own
    optimizer = torch.optim.SGD(model.parameters(), 0.01)  # long ones make more of a difference in rounding
    outputs: list[Tensor] = []
    gradients: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    with attach(model, estimator, seed=5, total_steps=8, **options.pop("attach", {})) as ulr:
        ulr.binder.own_code = own_code
        for _ in range(5):
            optimizer.zero_grad()
            outputs.append(ulr.backward(*data, **options).outputs)
            for name, q in model.named_parameters():
                gradients[name].append(torch.zeros_like(q) if q.grad is None else q.grad.clone())
            optimizer.step()
        assert isinstance(ulr.bound.model, Chain) is not own_code, ulr.bound.why
    return outputs, gradients, [q.detach() for q in model.parameters()]


def assert_same(model: nn.Module, estimator: ULR, data: tuple[Tensor, Tensor], rtol: float, **options: Any) -> None:
    theirs = steps_of(copy.deepcopy(model), estimator, data, True, **options)
    ours = steps_of(model, estimator, data, False, **options)
    for a, b in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)
    for name in ours[1]:
        for a, b in zip(ours[1][name], theirs[1][name], strict=True):
            scale = float(b.abs().max())
            assert float((a - b).abs().max()) <= rtol * scale + 1e-14, name
    assert any(float(g.abs().max()) > 0 for found in ours[1].values() for g in found)
    for a, b in zip(ours[2], theirs[2], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


@pytest.mark.product
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_has_the_spikes_and_gradients_of_the_models_own_code(name, estimator, double):
    torch.manual_seed(0)
    assert_same(CHAINS[name]().double(), estimator, batch(), 1e-9)


@pytest.mark.product
@pytest.mark.parametrize("name", CHAINS)
def test_in_single_precision(name):
    torch.manual_seed(0)
    assert_same(CHAINS[name](), ULR(), batch(torch.float32), 1e-4)


def test_norms_and_dropout_in_training_mode_act_as_in_the_models_own_code():
    """Running statistics move once a time step, and every time step has a dropout mask of its own."""
    torch.manual_seed(0)
    models, data = [normed()], batch(torch.float32)
    models.append(copy.deepcopy(models[0]))
    for model, own_code in zip(models, (True, False), strict=True):
        with attach(model, seed=5) as ulr:
            ulr.binder.own_code = own_code
            ulr.backward(*data)
    norms = [next(m for m in model.modules() if isinstance(m, nn.BatchNorm1d)) for model in models]
    assert norms[0].num_batches_tracked == norms[1].num_batches_tracked == STEPS
    torch.testing.assert_close(norms[1].running_mean, norms[0].running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norms[1].running_var, norms[0].running_var, rtol=1e-5, atol=1e-6)

    model = nn.Sequential(nn.Linear(5, 8), snntorch().Leaky(0.8, init_hidden=True), nn.Linear(8, 40), nn.Dropout(0.5))
    with attach(model, seed=5) as ulr:
        first, second = (ulr.backward(*data).outputs[0] == 0 for _ in range(2))
    assert isinstance(ulr.bound.model, Chain) and model[-1].training
    for masks in (first, second):
        assert 0.45 < masks.float().mean() < 0.55
        assert len({bytes(mask.numpy()) for mask in masks}) == STEPS
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["Leaky, subtract", "RLeaky, subtract", "LIFNode, decaying input"])
@pytest.mark.parametrize("estimator", ["feedback", "residual"])
def test_with_padding(name, estimator, double):
    torch.manual_seed(0)
    lengths = torch.tensor([9, 3, 5, 1] * 4)
    assert_same(CHAINS[name]().double(), ESTIMATORS[estimator], batch(), 1e-9, lengths=lengths)


@pytest.mark.parametrize(
    "estimator",
    [ULR(flow={"fc1": "frozen"}), ULR(flow={"fc3": "ulr"}), LAYERWISE],
    ids=["frozen", "noise on weights", "layerwise"],
)  # fmt: skip
def test_other_ways_to_learn(estimator, double):
    torch.manual_seed(0)
    assert_same(leaky().double(), estimator, batch(), 1e-9)


def test_costs_of_activity(double):
    torch.manual_seed(0)
    for counted in (SpikeBudget(5), SpikeBudget(40, operations=True)):
        assert_same(leaky().double(), ULR(), batch(), 1e-9, attach={"loss": {"ce_count": 1, counted: 0.1}})


def test_operations_of_recurrent_weights_are_counted_by_the_models_own_code():
    """These count a spike where it is read, a step later; the last step's is not."""
    with attach(recurrent(), loss={"ce_count": 1, SpikeBudget(40, operations=True): 0.1}) as ulr:
        ulr.backward(*batch(torch.float32))
        assert ulr.bound.model is ulr.model
        ulr.backward(*batch(torch.float32), loss="ce_count")
        assert isinstance(ulr.bound.model, Chain)


def test_chunks_of_time_have_the_gradient_of_the_whole(double):
    memory = TimeChunks(limits=ChunkLimits(together=(4 * BATCH * 16,) * 2))
    for make in (leaky, recurrent, lambda: jelly("LIFNode", "m")):
        torch.manual_seed(0)
        model = make().double()
        firing = Logistic(0.3)  # what is measured at the start is measured on a part
        whole = steps_of(copy.deepcopy(model), ULR(firing=firing), batch(), False)
        few = steps_of(model, ULR(firing=firing, memory=memory), batch(), False)
        with attach(model, ULR(firing=firing, memory=memory), seed=5) as ulr:
            assert ulr.backward(*batch()).stats["chunks"] > 1 and isinstance(ulr.bound.model, Chain)
        for name, found in whole[1].items():
            torch.testing.assert_close(few[1][name], found, rtol=1e-9, atol=1e-12)


def test_updates_at_every_time_step_are_those_of_our_own_neurons(double):
    torch.manual_seed(0)
    for model in (leaky().double(), jelly("IFNode", "m", v_reset=None).double()):
        first, second, third = [module for module in model.modules() if type(module) is nn.Linear]
        beta = 0.8 if isinstance(model, Loop) else 1.0
        own = nn.Sequential(first, LIF(beta), second, LIF(beta), third)
        found = []
        for one in (model, own):
            one.zero_grad()
            with attach(one, Online(firing=Logistic(0.3)), loss="ce_rate", seed=5) as ulr:
                for _ in range(3):
                    ulr.backward(*batch())
            found.append([q.grad.clone() for q in own.parameters()])
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


# -- what does not fit -------------------------------------------------------------------------------------------


class HiddenLoop(nn.Module):
    """States kept by the neuron; changed: what is done to its membrane in the middle."""

    def __init__(self, changed: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.fc, self.lif, self.changed = nn.Linear(5, 3), snntorch().Leaky(0.8, init_hidden=True), changed

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for t, step in enumerate(x):
            if t == 5:
                self.changed(self.lif)
            outputs.append(self.lif(self.fc(step)))
        return torch.stack(outputs)


class Late(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        snn = snntorch()
        self.fc1, self.lif1 = nn.Linear(5, 5), snn.Leaky(0.8, init_hidden=True)
        self.fc2, self.lif2 = nn.Linear(5, 3), snn.Leaky(0.8, init_hidden=True)

    def forward(self, x: Tensor) -> Tensor:
        before, outputs = torch.zeros_like(x[0]), []
        for step in x:
            outputs.append(self.lif2(self.fc2(before)))
            before = self.lif1(self.fc1(step))
        return torch.stack(outputs)


class Dropped(nn.Module):
    """Its neurons forget their state at every time step."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(5, 3), norse().LIFCell()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.lif(self.fc(step))[0] for step in x])


class OwnNorm(nn.BatchNorm1d):
    """Might do anything."""


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "reset at once": (lambda: leaky(reset_delay=False), "resets at once"),
    "graded": (lambda: leaky(graded_spikes_factor=0.5), "graded"),
    "inhibition": (lambda: leaky(inhibition=True), "inhibition"),
    "recurrent, zero": (lambda: recurrent(reset_mechanism="zero"), "takes the current with it"),
    "one to one": (lambda: Loop(lambda: snntorch().RLeaky(0.8, all_to_all=False)), "not all to all"),
    "alpha": (lambda: nn.Sequential(nn.Linear(5, 3), snntorch().Alpha(0.8, 0.7, init_hidden=True)), "equations"),
    "synaptic, zero": (lambda: synaptic(reset_mechanism="zero"), "takes the current with it"),
    "Norse, recurrent": (lambda: norse().SequentialState(norse().LIFRecurrentCell(5, 8), nn.Linear(8, 3)), "equations"),
    "Norse, learned": (
        lambda: norse().SequentialState(
            nn.Linear(5, 3), norse().LIFCell(norse().LIFParameters(v_th=nn.Parameter(torch.ones(()))))
        ),
        "learns its parameters",
    ),
    "Norse, rest": (
        lambda: norse().SequentialState(nn.Linear(5, 3), norse().LIFCell(norse().LIFParameters(v_reset=-0.1))), "resets"
    ),
    "Norse, long steps": (
        lambda: norse().SequentialState(nn.Linear(5, 3), norse().LIFCell(dt=0.1)), "longer than a time constant"
    ),
    "Norse, state dropped": (lambda: Dropped(), "is changed between two time steps"),
    "soft reset of a leaky node": (lambda: jelly("LIFNode", v_reset=None), "has leaked by the next step"),
    "learned leak of a node": (lambda: jelly("ParametricLIFNode"), "fixed leak"),
    "state detached": (lambda: HiddenLoop(lambda lif: lif.mem.detach_()), "is changed between"),
    "state scaled": (lambda: HiddenLoop(lambda lif: setattr(lif, "mem", lif.mem * 0.5)), "is changed between"),
    "late": (Late, "reads something else|runs"),
    "a batch norm of its own": (
        lambda: nn.Sequential(nn.Linear(5, 3), OwnNorm(3), hidden_leaky()), "OwnNorm in training mode"
    ),
    "unknown": (
        lambda: nn.Sequential(nn.Linear(5, 3), nn.Softmax(-1), snntorch().Leaky(0.8, init_hidden=True)), "a Softmax"
    ),
}  # fmt: skip


class Twice(nn.Module):
    """One pooling module at two places, and a reduction of its own behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, leaky = nn.AvgPool1d(2, 1), snntorch().Leaky
        self.conv1, self.lif1 = nn.Conv1d(1, 3, 2), leaky(0.8, init_hidden=True)
        self.conv2, self.lif2 = nn.Conv1d(3, 3, 2), leaky(0.8, init_hidden=True)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for step in x:
            spikes = self.lif1(self.pool(self.conv1(step.unsqueeze(1))))
            membranes = self.pool(self.lif2(self.conv2(spikes)).cumsum(1)).flatten(1)
            found.append(membranes + 0.1 * torch.randn(membranes.shape).to(x))
        return torch.stack(found).amax(0).log_softmax(1)


class LastMembrane(nn.Module):
    """Norse's idiom: states that are passed on, an integrating readout, and the last membrane as the output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif, self.out = nn.Linear(5, 8), norse().LIFCell(lif()), norse().LILinearCell(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        one = two = None
        for step in x:
            spikes, one = self.lif(self.fc(step), one)
            membranes, two = self.out(spikes, two)
        return membranes.log_softmax(1)


def first_step_again(model: Loop, t: int, current: Tensor) -> Tensor:
    """Adds what the first step has given to all others."""
    model.first = current if t == 0 else model.first
    return current + model.first


class Own(Loop):
    """A chain or, with the membrane as output, the beginning of one, with something of the model's own beside it."""

    def __init__(self, beside: Callable[..., Any] = lambda model, spikes: None, whole: bool = True) -> None:
        super().__init__(lambda: snntorch().Leaky(0.8))
        self.beside, self.whole, self.first = beside, whole, None
        self.register_buffer("rate", torch.zeros(8))

    def forward(self, x: Tensor) -> Any:
        one, two, outputs = self.lif1.init_leaky(), self.lif2.init_leaky(), []
        for step in x:
            spikes, one = self.lif1(self.fc1(step), one)
            gain = self.beside(self, spikes)
            current = self.fc2(spikes)
            spikes, two = self.lif2(current if gain is None else gain * current, two)
            outputs.append(self.fc3(spikes if self.whole else two))
        return torch.stack(outputs)


def averaged(model: Own, spikes: Tensor) -> None:
    model.rate = 0.9 * model.rate + 0.1 * spikes.detach().mean(0)


def clamped(model: Own, spikes: Tensor) -> None:
    model.fc2.weight.data.clamp_(min=0)


def branched(model: Own, spikes: Tensor) -> float | None:
    return 0.2 if spikes.mean() > 0.9 else None


def remembered(model: Own, spikes: Tensor) -> None:
    model.kept = deque([spikes.detach()])


def listed(model: Own, spikes: Tensor) -> float | None:
    return 0.2 if max(max(spikes.tolist())) > 1 else None


def compared(model: Own, spikes: Tensor) -> float | None:
    return 0.2 if torch.equal(spikes, 2 * spikes + 1) else None


def written(model: Own, spikes: Tensor) -> None:
    with torch.no_grad():
        torch.mul(model.fc2.weight, 0.5, out=torch.empty_like(model.fc2.weight))  # this changes none
        torch.add(model.rate, 0.0, out=model.rate)


def counted(model: Own, spikes: Tensor) -> float | None:
    model.count = getattr(model, "count", 0) + 1
    return 0.2 if model.count > 1000 else None


HABITS = {
    "averaged": (averaged, "changes rate"),
    "clamped": (clamped, "changes parameters"),
    "branched": (branched, "reads numbers"),
    "listed": (listed, "reads numbers"),
    "compared": (compared, "reads numbers"),
    "written": (written, "changes parameters or buffers"),
    "counted": (counted, "changes count"),
}


@pytest.mark.parametrize("whole", [True, False], ids=["all of it", "the beginning"])
@pytest.mark.parametrize("name", HABITS)
def test_what_a_forward_does_besides_its_outputs_keeps_the_models_own_code(name, whole):
    beside, why = HABITS[name]
    engine = engine_of(Own(beside, whole))
    assert engine.running is engine.model and why in engine.why
    assert not engine.model.rate.isnan().any()


def test_what_a_model_keeps_is_never_nan():
    """The chain ends with what its code keeps."""
    engine = engine_of(Own(remembered, whole=False))
    assert "fc1 -> lif1," in engine.line()[0] and not engine.model.kept[0].isnan().any()


def test_a_state_that_is_carried_from_batch_to_batch_keeps_the_models_own_code():
    class Carried(Own):
        def forward(self, x: Tensor) -> Any:
            mem, outputs = self.lif1.init_leaky() if self.first is None else self.first, []
            for step in x:
                spikes, mem = self.lif1(self.fc1(step), mem)
                self.lif2(self.fc2(spikes))
                outputs.append(self.fc3(spikes))
            self.first = mem.detach()
            return torch.stack(outputs)

    torch.manual_seed(0)
    engine = engine_of(Carried())
    assert engine.running is engine.model and "two passes" in engine.why


@pytest.mark.parametrize("whole", [True, False], ids=["all of it", "the beginning"])
def test_attributes_that_choose_what_is_computed_are_noticed(whole, double):
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.lif1, self.fc2, self.lif2 = nn.Linear(5, 8), hidden_leaky(), nn.Linear(8, 3), hidden_leaky()
            self.rectifies, self.options = True, {"shift": 0}

        def forward(self, x: Tensor) -> Tensor:
            outputs = []
            for step in x:
                current = self.fc2(self.lif1(self.fc1(step)))
                spikes = self.lif2(current.relu() if self.rectifies and not self.options["shift"] else current)
                outputs.append(spikes if whole else 2 * spikes)
            return torch.stack(outputs)

    found = []
    for own_code in (True, False):
        torch.manual_seed(0)
        model = Chooses().double()
        with attach(model, seed=5) as ulr:
            ulr.binder.own_code = own_code
            ulr.backward(*batch())
            first = ulr.bound
            ulr.backward(*batch())
            assert ulr.bound is first
            model.rectifies = False
            found.append(ulr.backward(*batch()).outputs)
            assert (ulr.bound is first) is own_code
            model.rectifies = True
            ulr.backward(*batch())
            second, model.options["shift"] = ulr.bound, 1
            ulr.backward(*batch())
            assert (ulr.bound is second) is own_code
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_attributes_that_choose_nothing_leave_the_chain_as_it_is():
    torch.manual_seed(0)
    model = Own()
    with attach(model, seed=5) as ulr:
        ulr.backward(*batch(torch.float32))
        first, structure = ulr.bound, ulr.structure
        model.epoch = 1
        ulr.backward(*batch(torch.float32))
        assert isinstance(first.model, Chain) and ulr.bound is first and ulr.structure is structure


@pytest.mark.parametrize("kind", ["neuron", "container"])
def test_a_chain_ends_before_a_hook(kind):
    seen: list[Tensor] = []
    layers = [nn.Linear(5, 8), hidden_leaky(), nn.Sequential(nn.Linear(8, 6), hidden_leaky()), nn.Linear(6, 3)]
    hooked = layers[1] if kind == "neuron" else layers[2]
    hooked.register_forward_hook(lambda module, given, output: seen.append(output))
    engine = engine_of(nn.Sequential(*layers))
    assert seen and not any(bool(output.isnan().any()) for output in seen)
    if kind == "container":
        assert "0 -> 1," in engine.line()[0]


def test_what_changes_after_the_recorded_steps_keeps_the_models_own_code():
    class Trials(Own):
        def forward(self, x: Tensor) -> Any:
            mem, outputs = self.lif1.init_leaky(), []
            for t, step in enumerate(x):
                mem = self.lif1.init_leaky() if t == 36 else mem
                spikes, mem = self.lif1(self.fc1(step), mem)
                outputs.append(self.fc3(spikes))
                self.lif2(self.fc2(spikes))
            return torch.stack(outputs)

    torch.manual_seed(0)
    with attach(Trials(), seed=5) as ulr:
        ulr.backward(torch.rand(40, 4, 5), torch.arange(4) % 3)
    assert ulr.bound.model is ulr.model and "between two time steps" in ulr.bound.why


def test_a_chain_and_its_rest_go_on_for_many_time_steps():
    torch.manual_seed(0)
    x, y = torch.rand(40, 4, 5), torch.arange(4) % 3
    for model in (
        leaky(),
        LastMembrane(),
        nn.Sequential(nn.Linear(5, 8), spikingjelly("neuron").IFNode(step_mode="m")),
    ):
        with attach(model, seed=5) as ulr:
            ulr.backward(x, y)
        assert isinstance(ulr.bound.model, Chain), ulr.bound.why


def test_a_batch_norm_at_two_places_keeps_the_models_own_code():
    norm = nn.BatchNorm1d(5)
    engine = engine_of(nn.Sequential(norm, nn.Linear(5, 5), hidden_leaky(), norm, nn.Linear(5, 3)))
    assert engine.running is engine.model and "more than once in a time step" in engine.why


def test_a_neuron_that_begins_elsewhere_keeps_the_models_own_code():
    class Begins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lif, self.out = nn.Linear(5, 8), hidden_leaky(), nn.Linear(8, 3)
            self.before = nn.Parameter(torch.full((8,), -0.2))

        def forward(self, x: Tensor) -> Tensor:
            self.lif.mem = self.before.expand(x.shape[1], 8)
            return torch.stack([self.out(self.lif(self.fc(0.01 * step))) for step in x])

    torch.manual_seed(0)
    assert "does not begin at zero" in engine_of(Begins()).why


def test_threads_take_turns_with_a_model_whose_beginning_is_a_chain():
    torch.manual_seed(0)
    models = [Own(whole=False)]
    models.append(copy.deepcopy(models[0]))
    data, errors = [batch(torch.float32)] * 10, []

    def watch() -> None:
        try:
            for _ in range(6):
                evaluate(models[0], data[:1])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=watch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for model in models:
        train(model, data, epochs=2, progress=False, seed=0)
        for thread in threads:
            thread.join()
    assert not errors
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("x", [torch.rand(7, 1, 5), torch.rand(1, 6, 5), torch.rand(7, 6, 5).round().to_sparse()])
def test_of_one_sample_one_step_and_listed_events_a_rest_is_the_same(x):
    torch.manual_seed(0)
    model, y = Own(whole=False), torch.arange(x.shape[1]) % 3
    theirs = steps_of(copy.deepcopy(model), ULR(), (x, y), True)
    ours = steps_of(model, ULR(), (x, y), False)
    for a, b in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_rest_with_padding_is_the_same(double):
    torch.manual_seed(0)
    assert_same(Own(whole=False).double(), ULR(), batch(), 1e-9, lengths=torch.tensor([9, 3, 5, 1] * 4))


def test_a_rest_of_a_static_input_is_the_same(double):
    class Static(Own):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x.expand(6, *x.shape))

    torch.manual_seed(0)
    x, y = batch()
    assert_same(Static(whole=False).double(), ULR(), (x[0], y), 1e-9, attach={"layout": "B"})


@pytest.mark.parametrize("own_code", [True, False])
def test_a_layer_whose_spikes_nothing_reads_has_no_noise_when_the_model_is_observed_again(own_code):
    torch.manual_seed(0)
    model = Own(whole=False)
    model.lif2.reset_mechanism = "none"
    with attach(model, seed=5) as ulr:
        ulr.binder.own_code = own_code
        ulr.backward(*batch(torch.float32))
        assert ulr.structure.noiseless == {"lif2"}
        state = copy.deepcopy(ulr.state_dict())
        ulr.learner.observe_again()
        ulr.backward(*batch(torch.float32))
        assert ulr.structure.noiseless == ulr.learner.level.noiseless == {"lif2"}
        expected = ulr.backward(*batch(torch.float32)).outputs
    with attach(model, seed=5) as resumed:
        resumed.binder.own_code = own_code
        resumed.load_state_dict(state)
        resumed.backward(*batch(torch.float32))
        assert resumed.learner.level.noiseless == {"lif2"}
        torch.testing.assert_close(resumed.backward(*batch(torch.float32)).outputs, expected)


def test_a_change_of_threshold_in_a_forward_keeps_the_models_own_code():
    def adapts(model: Own, spikes: Tensor) -> None:
        model.lif1.threshold = model.lif1.threshold + 0.01 * spikes.detach().mean()

    engine = engine_of(Own(adapts, whole=False))
    assert engine.running is engine.model and "changes the threshold of lif1" in engine.why


def test_a_tail_keeps_no_tensors_of_the_recorded_pass():
    torch.manual_seed(0)
    chain = engine_of(Own(whole=False)).running
    kept = [each.tensor for part in chain.tail.parts for each in blanks(part.output)]
    assert kept and all(tensor.untyped_storage().nbytes() <= 8 for tensor in kept)


def blanks(tree: Any) -> list[Any]:
    return [tree] if isinstance(tree, Blank) else [each for item in tree for each in blanks(item)]


def test_what_runs_without_gradients_or_changes_them_keeps_the_models_own_code():
    class Halved(Own):
        def forward(self, x: Tensor) -> Any:
            outputs, one = [], self.lif1.init_leaky()
            for step in x:
                spikes, one = self.lif1(self.fc1(step), one)
                if spikes.requires_grad:
                    spikes.register_hook(lambda gradient: gradient / 2)
                outputs.append(self.fc3(spikes))
                self.lif2(self.fc2(spikes))
            return torch.stack(outputs)

    class Cut(Own):
        def forward(self, x: Tensor) -> Any:
            with torch.no_grad():
                current = torch.stack([self.fc1(step) for step in x])
            return torch.stack([self.fc3(self.lif1(now)[0] + 0 * self.lif2(now)[0]) for now in current])

    torch.manual_seed(0)
    for model in (Halved(), Cut()):
        engine = engine_of(model)
        assert engine.running is engine.model, engine.line()


def test_the_parts_of_torch_that_recordings_rely_on_exist():
    x = torch.rand(1, 1, 4, 4, requires_grad=True)
    assert [*MODULES] == [
        type(f(x).grad_fn).__name__
        for f in (lambda x: functional.max_pool2d(x, 2), lambda x: functional.avg_pool2d(x, 2), torch.relu)
    ]
    assert type(x.view(16).grad_fn).__name__ in VIEWS
    model = nn.Linear(2, 2)
    with Watched(model, lambda: True) as watched:
        float(torch.ones(()))
    assert watched.reads and not watched.writes
    with Watched(model, lambda: True) as watched, torch.no_grad():
        model.weight.data.clamp_(0)
    assert watched.writes and not watched.reads
    with Watched(model, lambda: True) as watched:
        torch.ones(2).numpy()
    assert watched.reads


# The beginning is a chain, and the model's own code runs the rest.
PARTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "membranes": (lambda: Loop(lambda: snntorch().Leaky(0.8), tail="membranes"), "fc1 -> lif1 -> fc2,"),
    "cut": (lambda: Between(lambda m, t, x: x.detach() + 0 * x), "fc1 -> lif1 -> fc2,"),
    "in place": (lambda: Between(lambda m, t, x: x.view_as(x).data.mul_(1) + x), "fc1 -> lif1 -> fc2,"),
    "turned round": (lambda: Between(lambda m, t, x: x.flip(1)), "fc1 -> lif1 -> fc2,"),
    "an earlier step": (lambda: Between(first_step_again), "fc1 -> lif1 -> fc2,"),
    "another neuron": (
        lambda: nn.Sequential(nn.Linear(5, 8), hidden_leaky(), nn.Linear(8, 6), alpha()),
        "0 -> 1 -> 2,",
    ),
    "a node with modules of its own": (lambda: jelly("LIFNode", v_reset=None, first="IFNode"), "0 -> 1 -> 2,"),
    "one module twice": (Twice, "conv1 -> pool -> lif1 -> conv2 -> lif2,"),
    "last membrane": (LastMembrane, "fc -> lif,"),
}  # fmt: skip


def hidden_leaky() -> nn.Module:
    return snntorch().Leaky(0.8, init_hidden=True)


def alpha() -> nn.Module:
    return snntorch().Alpha(0.9, 0.8, init_hidden=True)


@pytest.mark.product
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_is_a_chain_leaves_the_rest_as_it_is(name, estimator, double):
    torch.manual_seed(0)
    make, chain = PARTS[name]
    model = make().double()
    with attach(copy.deepcopy(model), seed=5) as ulr:
        torch.manual_seed(0)
        ulr.backward(*batch())
    assert chain in ulr.bound.describe()[0] and "then the model's own code (" in ulr.bound.describe()[0]
    assert_same(model, estimator, batch(), 1e-9)
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_a_rest_that_needs_more_of_the_chain_keeps_the_models_own_code():
    class Residual(Loop):
        def between(self, t: int, current: Tensor) -> Tensor:
            return current + self.lif1.mem

    torch.manual_seed(0)
    engine = engine_of(Residual(lambda: snntorch().Leaky(0.8)))
    assert engine.running is engine.model and "lif2 reads something else" in engine.why
    hidden_from_the_graph = Between(lambda m, t, x: x + m.lif1.mem.detach())
    engine = engine_of(hidden_from_the_graph)
    assert engine.running is engine.model and "lif2 reads something else" in engine.why


def test_a_rest_that_skips_time_steps_later_is_refused():
    skip = [0]

    class Skips(Loop):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x[: len(x) - skip[0]])[1]

    torch.manual_seed(0)
    model = Skips(lambda: snntorch().Leaky(0.8))
    with attach(model, loss="ce_rate", seed=5) as ulr:
        ulr.backward(*batch(torch.float32))
        assert isinstance(ulr.bound.model, Chain)
        skip[0] = 2
        with pytest.raises(UsageError, match="fewer times than there are time steps"):
            ulr.backward(*batch(torch.float32))


def engine_of(model: nn.Module, estimator: ULR | None = None) -> Any:
    with attach(model, estimator, seed=5) as ulr:
        ulr.backward(*batch(torch.float32))
    bound = ulr.bound
    return SimpleNamespace(running=bound.model, model=model, why=bound.why, line=bound.describe)


@pytest.mark.parametrize("count", [None, 120], ids=["as many steps as come", "120"])
def test_of_long_sequences_a_part_is_recorded_where_the_model_takes_it(count):
    """So that what is kept in chunks of time takes no more memory for more of it."""

    class Long(Loop):
        seen: ClassVar[list[tuple[int, int]]] = []

        def forward(self, x: Tensor) -> Any:
            if count not in (None, len(x)):
                raise ValueError(f"{count} time steps")
            self.seen.append((x.shape[1], len(x)))
            return super().forward(x)

    snn, x, y = snntorch(), torch.rand(120, 4, 5), torch.arange(4) % 3
    model = Long(lambda: snn.Leaky(0.8))
    with attach(model, ULR(memory="replay")) as ulr:
        ulr.backward(x, y)
    assert ulr.bound.model is not model
    assert max(steps for samples, steps in model.seen if samples == 3) == (96 if count is None else 120)


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_runs_by_its_own_code_with_the_reason(name):
    torch.manual_seed(0)
    make, why = REFUSED[name]
    engine = engine_of(make())
    assert engine.running is engine.model
    assert re.search(why, engine.why), engine.why
    assert engine.line() == [f"engine: the model's own code, as it is ({engine.why})"]


def test_a_state_that_begins_elsewhere_or_is_set_anew_is_found():
    snn = snntorch()

    class Set(nn.Module):
        def __init__(self, first: float, at: int) -> None:
            super().__init__()
            self.fc, self.lif, self.first, self.at = nn.Linear(5, 3), snn.Leaky(0.8), first, at

        def forward(self, x: Tensor) -> Tensor:
            mem, outputs = torch.full((x.shape[1], 3), self.first), []
            for t, step in enumerate(x):
                mem = torch.zeros_like(mem) if t == self.at else mem
                spk, mem = self.lif(self.fc(step), mem)
                outputs.append(spk)
            return torch.stack(outputs)

    torch.manual_seed(0)
    assert "does not begin at zero" in engine_of(Set(0.5, -1)).why
    assert "is changed between two time steps" in engine_of(Set(0.0, 4)).why
    assert not engine_of(Set(0.0, -1)).why


def test_noise_on_a_current_keeps_the_models_own_code():
    engine = engine_of(leaky(), ULR(noise={"fc2": CurrentNoise()}, credit="global"))
    assert engine.why == "there is noise of its own at fc2"


# -- wrong equations are found by the recogniser -----------------------------------------------------------------------


def wrong(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model, and what the neurons put in place of its own are made with."""
    if name == "reset at once":
        return leaky(reset_delay=False), {"reset": "subtract"}
    if name == "another reset":
        return leaky(), {"reset": "zero"}
    if name == "no reset":
        return leaky(reset_mechanism="zero"), {"reset": "none"}
    if name == "recurrent reset to zero":
        return recurrent(reset_mechanism="zero"), {"reset": "zero"}
    if name == "leak not clamped":
        return Loop(lambda: snntorch().Leaky(1.3)), {"reset": "subtract", "beta": torch.tensor(0.9)}
    if name == "another threshold":
        return leaky(), {"reset": "subtract", "threshold": torch.tensor(0.9)}
    if name == "soft reset that leaks":
        values = {"beta": torch.tensor(0.5), "threshold": torch.tensor(1.0)}
        return jelly("LIFNode", v_reset=None, decay_input=False), {"reset": "subtract", **values}
    values = {"beta": torch.tensor(0.5), "threshold": torch.tensor(1.0)}
    return jelly("LIFNode"), {"reset": "zero", **values}


@pytest.mark.parametrize(
    "name",
    ["reset at once", "another reset", "no reset", "recurrent reset to zero", "leak not clamped", "another threshold",
     "soft reset that leaks", "input not scaled"],
)  # fmt: skip
def test_a_wrong_equivalence_is_found(name, monkeypatch):
    torch.manual_seed(0)
    model, options = wrong(name)
    firing = next(neuron for module in model.modules() if (neuron := adapt(module, "")) is not None)
    before = type(firing).ours

    def ours(neuron: Any, like: Tensor) -> Any:
        found = before(neuron, like)
        recurrent = None if isinstance(found, str) else found[1].recurrent
        values = {name: value for name, value in options.items() if name != "reset"}
        return [], LIF.sharing(neuron.module, options["reset"], recurrent, **values)

    monkeypatch.setattr(type(firing), "ours", ours)
    engine = engine_of(model)
    assert engine.running is model and "fires otherwise than LIF" in engine.why


# -- the model stays what it is --------------------------------------------------------------------------------


def test_training_is_the_same_and_leaves_the_model_as_it_was(monkeypatch):
    torch.manual_seed(0)
    model = leaky(learn_beta=True)
    keys, modules, attributes = list(model.state_dict()), list(model.modules()), dict(model.lif1.__dict__)
    other, data = copy.deepcopy(model), [batch(torch.float32)]
    train(model, data, 10, seed=0, progress=False)
    own = classmethod(lambda cls, model, batch, noise, own_code, plain: of(model, batch, noise, own_code=True))
    of = BoundModel.of
    monkeypatch.setattr(BoundModel, "of", own)
    train(other, data, 10, seed=0, progress=False)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert list(model.state_dict()) == keys and list(model.modules()) == modules
    assert all(model.lif1.__dict__[name] is value for name, value in attributes.items())
    copy.deepcopy(model)


def test_what_is_replaced_after_attaching_is_noticed(double):
    """Parameters, modules, options, and modes; compared with an attachment that began with them."""
    torch.manual_seed(0)
    model, snn = leaky(learn_beta=True).double(), snntorch()

    def replace_parameter() -> None:
        model.fc1.weight = nn.Parameter(model.fc1.weight.detach() * 0.5)
        model.lif1.beta = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def replace_module() -> None:
        model.fc2 = nn.Linear(8, 8).double()
        model.lif2 = snn.Leaky(0.6).double()

    def change_option() -> None:
        model.lif1 = snn.Leaky(0.6, reset_delay=False).double()

    scale = Logistic(0.3)  # fixed: a level that is measured once stays
    with attach(model, ULR(credit="global", firing=scale), seed=5) as ulr:
        for change, chain in ((replace_parameter, True), (replace_module, True), (change_option, False)):
            ulr.backward(*batch())
            change()
            model.zero_grad()
            ulr.learner.mean_loss = None
            ulr.backward(*batch())
            found = [q.grad.clone() for q in model.parameters()]
            assert isinstance(ulr.bound.model, Chain) is chain
            model.zero_grad()
            with attach(model, ULR(credit="global", firing=scale), seed=5) as fresh:
                fresh.binder.own_code, fresh.learner.step = True, ulr.learner.step - 1
                fresh.backward(*batch())
            torch.testing.assert_close(found, [q.grad for q in model.parameters()], rtol=1e-9, atol=1e-12)


def test_plan_says_which_code_runs():
    torch.manual_seed(0)
    lines = plan(leaky(), batch(torch.float32)).engine
    assert lines[0] == "engine: runs as a chain fc1 -> lif1 -> fc2 -> lif2 -> fc3, neurons as scans over time"
    lines = plan(leaky(reset_delay=False), batch(torch.float32)).engine
    assert lines[0].startswith("engine: the model's own code, as it is (lif1 (Leaky): it resets at once")
    own = nn.Sequential(nn.Linear(5, 8), LIF(), nn.Linear(8, 3))
    assert not any(line.startswith("engine") for line in plan(own, batch(torch.float32)).engine)


def test_lists_of_events_and_frames_are_the_same():
    torch.manual_seed(0)
    model = leaky()
    x, y = batch(torch.float32)
    frames = steps_of(copy.deepcopy(model), ULR(), (x, y), False)
    lists = steps_of(model, ULR(), (x.to_sparse_coo(), y), False)
    for name, found in frames[1].items():
        torch.testing.assert_close(lists[1][name], found, rtol=1e-4, atol=1e-6)


def test_autocast_does_not_keep_a_chain_from_being_seen():
    torch.manual_seed(0)
    model, data = leaky(), batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        steps_of(model, ULR(), data, False)


# -- evaluation ------------------------------------------------------------------------------------------------


def watched(monkeypatch) -> list[nn.Module]:
    """Gets the models that run, in their order."""
    ran: list[nn.Module] = []
    own = BoundModel.outputs

    def outputs(self: BoundModel, *about: Any, **named: Any) -> Any:
        ran.append(self.model)
        return own(self, *about, **named)

    monkeypatch.setattr(BoundModel, "outputs", outputs)
    return ran


@pytest.mark.parametrize("make", [leaky, lambda: jelly("LIFNode", "m")], ids=["snnTorch", "SpikingJelly"])
def test_evaluation_runs_on_scans_and_gives_the_models_own_outputs(make, monkeypatch):
    torch.manual_seed(0)
    model, (x, y) = make(), batch(torch.float32)
    ran = watched(monkeypatch)
    measured = evaluate(model, [(x, y), (x[:, :3], y[:3])], device="cpu")
    assert isinstance(ran[-1], Chain)
    with torch.no_grad():
        outputs = model_outputs(model.eval(), x)
    rows = torch.cat([outputs, outputs[:, :3]], 1).sum(0)
    expected = nn.functional.cross_entropy(rows, torch.cat([y, y[:3]]))
    assert measured["loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_evaluation_does_not_run_on_scans_that_round_otherwise(monkeypatch):
    torch.manual_seed(0)
    model, (x, y) = leaky(), batch(torch.float32)
    chain = Chain.forward
    monkeypatch.setattr(Chain, "forward", lambda self, x: chain(self, x) * (1 + 1e-6))
    ran = watched(monkeypatch)
    evaluate(model, [(x, y)], device="cpu")
    assert isinstance(ran[0], Chain) and ran[-1] is model


def wide(library: str) -> nn.Module:
    """A model so wide that a product of all time steps rounds otherwise in bfloat16 than one of a single step."""
    if library == "SpikingJelly":
        model = jelly("LIFNode", "m")
        model[0], model[2], model[4] = nn.Linear(128, 200), nn.Linear(200, 64), nn.Linear(64, 3)
        return model
    model = Loop(lambda: snntorch().Leaky(beta=0.9))
    model.fc1, model.fc2, model.fc3 = nn.Linear(128, 200), nn.Linear(200, 64), nn.Linear(64, 3)
    return model


@pytest.mark.parametrize("library", ["snnTorch", "SpikingJelly"])
def test_evaluation_in_bfloat16_gives_the_models_own_outputs(library):
    torch.manual_seed(0)
    model, x, y = wide(library), 2 * torch.rand(20, 64, 128), torch.arange(64) % 3
    found = evaluate(model, [(x, y)], device="cpu", autocast=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = model_outputs(model.eval(), x)
    expected = nn.functional.cross_entropy(outputs.float().sum(0), y)
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-6)


class OtherWeights(nn.Module):
    """Runs a network with other weights than its own, which are the same at the start."""

    def __init__(self, how: str) -> None:
        super().__init__()
        snntorch = library_of("snntorch")
        self.net, self.how = nn.ModuleList([nn.Linear(4, 6), snntorch.Leaky(0.9)]), how
        self.out, self.delta = nn.Linear(6, 3), nn.Parameter(torch.zeros(6, 4))
        if how == "attribute":
            self.base = nn.Parameter(self.net[0].weight.detach().clone())
            del self.net[0].weight

    def forward(self, x: Tensor) -> Tensor:
        linear, neuron = self.net
        state, outputs = neuron.init_leaky(), []
        if self.how == "attribute":
            linear.weight = self.base + self.delta
        weights = {"weight": self.delta + (0 if self.how == "attribute" else linear.weight)}
        for step in x:
            current = linear(step) if self.how == "attribute" else functional_call(linear, weights, (step,))
            spikes, state = neuron(current, state)
            outputs.append(self.out(spikes))
        return torch.stack(outputs)


@pytest.mark.parametrize("how", ["functional_call", "attribute"])
def test_other_parameters_than_a_modules_own_keep_the_models_own_code(how):
    torch.manual_seed(0)
    model, (x, y) = OtherWeights(how), ((torch.rand(7, 5, 4) > 0.5).float(), torch.arange(5) % 3)
    assert any("parameter" in line for line in plan(model, (x, y)).engine)
    with attach(model, seed=0) as ulr:
        for _ in range(3):
            ulr.backward(x, y)
    assert model.delta.grad.any()


# -- weights that hooks make anew


class Recurrent(nn.Module):
    """A recurrent layer of snnTorch, in a loop over time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.readout = nn.Linear(5, 7), nn.Linear(7, 3)
        self.lif = library_of("snntorch").RLeaky(0.9, linear_features=7)

    def forward(self, x: Tensor) -> Tensor:
        (spikes, mem), outputs = self.lif.init_rleaky(), []
        for now in x:
            spikes, mem = self.lif(self.enter(now), spikes, mem)
            outputs.append(self.readout(spikes))
        return torch.stack(outputs)


def own_recurrent() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), RecurrentLIF(7), nn.Linear(7, 3))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("make, name", [(own_recurrent, "1.recurrent"), (Recurrent, "lif.recurrent")])
@pytest.mark.parametrize("change", [partial(prune.l1_unstructured, amount=0.5), nn.utils.weight_norm])
def test_recurrent_weights_that_hooks_make_anew_are_trained(make, name, change):
    x, y = 2 * torch.rand(9, 6, 5, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3
    plain, model = make(), make()
    layer, held = model.get_submodule(name), plain.get_submodule(name)
    change(layer, "weight")
    held.weight.data.copy_(layer.weight.detach())
    layer(torch.zeros(0, 7))
    for each in (plain, model):
        attach(each, seed=0).backward(x, y)
    parts = {q: p for q, p in layer.named_parameters() if q.startswith("weight")}
    layer(torch.zeros(0, 7))
    expected = torch.autograd.grad(layer.weight, list(parts.values()), held.weight.grad)
    for part, gradient in zip(parts.values(), expected, strict=True):
        torch.testing.assert_close(part.grad, gradient, rtol=1e-4, atol=1e-6)
    before = layer.weight.detach().clone()
    loss = train(model, [(x, y)] * 3, 1, device="cpu", progress=False, val_loader=[(x, y)]).history[0]["val_loss"]
    with torch.no_grad():
        outputs = model.eval()(x).sum(0)
        layer(torch.zeros(0, 7))
    assert loss == pytest.approx(functional.cross_entropy(outputs, y).item())
    assert not torch.equal(layer.weight, before)


def test_a_hook_inside_a_neuron_is_called():
    model, calls = Recurrent(), []
    model.lif.recurrent.register_forward_hook(lambda *_: calls.append(1))
    x, y = torch.rand(9, 6, 5), torch.arange(6) % 3
    attach(model).backward(x, y)
    calls.clear()
    attach(model).backward(x, y)
    assert calls and "hooks" in plan(model, (x, y)).engine[0]
