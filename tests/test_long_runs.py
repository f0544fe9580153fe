"""Numbers that grow: counts of steps, seeds, sizes of arrays beyond 32 bits, and means over many steps."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import ulr_snn
from benchmarks import soak
from tests.helpers import batches, net, train
from ulr_snn import ULR, data, evaluate
from ulr_snn.credit.baseline import moving
from ulr_snn.kernels import dispatch, sparse
from ulr_snn.kernels.state import Draw, State
from ulr_snn.losses.metrics import Tally
from ulr_snn.noise.random import Noise

KINDS = [
    name if name in ("dense", "online", "weight noise") else pytest.param(name, marks=pytest.mark.slow)
    for name, kind in soak.KINDS.items()
    if not kind.workers
]
STEPS = [2**31 - 1, 2**32, 2**53 + 1, 2**63]


# -- steps and seeds ---------------------------------------------------------------------------------------


def steps(name: str, first: int, count: int = 2) -> tuple[list[Tensor], dict[str, Any]]:
    """Gradients after some training steps from this number on, and the attachment's state."""
    kind, model = soak.KINDS[name], soak.KINDS[name].model()
    options = {"loss": soak.loss_of(name), "total_steps": 2**64}
    with ulr_snn.attach(model, kind.options.get("estimator"), **options) as ulr:
        x, y = soak.batches(1)[0]
        ulr.backward(x[:, :8], y[:8])
        ulr.learner.step = first
        model.zero_grad()
        for _ in range(count):
            ulr.backward(x[:, :8], y[:8])
        return [q.grad for q in model.parameters()], ulr.state_dict()


@pytest.mark.parametrize("name", KINDS)
def test_steps_beyond_32_bits(name):
    seen = []
    for first in STEPS:
        gradients, state = steps(name, first)
        assert state["step"] == first + 2
        assert all(bool(g.isfinite().all()) for g in gradients)
        seen.append(torch.cat([g.flatten() for g in gradients]))
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])  # each with noise of its own


@pytest.mark.parametrize("seed", [2**64 - 1, 2**70, -3])
def test_seeds_of_any_size(seed):
    train(estimator=ULR(maps="learned"), seed=seed)
    evaluate(net(), batches(), "stochastic", seed=seed, device="cpu")
    ulr_snn.compare(net(), batches(16), batches(16), ("ulr",), 1, seed=seed, progress=False)
    train_set, _ = data.load("dynamics/lorenz", samples=8, seconds=0.5)
    assert len(list(data.loader(train_set, 4, shuffle=True, seed=seed))) == 2


def test_noise_of_steps_is_independent_beyond_32_bits():
    sample = torch.arange(64, dtype=torch.int32)
    draws = [
        Noise(0, step, sample, torch.zeros_like(sample)).uniform(0, 0, 20, torch.Size([50]), torch.float32)
        for step in (0, 1, 2**31, 2**32, 2**32 + 1, 2**63)
    ]
    for i, a in enumerate(draws):
        assert abs(float(a.mean()) - 0.5) < 4 / math.sqrt(12 * a.numel())
        for b in draws[:i]:
            assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 4 / math.sqrt(a.numel())


