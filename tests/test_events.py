"""Sparse events: the same numbers as the frames that they stand for, whatever a model does with them."""

import copy

import pytest
import torch
from torch import Tensor, nn

import ulr_snn
from ulr_snn import LIF, ULR, Fold, Logistic, RecurrentLIF, TimeAverage, UsageError, attach
from ulr_snn.kernels.limits import limits
from ulr_snn.kernels.sparse import Rows, linear, product
from ulr_snn.losses.named import resolve
from ulr_snn.memory.chunks import ChunkLimits, TimeChunks
from ulr_snn.model.batch import Batch
from ulr_snn.model.event_list import EventList
from ulr_snn.model.events import Events
from ulr_snn.peers import SurrogateBPTT

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


CONVOLUTIONS = {  # channels, height, width; outputs, kernel; options
    "as in the benchmark": ((2, 34, 34), 12, 5, {"stride": 2, "padding": 2}),
    "plain": ((2, 20, 20), 8, 3, {"bias": False}),
    "odd": ((1, 13, 29), 7, (3, 5), {"stride": (2, 3), "padding": (2, 0)}),
    "a stride beyond the kernel": ((2, 17, 19), 5, 2, {"stride": 3, "padding": 1}),
    "padding beyond the kernel": ((2, 11, 12), 3, 3, {"stride": 2, "padding": 7}),
    "dilation": ((2, 20, 23), 16, 3, {"dilation": 2, "padding": 2}),
    "dilation and stride": (
        (3, 19, 18),
        4,
        (4, 3),
        {"dilation": (2, 3), "stride": (3, 2), "padding": (1, 4)},
    ),
    "same": ((2, 15, 16), 6, 3, {"padding": "same"}),
    "valid": ((2, 15, 16), 6, 4, {"padding": "valid", "stride": 2}),
    "one pixel": ((4, 12, 12), 33, 1, {}),
    "one output": ((2, 9, 9), 1, 9, {}),
}
BEYOND = {
    "groups": ((2, 20, 20), 8, 3, {"groups": 2}),
    "other padding": ((2, 20, 20), 8, 3, {"padding": 1, "padding_mode": "circular"}),
    "sides padded unlike": ((2, 20, 20), 8, 4, {"padding": "same"}),
}


def events_in(shape: tuple[int, ...], density: float = 0.02) -> Tensor:
    """uint8 counts of this density, with frames that have no event first and last."""
    generator = torch.Generator().manual_seed(1)
    active = torch.rand(shape, generator=generator) < density
    frames = (active * torch.randint(1, 4, shape, generator=generator)).to(torch.uint8)
    frames[0, 0] = frames[-1, -1] = 0
    return frames


