"""Memory that is kept from step to step, and convolutions in blocks of rows."""

import copy
import pickle
from contextlib import ExitStack, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ulr_snn import LIF, ULR, Fold, TimeAverage, attach
from ulr_snn.credit.maps import Shared
from ulr_snn.kernels import pool as memory
from ulr_snn.kernels import sparse, stateless
from ulr_snn.kernels.limits import limits
from ulr_snn.kernels.pool import Pool, blocks, empty, in_step
from ulr_snn.kernels.stateless import quick_convolutions, run

LARGE = (limits.smallest // 16, 8)  # twice the smallest


def test_memory_is_used_again_only_when_nothing_refers_to_it():
    pool = Pool()
    with pool.used():
        first = empty(*LARGE)
        view, place = first[3:5].detach(), first.data_ptr()
        view.fill_(7)
        del first
        assert empty(*LARGE).data_ptr() != place  # the view is still there
        assert (view == 7).all()
        del view
        again = empty(LARGE[0] - 1, LARGE[1])  # smaller ones too
        assert again.data_ptr() == place and again.dtype == torch.float32
        assert again.data_ptr() % memory.ALIGNED == 0
        del again
        assert empty(LARGE[0] * 3, LARGE[1]).data_ptr() != place


def test_a_graph_keeps_its_memory():
    pool = Pool()
    with pool.used():
        x = empty(*LARGE).fill_(2).requires_grad_()
        y = (x * x).sum()
        place = x.data_ptr()
        del x
        assert empty(*LARGE).fill_(5).data_ptr() != place
        node = y.grad_fn.next_functions[0][0]
        assert (node._saved_self == 2).all()


def test_memory_that_steps_do_not_use_is_given_back():
    pool = Pool()
    with pool.used():
        empty(*LARGE)
    for _ in range(memory.UNUSED):
        assert pool._arrays
        with pool.used():
            pass
    assert not pool._arrays


def test_only_large_ones_in_a_step_come_from_a_pool():
    pool = Pool()
    empty(*LARGE)
    with pool.used():
        empty(LARGE[0] // 2 - 1, LARGE[1])
    assert not pool._arrays
    assert memory.empty_like(torch.zeros(3, dtype=torch.float64)).dtype == torch.float64


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        Fold(nn.Conv2d(2, 4, 3, 1, 1)), LIF(),
        Fold(nn.Conv2d(4, 6, 3, 2)), LIF(),
        Fold(nn.Flatten(), nn.Linear(54, 5)), TimeAverage(),
    )  # fmt: skip


def trained(steps: int = 3) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Outputs and weights after a few steps, and the memory that was kept after each."""
    model, held, kept = net(), [], []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with attach(model, loss="ce_count") as ulr:
        for step in range(steps):
            x = (torch.rand(9, 7, 2, 8, 8, generator=torch.Generator().manual_seed(step)) < 0.3).float()
            optimizer.zero_grad()
            held.append(ulr.backward(x, torch.arange(7) % 5).outputs)
            optimizer.step()
            kept.append(len(ulr.pool._arrays))
    assert not ulr.pool._arrays
    return held, [q.detach() for q in model.parameters()], kept


def test_training_is_the_same_with_memory_that_is_kept(monkeypatch):
    monkeypatch.setattr(limits, "smallest", 1 << 40)
    outputs, weights, kept = trained()
    assert not any(kept)
    monkeypatch.setattr(limits, "smallest", 1)
    others, moved, kept = trained()
    assert all(kept)
    for one, other in zip([*outputs, *weights], [*others, *moved], strict=True):
        assert torch.equal(one, other)


# -- blocks of rows ----------------------------------------------------------------------------------------


def passed(module: nn.Module, x: Tensor) -> Tensor:
    """What a bound model's module gives."""
    with quick_convolutions(module):
        return run(module, x)


def test_blocks_are_all_rows_in_order(monkeypatch):
    monkeypatch.setattr(limits, "block", 100)
    assert blocks(7, 8) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert blocks(2, 1000) == [slice(0, 1), slice(1, 2)]
    assert blocks(0, 4) == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1), "bias": False},
        {"groups": 2, "padding": 1},
    ],
)
def test_convolution_in_blocks_is_the_convolution(options, monkeypatch):
    monkeypatch.setattr(limits, "block", 4 * 4 * 9 * 11 * 3)  # three rows
    torch.manual_seed(0)
    module, x = nn.Conv2d(4, 6, 3, **options), torch.randn(10, 4, 9, 11, requires_grad=True)
    expected = module(x)
    g = torch.randn_like(expected)
    with Pool().used():
        found = passed(module, x)
        assert type(found.grad_fn).__name__ == "_ConvolutionBackward"
        wanted = [x, *module.parameters()]
        mine = torch.autograd.grad(found, wanted, g)
    for one, other in zip([found, *mine], [expected, *torch.autograd.grad(expected, wanted, g)], strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= 1e-6 * other.norm()


class Masks(TorchDispatchMode):
    """What gradients of convolutions are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[bool]] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function is torch.ops.aten.convolution_backward.default:
            self.seen.append(list(arguments[-1]))
        return function(*arguments, **(named or {}))


def test_no_gradient_is_made_that_nothing_asks_for(monkeypatch):
    monkeypatch.setattr(limits, "block", 4 * 2 * 36)
    module, leaf = nn.Conv2d(2, 3, 3), torch.randn(4, 2, 6, 6, requires_grad=True)
    with Pool().used():
        x = leaf * 1
        y = passed(module, x)
        for inputs, expected in (([module.weight], [False, True, True]), ([x, module.weight], [True, True, True])):
            with Masks() as masks:
                torch.autograd.backward(y, torch.ones_like(y), inputs=inputs, retain_graph=True)
            assert masks.seen == [expected] * 4
        (found,) = torch.autograd.grad(passed(module, leaf).sum(), leaf)
        assert torch.allclose(found, torch.autograd.grad(module(leaf).sum(), leaf)[0], atol=1e-6)


class Doubled(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


@pytest.mark.parametrize("kind", ["own code", "reflect", "same", "double", "outside", "few", "autocast"])
def test_other_convolutions_are_left_alone(kind, monkeypatch):
    monkeypatch.setattr(limits, "block", 4 * 2 * 36 * (100 if kind == "few" else 1))
    options = {"reflect": {"padding": 1, "padding_mode": "reflect"}, "same": {"padding": "same"}}.get(kind, {})
    module, x = (Doubled if kind == "own code" else nn.Conv2d)(2, 3, 3, **options), torch.randn(4, 2, 6, 6)
    if kind == "double":
        module, x = module.double(), x.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        expected = module(x)
        with nullcontext() if kind == "outside" else Pool().used():
            found = passed(module, x)
    assert torch.equal(found, expected) and type(found.grad_fn).__name__ != "_ConvolutionBackward"
    assert "_conv_forward" not in vars(module)


@pytest.mark.parametrize("kind", ["hook", "hook of all", "compiled", "subclass", "own forward"])
def test_what_users_put_around_a_convolution_runs(kind, monkeypatch):
    monkeypatch.setattr(limits, "block", 4 * 2 * 36)
    seen: list[str] = []

    class Mine(nn.Conv2d):
        def forward(self, x):
            seen.append("called")
            return super().forward(x)

    module, x = (Mine if kind == "subclass" else nn.Conv2d)(2, 3, 3), torch.randn(4, 2, 6, 6)
    with ExitStack() as stack:
        if kind == "hook":
            module.register_forward_hook(lambda *_: seen.append("called"))
        if kind == "hook of all":
            handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append("called"))
            stack.callback(handle.remove)
        if kind == "compiled":
            module._compiled_call_impl = lambda x: seen.append("called") or module._call_impl(x)
        if kind == "own forward":
            forward = module.forward
            module.forward = lambda x: seen.append("called") or forward(x)
        expected = module(x)
        seen.clear()
        stack.enter_context(Pool().used())
        found = passed(module, x)
    assert torch.allclose(found, expected, atol=1e-6) and type(found.grad_fn).__name__ == "_ConvolutionBackward"
    assert seen == ["called"]


def test_wrong_shapes_raise_as_the_module_does(monkeypatch):
    monkeypatch.setattr(limits, "block", 4 * 2 * 36)
    with Pool().used(), pytest.raises(RuntimeError, match="channels"):
        passed(nn.Conv2d(3, 3, 3), torch.randn(4, 2, 6, 6))


def test_credit_through_a_window_in_blocks_is_that_of_all_rows(monkeypatch):
    torch.manual_seed(0)
    path = Shared((4, 9, 9), (6, 5, 5), (2, 2), (-1, -1), (3, 3))
    weight, current = torch.randn(path.size), torch.randn(11, *path.target)
    whole = path.backward(weight, current)
    monkeypatch.setattr(limits, "block", 4 * 4 * 81 * 3)
    assert torch.allclose(path.backward(weight, current), whole, atol=1e-6)
    assert not path.backward(weight, current[:0]).numel()


# -- layers that read spikes -------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.4])
def test_linear_layer_of_spikes_is_the_linear_layer(density, bias, monkeypatch):
    monkeypatch.setattr(limits, "fewest", 0)
    torch.manual_seed(0)
    module, x = nn.Linear(30, 40, bias), (torch.rand(5, 7, 30) < density).float().requires_grad_()
    expected = module(x)
    wanted, g = [x, *module.parameters()], torch.randn_like(expected)
    with Pool().used():
        found = run(module, x)
        mine = torch.autograd.grad(found, wanted, g)
        by_events = "_LinearBackward" in (type(found.grad_fn.next_functions[0][0]).__name__)
    assert by_events == (density < 0.1)
    for one, other in zip([found, *mine], [expected, *torch.autograd.grad(expected, wanted, g)], strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= 1e-6 * other.norm()


def test_layers_that_read_spikes_learn_the_same(monkeypatch):
    def gradients(fewest: int) -> tuple[list[Tensor], int]:
        calls: list[int] = []
        monkeypatch.setattr(limits, "fewest", fewest)
        monkeypatch.setattr(stateless, "linear", lambda *about: calls.append(1) or sparse.linear(*about))
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 50), LIF(), nn.Linear(50, 40), LIF(), nn.Linear(40, 5), TimeAverage())
        x = torch.randn(20, 6, 8, generator=torch.Generator().manual_seed(1))
        with attach(model, loss="ce_count") as ulr:
            for _ in range(2):
                ulr.backward(x, torch.arange(6) % 5)
        return [q.grad for q in model.parameters()], len(calls)

    dense, none = gradients(1 << 40)
    few, some = gradients(0)
    assert none == 0 and some > 0
    for one, other in zip(few, dense, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_hooks_in_a_model_are_called_in_training_steps():
    seen: list[str] = []
    model = net()
    model.register_forward_hook(lambda *_: seen.append("model"))
    model[0][0].register_forward_hook(lambda *_: seen.append("convolution"))
    model[4][1].register_forward_pre_hook(lambda *_: seen.append("linear"))
    with attach(model, loss="ce_count") as ulr:
        ulr.backward(torch.rand(9, 7, 2, 8, 8), torch.arange(7) % 5)
    assert {"model", "convolution", "linear"} == set(seen)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_gradients_can_be_differentiated(kind, monkeypatch):
    """As `credit.direct.direct_effect` does."""
    monkeypatch.setattr(limits, "fewest", 0)
    monkeypatch.setattr(limits, "block", 4 * 2 * 36)
    torch.manual_seed(0)
    shape, module = ((12, 30), nn.Linear(30, 40)) if kind == "linear" else ((4, 2, 6, 6), nn.Conv2d(2, 3, 3))
    x = (torch.rand(shape) < 0.05).float().requires_grad_()
    probe = torch.randn_like(module(x)).requires_grad_()

    def second(y: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(y, [x, *module.parameters()], probe, create_graph=True)
        return *first, *torch.autograd.grad(sum((g * g).sum() for g in first), [probe, x, module.weight])

    expected = second(module(x))
    with Pool().used():
        y = passed(module, x)
        assert type(y.grad_fn).__name__ != type(module(x).grad_fn).__name__
        found = second(y)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


class Twice(nn.Parameter):
    @classmethod
    def __torch_function__(cls, function, types, arguments=(), named=None):
        if function is nn.functional.linear:
            x, weight, bias = arguments
            return 2 * nn.functional.linear(x, weight.detach().as_subclass(Tensor), bias)
        return super().__torch_function__(function, types, arguments, named or {})


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("kind", ["one row", "subclass", "sparse", "vmap"])
def test_linear_layers_of_other_kinds_give_what_they_do(kind, monkeypatch):
    monkeypatch.setattr(limits, "fewest", 0)
    torch.manual_seed(0)
    module, x = nn.Linear(30, 40), torch.zeros((30,) if kind == "one row" else (4, 30))
    if kind == "subclass":
        module.weight = Twice(module.weight.detach())
    if kind == "sparse":
        module.weight = nn.Parameter(module.weight.detach().to_sparse_csr(), requires_grad=False)
    expected = module(x)
    with Pool().used():
        found = torch.vmap(lambda row: run(module, row[None])[0])(x) if kind == "vmap" else run(module, x)
    assert torch.allclose(found, expected, atol=1e-6) and found.shape == expected.shape


def test_a_copy_of_a_pool_is_empty():
    pool = Pool()
    with pool.used():
        empty(*LARGE)
    assert not copy.deepcopy(pool)._arrays and not pickle.loads(pickle.dumps(pool))._arrays


def test_an_average_over_time_does_not_overflow_in_half_precision():
    assert torch.equal(TimeAverage()(torch.full((1000, 1, 2), 100.0).half()), torch.full((1, 2), 100.0).half())


def test_credit_in_double_precision_stays_so(monkeypatch):
    """Blocks have memory in float32, on the CPU: other tensors go as a whole."""
    torch.manual_seed(0)
    path = Shared((4, 9, 9), (6, 5, 5), (2, 2), (-1, -1), (3, 3))
    weight, current = torch.randn(path.size).double(), torch.randn(11, *path.target).double()
    whole = path.backward(weight, current)
    monkeypatch.setattr(limits, "block", 4 * 4 * 81 * 3)
    found = path.backward(weight, current)
    assert found.dtype == torch.float64 and torch.equal(found, whole)


def test_steps_that_are_to_take_little_keep_no_memory():
    lean = Pool(lean=True)
    with lean.used():
        assert in_step()
        empty(1 << 19)
        assert not lean._arrays
    assert copy.copy(lean).lean
    for asked, expected in (("auto", False), ("replay", True)):
        assert attach(nn.Sequential(nn.Linear(2, 2), LIF()), ULR(memory=asked)).pool.lean is expected