# -- arrays ------------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """Makes float32 tensors of zeros in sparse files, which take no memory where nothing is written. Kernels run on the
    last row alone."""

    def zeros(*shape: int, last: bool = False) -> Tensor:
        assert not last, "these tests have no pictures with channels last"
        if math.prod(shape) < 1 << 20:
            return torch.zeros(shape)
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.bin"
        return torch.from_numpy(numpy.memmap(path, numpy.float32, "w+", shape=shape))

    shared = lambda rows, work: work(rows - 1 if rows > 1 << 20 else 0, rows)  # noqa: E731
    for module in (dispatch, sparse):
        monkeypatch.setattr(module, "empty", zeros)
        monkeypatch.setattr(module, "shared", shared)
    return zeros


def last(x: Tensor) -> Tensor:
    """A copy of the last row of a sequence [T, B, ...], as a sequence of one row."""
    return x[:, -1:].clone()


@pytest.mark.slow
def test_scans_of_more_than_2_31_numbers(large):
    steps, neurons = 2, 256
    rows = 2**31 // (steps * neurons) + 2
    draw = torch.Generator().manual_seed(0)
    weight, beta, one, scale = (
        torch.randn(neurons, neurons, generator=draw) / 8,
        torch.tensor(0.9),
        torch.tensor(1.0),
        torch.tensor(0.3),
    )
    current, a = large(steps, rows, neurons), large(steps, rows, neurons)
    assert current.numel() > 2**31
    current[:, -1] = 2 * torch.rand(steps, neurons, generator=draw)
    a[:, -1] = torch.randn(steps, neurons, generator=draw)
    words = tuple(torch.randint(-(2**31), 2**31, (steps, rows), generator=draw).int() for _ in range(2))
    state = State(large(rows, neurons), large(rows, neurons))
    found = dispatch.scan(current, weight, beta, one, "zero", Draw("logistic", scale, words, None), None, state)
    few = Draw("logistic", scale, tuple(word[:, -1:].contiguous() for word in words), None)
    wanted = dispatch.scan(last(current), weight, beta, one, "zero", few, None)
    assert 0 < wanted[0].mean() < 1
    assert all(torch.equal(last(f), w) for f, w in zip(found, wanted, strict=True))
    spikes, x, _ = found
    assert torch.equal(
        last(dispatch.slopes(x, "logistic", scale, None)), dispatch.slopes(last(x), "logistic", scale, None)
    )
    options = beta, one, "zero"
    total, g = dispatch.credit(
        a, x, "logistic", scale, None, spikes, *options, large(rows, neurons), True, weight=weight
    )
    alone = dispatch.credit(
        last(a), last(x), "logistic", scale, None, last(spikes), *options, torch.zeros(1, neurons), True, weight=weight
    )
    assert torch.equal(last(total), alone[0]) and torch.equal(last(g), alone[1]) and bool(alone[1].any())
    assert torch.equal(
        last(dispatch.leaky(a, spikes, beta, "zero")), dispatch.leaky(last(a), last(spikes), beta, "zero")
    )


@pytest.mark.slow
def test_sparse_layers_with_more_than_2_31_outputs(large):
    rows, inputs, outputs = 2**22 + 1, 36, 512
    draw = torch.Generator().manual_seed(0)
    places, values = torch.tensor([1, 8, 30], dtype=torch.int32), torch.tensor([1.0, 2.0, 1.0])
    starts = torch.zeros(rows + 1, dtype=torch.int64)
    starts[-1] = 3
    events = sparse.Rows(starts, places, values, inputs)
    frame = torch.zeros(1, inputs).index_put_((torch.zeros(3, dtype=torch.long), places.long()), values)
    weight, bias = torch.randn(outputs, inputs, generator=draw), torch.randn(outputs, generator=draw)
    found = sparse.gathered(events, weight, bias)
    assert found.numel() > 2**31
    assert torch.allclose(found[-1:], frame @ weight.T + bias, atol=1e-6)
    kernel = torch.randn(32, 1, 3, 3, generator=draw)
    pictures = sparse.convolution(torch.Size([1, 6, 6]), events, kernel, None)
    assert pictures is not None and pictures.numel() > 2**31
    assert torch.allclose(pictures[-1:], torch.conv2d(frame.view(1, 1, 6, 6), kernel), atol=1e-6)


# -- means -------------------------------------------------------------------------------------------------


def test_running_means_over_many_steps_do_not_drift():
    draw, tally = random.Random(0), Tally()
    batch = SimpleNamespace(objective=SimpleNamespace(of_labelled=False))
    losses = [draw.uniform(0.9, 1.1) for _ in range(10_000)]
    mean = None
    for loss in losses:
        tally.add(torch.full((64,), loss, dtype=torch.float64), torch.empty(0), batch, None)
        mean = moving(mean, torch.tensor([[1.7]]))
    assert tally.running()["loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-12)
    assert float(mean) == pytest.approx(1.7, rel=1e-6)
