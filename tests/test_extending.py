"""Everything that docs/extending.md walks through is added from outside, and nothing in the package is touched."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ulr_snn
from ulr_snn import LIF, ULR, Estimate, Logistic, TimeAverage, WeightNoise, adapters, data, losses, peers
from ulr_snn.adapters import Adapter, StepNeuron
from ulr_snn.data.binning import Recordings, bin_recordings
from ulr_snn.data.cache import BinnedSplits
from ulr_snn.model.call import model_outputs
from ulr_snn.noise.firing import Firing
from ulr_snn.peers.attachment import PeerAttachment

STEPS, BATCH, INPUTS, CLASSES = 8, 48, 6, 3


def batch() -> tuple[Tensor, Tensor]:
    """Events whose most active input pair is the class."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(BATCH) % CLASSES
    rates = 0.2 + 0.6 * torch.nn.functional.one_hot(y, CLASSES).repeat_interleave(2, 1)
    return (torch.rand(STEPS, BATCH, INPUTS, generator=generator) < rates).float(), y


def net(neuron: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(INPUTS, 16), neuron or LIF(), TimeAverage(), nn.Linear(16, CLASSES))


def learns(model: nn.Module, **options: object) -> bool:
    """Whether training lowers the loss by a third."""
    loss = options.get("loss", "ce_count")
    before = ulr_snn.evaluate(model, [batch()], loss=loss, device="cpu")["loss"]
    ulr_snn.train(model, [batch()] * 10, 4, device="cpu", progress=False, **options)
    return ulr_snn.evaluate(model, [batch()], loss=loss, device="cpu")["loss"] < 2 / 3 * before


# -- an adapter --------------------------------------------------------------------------------------------------


class Leaky(nn.Module):
    """A neuron of a library of somebody's: runs a time step a call, and decides on a spike in `self.fires`."""

    def __init__(self, decay: float = 0.9, v_threshold: float = 1.0) -> None:
        super().__init__()
        self.decay, self.v_threshold, self.v, self.spikes = decay, v_threshold, None, None

    @staticmethod
    def fires(drive: Tensor) -> Tensor:
        return (drive > 0).to(drive.dtype)

    def forward(self, current: Tensor) -> Tensor:
        if self.v is None:
            self.v = current
        else:
            self.v = self.decay * self.v + current - self.spikes * self.v_threshold
        self.spikes = self.fires(self.v - self.v_threshold)
        return self.spikes


class Neuron(StepNeuron):
    """`Leaky` as a site needs it."""

    @property
    def threshold(self) -> Tensor:
        return torch.tensor(self.module.v_threshold)

    def clear(self) -> None:
        self.module.v = None

    def patches(self, site: adapters.Step) -> dict[str, object]:
        def forward(current: Tensor) -> Tensor:
            site.begin(current)
            spikes = Leaky.forward(self.module, current)
            site.end([self.module.v])
            return spikes

        return {"forward": forward, "fires": site.fire}


class NumberAsThreshold(Neuron):
    """An adapter that is wrong."""

    threshold = 1.0


@pytest.fixture
def library(monkeypatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "toyspikes", ModuleType("toyspikes"))
    monkeypatch.setattr(Leaky, "__module__", "toyspikes.neurons")
    monkeypatch.setattr(adapters, "_adapters", dict(adapters._adapters))
    adapters.register("toyspikes", Adapter(lambda module: Neuron(module) if isinstance(module, Leaky) else None))
    yield
    adapters.library_of.cache_clear()


def test_a_threshold_that_is_no_tensor_is_an_error(library):
    adapters.register(
        "toyspikes", Adapter(lambda module: NumberAsThreshold(module) if isinstance(module, Leaky) else None)
    )
    with pytest.raises(ulr_snn.UsageError, match="gives neuron a float as threshold; it must be a tensor"):
        ulr_snn.plan(Loop(), batch())


class Loop(nn.Module):
    """A time loop, as people write it. change: adds a step to the state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc, self.neuron, self.out = nn.Linear(INPUTS, 16), Leaky(), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        self.neuron.v = None
        return torch.stack([self.out(self.neuron(self.fc(step))) for step in x])


def test_an_adapter(library):
    model, (x, y) = Loop(), batch()
    own = nn.Sequential(model.fc, LIF(0.9), model.out)
    found = []
    for one in (model, own):  # the same noise, the same gradient as our own neuron of these equations
        one.zero_grad()
        with ulr_snn.attach(one, ULR(firing=Logistic(0.3)), seed=3) as ulr:
            ulr.backward(x, y)
        found.append([q.grad.clone() for q in own.parameters()])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)
    assert "site neuron" in str(ulr_snn.plan(model, (x, y)))
    assert learns(model) and model.neuron.fires is Leaky.fires
    with torch.no_grad():
        outputs = model(x)
    measured = ulr_snn.evaluate(model, [(x, y)], device="cpu")["loss"]
    assert measured == pytest.approx(nn.functional.cross_entropy(outputs.sum(0), y).item(), rel=1e-5)


# -- sites: noise of one's own -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Laplace(Firing):
    """Laplace threshold noise: the firing site with another law."""

    def probability(self, x: Tensor) -> Tensor:
        return torch.where(x < 0, 0.5 * x.exp().clamp(max=1), 1 - 0.5 * (-x).exp().clamp(max=1))

    def slope(self, x: Tensor) -> Tensor:
        return 0.5 * (-x.abs()).exp()

    def score(self, spikes: Tensor, x: Tensor) -> Tensor:
        p = self.probability(x).clamp(1e-6, 1 - 1e-6)
        return (spikes - p) * self.slope(x) / (p * (1 - p))


@dataclass(frozen=True)
class SparseNoise(WeightNoise):
    """Noise on a tenth of a parameter's entries: a weight site with draws of its own."""

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        chosen = torch.rand(shape, generator=generator, dtype=torch.float64) < 0.1
        return chosen * super().draw(shape, generator) * 10**0.5