def convolved(module: nn.Conv2d, x: Tensor) -> list[Tensor]:
    """What a convolution of events [T, B, C, H, W] gives, and the gradients of its parameters."""
    module.zero_grad()
    y = module(x.flatten(0, 1))
    assert type(y) is Tensor and y.is_contiguous()
    (y * torch.rand(y.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return [y.detach(), *(q.grad for q in module.parameters())]


def in_double(module: nn.Conv2d, frames: Tensor) -> list[Tensor]:
    """The same of torch's own, in float64: in float32 its gradient of the bias is right to four digits alone."""
    return [found.float() for found in convolved(copy.deepcopy(module).double(), frames.double())]


def apart(ours: list[Tensor], others: list[Tensor]) -> float:
    """The greatest error, relative to the size of what it is in."""
    assert all(mine.shape == other.shape for mine, other in zip(ours, others, strict=True))
    return max(((mine - other).norm() / other.norm()).item() for mine, other in zip(ours, others, strict=True))


@pytest.fixture
def made(monkeypatch) -> list[Events | EventList]:
    """Events of which the frames were made, as it happens; of lists, more than those of a single step."""
    found: list[Events | EventList] = []

    def to(self: EventList, target: torch.dtype | torch.device, own=EventList.to) -> Tensor | EventList:
        found.extend([self] * (isinstance(target, torch.dtype) and len(self) > 1))
        return own(self, target)

    monkeypatch.setattr(Events, "dense", lambda self, own=Events.dense: found.append(self) or own(self))
    monkeypatch.setattr(EventList, "to", to)
    return found


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_convolution_gives_what_torch_gives(name, threads, made, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # as many parts of the rows
    monkeypatch.setattr(limits, "share", 1.0)
    frame, outputs, kernel, options = CONVOLUTIONS[name]
    torch.manual_seed(0)
    module = nn.Conv2d(frame[0], outputs, kernel, **options)
    frames = events_in((5, 31, *frame))
    monkeypatch.setattr(limits, "fewest", 0)
    events = Events.of(frames, torch.float32)
    ours = convolved(module, events)
    assert not made
    assert apart(ours, in_double(module, frames)) <= 1e-5
    assert all(torch.equal(a, b) for a, b in zip(ours, convolved(module, events), strict=True))
    if not isinstance(module.padding, str):  # a wrong variant
        module.padding = (module.padding[0], module.padding[1] + 1)
        shifted = in_double(module, frames)
        shifted[0] = shifted[0][..., : ours[0].shape[-1]]
        assert apart(ours, shifted) > 0.1


@pytest.mark.filterwarnings("ignore:Using padding")
@pytest.mark.parametrize("name", BEYOND)
def test_convolutions_that_are_not_for_events_go_the_dense_way(name, made):
    frame, outputs, kernel, options = BEYOND[name]
    module = nn.Conv2d(frame[0], outputs, kernel, **options)
    frames = events_in((8, 16, *frame))
    events = Events.of(frames, torch.float32).flatten(0, 1)
    assert isinstance(events, Events)
    assert apart([module(events)], [module(frames.flatten(0, 1).float())]) <= 1e-6 and made


def test_a_convolution_is_dense_where_that_is_faster(made):
    nn.Conv2d(2, 8, 3)(Events.of(frames_of(density=0.09), torch.float32).flatten(0, 1))
    assert not made
    nn.Conv2d(2, 8, 3, dilation=4)(Events.of(frames_of(density=0.09), torch.float32).flatten(0, 1))
    assert len(made) == 1
    with pytest.raises(RuntimeError, match="channels"):  # torch's own word
        nn.Conv2d(3, 8, 3)(Events.of(frames_of(), torch.float32).flatten(0, 1))


@pytest.mark.parametrize("shape", [(8, 16, 2, 20, 20), (100, 1, 2, 20, 20)], ids=["", "one sample"])
@pytest.mark.parametrize("density", [0.03, 0], ids=["", "no events"])
@pytest.mark.parametrize("reshaped", [False, True], ids=["", "reshaped"])
def test_events_stay_sparse_up_to_a_convolution(shape, density, reshaped, made):
    frames = events_in(shape, density)
    module = nn.Conv2d(2, 6, 3, padding=1)
    before = [nn.Flatten(2), nn.Unflatten(2, (2, 20, 20))] if reshaped else []
    events = Events.of(frames, torch.float32)
    y = nn.Sequential(*before, Fold(module))(events)
    y.square().sum().backward()
    assert type(y) is Tensor and isinstance(events, Events) and not made
    ours = [y.detach().flatten(0, 1), *(q.grad for q in module.parameters())]
    module = copy.deepcopy(module).double()
    module.zero_grad()
    expected = module(frames.flatten(0, 1).double())
    expected.square().sum().backward()
    for mine, other in zip(ours, [expected.detach(), *(q.grad for q in module.parameters())], strict=True):
        assert (mine - other).norm() <= 1e-5 * other.norm()


def test_dense_frames_small_ones_and_other_types_stay_what_they_are():
    assert type(Events.of(frames_of(density=2 * limits.density), torch.float32)) is Tensor
    assert type(Events.of(frames_of(), torch.float64)) is Tensor
    small = frames_of()[:1, :1]
    assert small.numel() < limits.fewest and type(Events.of(small, torch.float32)) is Tensor


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


def dense_net() -> list[nn.Module]:
    return [nn.Flatten(2), nn.Linear(800, 24), LIF(), nn.Linear(24, 16), LIF(), TimeAverage()]


def conv_net() -> list[nn.Module]:
    return [
        Fold(nn.Conv2d(2, 6, 5, stride=2, padding=2)),
        LIF(),
        nn.Flatten(2),
        nn.Linear(600, 16),
        LIF(),
        TimeAverage(),
    ]


@pytest.mark.parametrize("net", [dense_net, conv_net])
def test_training_steps_do_not_depend_on_how_events_come(net, made, monkeypatch):
    frames, y = frames_of(), torch.arange(16) % 4

    def run() -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(0)
        model, spikes = nn.Sequential(*net()), []
        for module in model:
            if isinstance(module, LIF):
                module.register_forward_hook(lambda module, inputs, output: spikes.append(output.detach().clone()))
        with attach(model, seed=1, total_steps=20) as ulr:
            for step in range(3):
                model.zero_grad()
                ulr.backward(frames, y)
                if step == 0:
                    made.clear()  # to see what the events drive
        assert not made
        return [q.grad for q in model.parameters()], spikes

    sparse, spikes = run()
    monkeypatch.setattr(Events, "of", classmethod(lambda cls, frames, dtype: frames.to(dtype)))
    expected, others = run()
    assert all(torch.equal(a, b) for a, b in zip(spikes, others, strict=True)) and any(fired.any() for fired in spikes)
    for ours, other in zip(sparse, expected, strict=True):
        assert other.any() and (ours - other).norm() <= 1e-4 * other.norm()


# -- lists of events ---------------------------------------------------------------------------------------


def listed(frames: Tensor, seed: int = 0) -> Tensor:
    """A sparse COO tensor that lists each event of uint8 frames by itself, in no order."""
    indices = frames.nonzero().repeat_interleave(frames[frames != 0].long(), dim=0).T
    order = torch.randperm(indices.shape[1], generator=torch.Generator().manual_seed(seed))
    ones = torch.ones(len(order), dtype=torch.uint8)
    return torch.sparse_coo_tensor(indices[:, order], ones, frames.shape, check_invariants=True)


ON_LISTS = {
    "part of time": lambda x: x[3:5],
    "parts": lambda x: x[:3, 2:9],
    "nothing": lambda x: x[2:2],
    "repeat": lambda x: x.repeat(1, 3, 1, 1, 1),
    "repeat, new axis": lambda x: x.repeat((2, 1, 2, 1, 1, 3)),
    "roll": lambda x: x.roll((1, 1), (0, 1)),
    "roll back": lambda x: x.roll((-3, 5), (-1, 2)),
    "roll an axis": lambda x: x.roll(2, 1),
    "roll flat": lambda x: x.roll(7),
}


@pytest.mark.parametrize("name", ON_LISTS)
def test_what_is_done_to_a_list_is_done_to_its_frames(name):
    frames = frames_of()
    operation, found = ON_LISTS[name], EventList.of(listed(frames))
    sliced = name.startswith(("part", "nothing"))
    ours = operation(found) if sliced else operation(Events(found, torch.float32))._frames
    expected = operation(frames)
    assert isinstance(ours, EventList) and ours.shape == expected.shape and len(ours) == len(expected)
    assert ours.equal(EventList.of(expected.to_sparse())) and torch.equal(ours.to(torch.uint8), expected)
    assert (ours.places.diff() > 0).all()
    rows, same = ours.rows(20), Events(expected, torch.float32).rows(20)
    for mine, other in zip(rows.arrays, same.arrays, strict=True):
        assert mine.dtype == other.dtype and (mine == other).all()


@pytest.mark.parametrize("name", OPERATIONS)
def test_whatever_is_done_with_listed_events_is_done_with_the_frames(name):
    frames = frames_of()
    ours = OPERATIONS[name](Events.of(EventList.of(listed(frames)), torch.float32))
    assert torch.equal(ours + torch.zeros(()), OPERATIONS[name](Events.of(frames, torch.float32)) + torch.zeros(()))


ESTIMATORS = {
    "": ULR(),
    "replay": ULR(memory=TimeChunks(limits=ChunkLimits(together=(1000, 1000)))),  # several chunks
    "copies": ULR(credit="residual", copies=4),
    "copies in turn": ULR(credit="global", copies=4, memory="replay", firing=Logistic(0.3)),
    "surrogate": SurrogateBPTT(),
}


@pytest.mark.product
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("net", [dense_net, conv_net])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_lists_of_events_train_as_their_frames_bit_for_bit(name, net, padded, made, monkeypatch):
    monkeypatch.setattr(limits, "fewest", 0)
    frames, y = frames_of(), torch.arange(16) % 4
    lengths = torch.arange(16) % 8 + 1 if padded else None

    def run(x: Tensor, time_first: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(*net())
        for q in model.parameters():
            q.data *= 3  # so that all layers fire
        with ESTIMATORS[name].attach(model, "ce_count", 1, time_first, 20) as ulr:
            found = [ulr.backward(x, y, lengths=lengths) for _ in range(3)]
        return [*(q.grad for q in model.parameters()), *(estimate.outputs for estimate in found)]

    ours, expected = run(listed(frames), True), run(frames, True)
    assert not made  # at no step
    turned = run(listed(frames.transpose(0, 1)), False)
    for mine, third, other in zip(ours, turned, expected, strict=True):
        assert other.any() and torch.equal(mine, other) and torch.equal(third, other)
    lost = frames.clone()
    lost.view(-1)[frames.flatten().nonzero()[0]] = 0  # a wrong variant: the first event is lost
    assert not all(torch.equal(mine, other) for mine, other in zip(run(listed(lost), True), expected, strict=True))


def as_sequence(x: Tensor, targets: Tensor, lengths: Tensor | None, time_first: bool, model: nn.Module) -> Tensor:
    return Batch.of(model, x, targets, lengths, resolve("ce_count"), time_first).x


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float64], ids=str)
def test_values_of_any_type_and_models_of_any_type(dtype, model_dtype):
    frames = frames_of(torch.bool if dtype == torch.bool else torch.uint8).to(dtype)
    model = nn.Linear(3, 2, dtype=model_dtype)
    about = torch.zeros(16, dtype=torch.int64), None, True, model
    ours, expected = (as_sequence(x, *about) for x in (frames.to_sparse(), frames))
    assert ours.dtype == expected.dtype == model_dtype
    assert torch.equal(ours * 1, expected * 1)
    indices, ones = torch.zeros(5, 300), torch.ones(300, dtype=torch.uint8)
    twice = torch.sparse_coo_tensor(indices, ones, SHAPE, check_invariants=True)
    assert as_sequence(twice, *about).sum() == 300  # more than a byte holds


def test_lists_that_are_dense_or_hold_more_than_numbers():
    about = torch.zeros(16, dtype=torch.int64), None, True, nn.Linear(3, 2)
    dense = frames_of(density=2 * limits.density)
    assert type(as_sequence(dense.to_sparse(), *about)) is Tensor
    assert torch.equal(as_sequence(dense.to_sparse(), *about), dense.float())
    assert torch.equal(as_sequence(frames_of().to_sparse(2), *about) * 1, frames_of().float())
    assert not as_sequence(torch.zeros(SHAPE).to_sparse(), *about).any()  # no event at all


def test_errors_of_lists():
    model, y = nn.Linear(3, 2), torch.zeros(16, dtype=torch.int64)
    for value in (float("nan"), float("inf")):
        x = frames_of().float()
        x[2, 3, 0, 1, 1] = value
        with pytest.raises(UsageError, match="NaN or infinite"):
            as_sequence(x.to_sparse(), y, None, True, model)
    with pytest.raises(UsageError, match="time_first=False"):
        as_sequence(frames_of().transpose(0, 1).to_sparse(), y, None, True, model)
    with pytest.raises(UsageError, match="without a step"):
        as_sequence(torch.zeros(0, 16, 3).to_sparse(), y, None, True, model)


def test_a_loader_of_lists_trains_as_one_of_frames(monkeypatch):
    monkeypatch.setattr(limits, "fewest", 0)
    train_set, _ = ulr_snn.data.load("digits")
    part = train_set.subset(range(100))
    found = []
    for sparse_too in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(2), nn.Linear(512, 32), LIF(), nn.Linear(32, 10))
        loader = ulr_snn.data.loader(part, 25, shuffle=True, sparse=sparse_too)
        assert next(iter(loader))[0].is_sparse == sparse_too
        result = ulr_snn.train(model, loader, 2, val_loader=loader, progress=False)
        says = str(ulr_snn.plan(model, next(iter(loader))))
        kept = [entry | {"seconds": 0} for entry in result.history]
        found.append((kept, says, ulr_snn.evaluate(model, loader, samples=2), [*model.parameters()]))
    assert "sparse" in found[0][1]
    assert found[0][:3] == found[1][:3]
    assert all(torch.equal(mine, other) for mine, other in zip(found[0][3], found[1][3], strict=True))


@pytest.mark.parametrize("outputs", [1, 3, 63, 64, 65, 130])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.09, 0.5])
def test_product_with_rows_that_are_sparse_or_not(density, outputs, monkeypatch):
    monkeypatch.setattr(limits, "fewest", 0)
    torch.manual_seed(0)
    x = torch.where(torch.rand(300, 37) < density, torch.randn(300, 37), 0.0)
    g = torch.randn(300, outputs)
    listed: list[bool] = []
    of = Rows.of
    monkeypatch.setattr(Rows, "of", lambda *about: listed.append((rows := of(*about)) is not None) or rows)
    found, expected = product(g, x), g.double().T @ x.double()
    assert listed == [density < limits.density]
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert torch.equal(product(g.double(), x.double()), expected)  # no kernel


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("outputs", [0, 1, 15, 16, 255, 256, 257, 530])
def test_outputs_in_blocks_are_those_of_the_whole(outputs, rows, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    x = torch.where(torch.rand(rows, 37) < 0.2, torch.randn(rows, 37), 0.0)
    weight, bias = torch.randn(outputs, 37), torch.randn(outputs)
    found = linear(Rows.of(x), weight, bias)
    torch.testing.assert_close(found.double(), x.double() @ weight.double().T + bias, rtol=1e-5, atol=1e-5)


def test_recurrent_weights_learn_the_same_from_events_as_from_all_spikes(monkeypatch):
    def gradient(fewest: int) -> tuple[Tensor, int]:
        monkeypatch.setattr(limits, "fewest", fewest)
        calls: list[int] = []
        own = Rows.product
        monkeypatch.setattr(Rows, "product", lambda self, g: calls.append(1) or own(self, g))
        torch.manual_seed(0)
        model = nn.Sequential(Fold(nn.Linear(8, 24)), RecurrentLIF(24), Fold(nn.Linear(24, 3)), TimeAverage())
        nn.init.constant_(model[0][0].bias, -0.3)
        with attach(model, loss="ce_count") as ulr:
            ulr.backward(torch.randn(15, 6, 8), torch.arange(6) % 3)
        monkeypatch.setattr(Rows, "product", own)
        return model[1].recurrent.weight.grad, len(calls)

    dense, none = gradient(1 << 30)
    sparse, some = gradient(0)
    assert none == 0 and some == 1 and dense.norm() > 0
    assert (dense - sparse).norm() <= 1e-6 * dense.norm()
