"""Sparse events: the same numbers as the frames that they stand for, whatever a model does with them."""

import pytest
import torch
from torch import Tensor, nn

from ulr_snn import LIF, TimeAverage, attach
from ulr_snn.events import DENSITY, SMALLEST, Events

pytest.importorskip("numba", reason="sparse events are read by numba's kernels")

SHAPE = (8, 16, 2, 20, 20)  # [T, B, ...]


def frames_of(dtype: torch.dtype = torch.uint8, density: float = 0.02) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(SHAPE, generator=generator) < density
    sizes = torch.randint(1, 4, SHAPE, generator=generator) if dtype != torch.bool else 1
    return (active * sizes).to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("outputs", [1, 7, 32])
def test_a_linear_layer_gives_what_it_gives_for_frames(dtype, bias, outputs):
    torch.manual_seed(0)
    frames = frames_of(dtype)
    frames[2, 3] = 0  # rows without an event, at the end as well
    frames[-1, -1] = 0
    model = nn.Sequential(nn.Flatten(2), nn.Linear(800, outputs, bias))
    found = []
    for x in (Events.of(frames, torch.float32), frames.float()):
        model.zero_grad()
        y = model(x)
        assert y.shape == (8, 16, outputs) and type(y) is Tensor
        y.square().sum().backward()
        found.append([y.detach(), *(q.grad for q in model.parameters())])
    assert isinstance(Events.of(frames, torch.float32), Events)
    for ours, other in zip(*found, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-4)


def test_dense_frames_small_ones_and_other_types_stay_what_they_are():
    assert type(Events.of(frames_of(density=2 * DENSITY), torch.float32)) is Tensor
    assert type(Events.of(frames_of(), torch.float64)) is Tensor
    small = frames_of()[:1, :1]
    assert small.numel() < SMALLEST and type(Events.of(small, torch.float32)) is Tensor


OPERATIONS = {
    "sum": lambda x: x.sum(0),
    "product": lambda x: 2 * x + 1,
    "a step": lambda x: x[3],
    "part": lambda x: x[:, :2],
    "transpose": lambda x: x.transpose(0, 1),
    "stack": lambda x: torch.stack([x, x]),
    "repeat": lambda x: x.repeat(1, 2, 1, 1, 1),
    "conv": lambda x: torch.conv2d(x.flatten(0, 1), torch.ones(3, 2, 2, 2)),
    "in place": lambda x: x.mul_(3),
    "in place on a view": lambda x: (x.clone().clamp_(max=1), x)[1],
    "iteration": lambda x: torch.stack([step * 2 for step in x]),
    "comparison": lambda x: (x != 0).float(),
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "shape": lambda x: torch.tensor([*x.shape, x.ndim, len(x), x.numel(), x.dtype == torch.float32]),
    "linear with a mask": lambda x: nn.functional.linear(x.flatten(2) * 0.5, torch.ones(2, 800)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_whatever_is_done_with_them_is_done_with_the_frames(name):
    frames = frames_of()
    ours = OPERATIONS[name](Events.of(frames, torch.float32))
    expected = OPERATIONS[name](frames.float())
    assert tuple(ours.shape) == tuple(expected.shape)
    torch.testing.assert_close(ours + torch.zeros(()), expected + torch.zeros(()), rtol=1e-6, atol=1e-6)
    assert torch.equal(frames, frames_of())  # they are the loader's


def test_training_steps_do_not_depend_on_how_events_come(monkeypatch):
    frames, y = frames_of(), torch.arange(16) % 4

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(2), nn.Linear(800, 24), LIF(), nn.Linear(24, 16), LIF(), TimeAverage())
        with attach(model, seed=1, total_steps=20) as ulr:
            for _ in range(3):
                model.zero_grad()
                ulr.backward(frames, y)
        return [q.grad for q in model.parameters()]

    sparse = run()
    monkeypatch.setattr(Events, "of", classmethod(lambda cls, frames, dtype: frames.to(dtype)))
    for ours, other in zip(sparse, run(), strict=True):
        assert other.any() and (ours - other).norm() <= 1e-4 * other.norm()