def test_a_firing_site():
    model = net()
    assert learns(model, estimator=ULR(firing=Laplace(start=0.1)))
    assert "laplace" in str(ulr_snn.plan(model, batch(), ULR(firing=Laplace())))


def test_a_weight_site():
    x, y = batch()
    model, estimator = net(), ULR(noise={"3.weight": SparseNoise()}, copies=4)
    with ulr_snn.attach(model, estimator, seed=0) as ulr:
        ulr.backward(x, y)
    assert 0 < (model[3].weight.grad != 0).float().mean() < 0.3  # of two draws


# -- an estimator, a loss, a data set, a peer ----------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Finite differences along the last layer's parameters: exact there, and nothing elsewhere."""

    size: float = 1e-3

    def attach(self, model, loss, seed, interface, total_steps=None, *, progress=None, rates=False):
        return DifferenceAttachment(model, self, loss, interface)


class DifferenceAttachment(PeerAttachment):
    @torch.no_grad()
    def backward(self, x, targets, loss=None, lengths=None) -> Estimate:
        _, given = self.begun(x, targets, loss, lengths)
        *_, parameter = self.model.parameters()
        outputs = model_outputs(self.model, given.x)
        value, parameter.grad = given.objective(outputs, given.targets), torch.zeros_like(parameter)
        for i in range(parameter.numel()):
            parameter.view(-1)[i] += self.peer.size
            moved = given.objective(model_outputs(self.model, given.x), given.targets)
            parameter.view(-1)[i] -= self.peer.size
            parameter.grad.view(-1)[i] = (moved - value).mean() / self.peer.size
        self.counted(value, (1 + parameter.numel()) * given.samples)
        return Estimate(value, outputs[None], {"copies": 1, "step": self.step}, given)


def margin(outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Hinge loss of the outputs summed over time, [B]."""
    totals = losses.named.total(outputs, mask)
    target = totals.gather(1, targets[:, None])
    others = totals.scatter(1, targets[:, None], float("-inf")).amax(1, keepdim=True)
    return (1 + others - target).clamp(min=0)[:, 0]


def test_an_estimator():
    model = net()
    with Difference().attach(model, "ce_count", 0, True) as attached:
        attached.backward(*batch())
    found, (x, y) = model[3].bias.grad.clone(), batch()
    nn.functional.cross_entropy(model_outputs(model, x), y).backward()
    torch.testing.assert_close(found, model[3].bias.grad - found, rtol=0.05, atol=1e-3)  # autograd adds to it
    result = ulr_snn.train(net(), [batch()] * 3, 1, estimator=Difference(), device="cpu", progress=False)
    assert result.metrics["forward_passes"] == 3 * BATCH * (1 + CLASSES)


def test_a_loss(monkeypatch):
    monkeypatch.setattr(losses.named, "LOSSES", dict(losses.LOSSES))
    losses.register("margin", losses.NamedLoss(margin))
    assert learns(net(), loss="margin")
    with pytest.raises(ulr_snn.UsageError, match="labels go from"):
        ulr_snn.plan(net(), (batch()[0], torch.full((BATCH,), 7)), loss="margin")


def test_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(data.registry, "ENTRIES", dict(data.registry.ENTRIES))
    events = np.arange(0, 100_000, 10_000)

    def find(root):
        def build(bins, width):
            part = Recordings(np.tile(events, 6), np.arange(60) % INPUTS, np.arange(0, 61, 10), np.arange(6))
            train, test = (bin_recordings([part], INPUTS, bins, width) for _ in range(2))
            return BinnedSplits(train, test, (INPUTS,), 6)

        return data.Source(str(root), "version 1", build)

    data.register("ticks", data.Entry(span_us=100_000, bin_us=10_000, find=find))
    train, test = data.load("ticks", tmp_path, cache_dir=tmp_path)
    assert len(train) == len(test) == 6 and train.classes == 6
    x, _ = next(iter(data.loader(train, batch_size=6)))
    assert tuple(x.shape) == (10, 6, INPUTS) and x.sum() == 60


def test_a_data_set_of_events(tmp_path, monkeypatch):
    monkeypatch.setattr(data.registry, "ENTRIES", dict(data.registry.ENTRIES))
    events = Recordings(np.arange(0, 60_000, 1_000), np.arange(60) % 8, np.arange(0, 61, 10), np.arange(6) % 3)

    def find(root):
        return data.Recorded(
            str(root), "version 1", lambda: data.Raw((2, 2, 2), None, {"train": [events], "test": [events]})
        )

    data.register("blinks", data.Entry(span_us=100_000, bin_us=10_000, find=find))
    arguments = {"polarity": "merged", "downsample": 2, "augment": data.Augmentation(shift=0), "validation": 0.5}
    train, validation, test = data.load("blinks", tmp_path, cache_dir=tmp_path, **arguments)
    assert (len(train), len(validation), len(test)) == (3, 3, 6) and train.classes == 3
    x, _ = next(iter(data.loader(test, batch_size=6)))
    assert tuple(x.shape) == (10, 6, 1, 1, 1) and x.sum() == 60


def test_a_peer(monkeypatch):
    monkeypatch.setitem(peers.METHODS, "difference", Difference)
    found = ulr_snn.compare(net(), [batch()] * 3, [batch()], ("ulr", "difference"), epochs=1, progress=False)
    assert [row["method"] for row in found.rows] == ["ulr", "difference"]
