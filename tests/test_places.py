"""Functions with a surrogate gradient in a model's own code: found, taken over, given the right credit, and let go."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

import ulr_snn
from tests.helpers import library_of
from tests.written import BATCH, CLASSES, INPUTS, STEPS, Above, Own, Unasked, data, gradients, layered
from ulr_snn import LIF, ULR, CurrentNoise, Independent, Logistic, UsageError, attach, evaluate, plan, train
from ulr_snn.adapters.intercept import handled
from ulr_snn.adapters.places import Later, Place
from ulr_snn.kernels import dispatch
from ulr_snn.model.staircase import staircase


class Straight(Function):
    """The base of functions with the gradient of their input, which they keep."""

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class AtLeast(Unasked):
    """In the newer form, with a slope that only its backward reads."""

    @staticmethod
    def forward(x, slope):
        return (x >= 0).to(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])


class Half(Unasked):
    @staticmethod
    def forward(ctx, x):
        return x.gt(0.5).to(x)


class Over(Unasked):
    @staticmethod
    def forward(ctx, x, threshold):
        return (x > threshold).to(x)


class Ternary(Unasked):
    @staticmethod
    def forward(ctx, x):
        return (x > 1).to(x) - (x < -1).to(x)


class Count(Unasked):
    @staticmethod
    def forward(ctx, x, most):
        return x.clamp(0, most).round()


class Sign(Unasked):
    @staticmethod
    def forward(ctx, x):
        return torch.where(x > 0.25, 2.0, -1.0).to(x)


class Round(Unasked):
    @staticmethod
    def forward(ctx, x):
        return x.round()


class Scaled(Unasked):
    @staticmethod
    def forward(ctx, x, scale):
        return (scale * x > 1).to(x)


# -- what a function computes ------------------------------------------------------------------------------


def called(function: Any, *rest: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The staircase of a function, from a call with so many other arguments."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return staircase(function, [((x, *rest), function.apply(x, *rest))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
@pytest.mark.parametrize(
    ("function", "rest", "thresholds", "rises", "first", "strict"),
    [
        (Above, (), (0.0,), (1.0,), 0.0, True),
        (AtLeast, (3.0,), (0.0,), (1.0,), 0.0, False),
        (Half, (), (0.5,), (1.0,), 0.0, True),
        (Ternary, (), None, (1.0, 1.0), -1.0, None),
        (Count, (4,), None, (1.0,) * 4, 0.0, None),
        (Sign, (), (0.25,), (3.0,), -1.0, True),
    ],
    ids=["above", "at least", "half", "ternary", "count", "sign"],
)
def test_a_staircase_is_found_bit_for_bit(function, rest, thresholds, rises, first, strict, dtype):
    found = called(function, *rest, dtype=dtype)
    assert (found.rises, found.first) == (rises, first)
    assert thresholds is None or (found.thresholds, found.strict) == (thresholds, strict)
    edges = torch.tensor(found.thresholds, dtype=dtype)
    up, down = (edges.nextafter(torch.full_like(edges, side)) for side in (torch.inf, -torch.inf))
    x = torch.cat([edges, up, down, torch.tensor([0.0, -0.0, 1e30, -1e30], dtype=dtype)])
    drive = found.drive(x)
    spikes = (drive > 0 if found.strict else drive >= 0).to(dtype)
    assert torch.equal(found.output(spikes), function.apply(x, *rest))


@pytest.mark.parametrize("threshold", [1.5, torch.tensor(1.5), torch.full((4, 6), 0.5)], ids=["number", "one", "each"])
def test_a_threshold_among_the_arguments_is_subtracted(threshold):
    found = called(Over, threshold)
    assert (found.below, found.thresholds, found.strict) == (1, (0.0,), True)


def test_a_threshold_far_away_is_found():
    class Far(Unasked):
        @staticmethod
        def forward(ctx, x):
            return (x >= 1000).to(x)

    assert called(Far).thresholds == (1000.0,)


def test_other_functions_are_no_staircases():
    class Squared(Function):
        @staticmethod
        def forward(ctx, x):
            return x * x

    assert called(Round) is None and called(Squared) is None
    for scale in (2.0, torch.tensor(2.0)):  # one number that is no threshold is a constant
        assert called(Scaled, scale).thresholds == (0.5,)
    with pytest.raises(UsageError, match="Scaled fires by a rule that is not known"):
        called(Scaled, nn.Parameter(torch.tensor(2.0)))


# -- credit ------------------------------------------------------------------------------------------------


@pytest.mark.product
@pytest.mark.parametrize("lengths", [None, torch.tensor([9, 3, 5, 1] * 4)], ids=["whole", "lengths"])
@pytest.mark.parametrize("reset", ["subtract", "zero"])
@pytest.mark.parametrize(
    "estimator",
    [
        ULR(firing=Logistic(0.4)),
        ULR(credit="feedback", copies=2, firing=Logistic(0.4)),
        ULR(credit="global", copies=2, firing=Logistic(0.4)),
        ULR(credit="global", copies=4, memory="replay", firing=Logistic(0.4)),
        ULR(firing=Logistic(0.4, secants=0)),
    ],
    ids=["feedback", "feedback, a pair", "global", "global, in turn", "derivative"],
)
def test_neurons_that_are_written_out_and_ours_get_the_same_gradient(estimator, reset, lengths):
    """Equal equations and noise, on two paths through the library; 1e-7, for ours have leaks in single precision."""
    written = gradients(layered(lambda beta: Own(beta, reset, Above.apply)), estimator, lengths)
    ours = gradients(layered(lambda beta: LIF(beta, reset=reset)), estimator, lengths)
    for ours_of, written_of in zip(ours, written, strict=True):
        torch.testing.assert_close(written_of, ours_of, rtol=1e-6, atol=1e-7 * float(ours_of.abs().max()))
    assert all(float(g.abs().max()) > 0 for g in written)


def test_several_thresholds_have_the_credit_of_as_many_neurons():
    """A count of thresholds that are passed, and the sum of neurons apart: the same draws and gradients."""

    class Apart(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            levels = torch.arange(4, dtype=x.dtype) + 0.5
            return Above.apply(x.unsqueeze(2) - levels[:, None]).sum(2)

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Count.apply(x, 4)

    for estimator in (ULR(firing=Logistic(0.4)), ULR(credit="global", copies=4, firing=Logistic(0.4))):
        apart, counted = (gradients(layered(lambda _, kind=kind: kind()), estimator) for kind in (Apart, Counting))
        for a, b in zip(apart, counted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


class Learned(nn.Module):
    """A layer with learned thresholds, which it subtracts itself or gives to its function."""

    def __init__(self, within: bool) -> None:
        super().__init__()
        self.within, self.threshold = within, nn.Parameter(torch.linspace(0.5, 1.0, 6))

    def forward(self, x: Tensor) -> Tensor:
        threshold = self.threshold.expand_as(x)
        return Over.apply(x, threshold) if self.within else Above.apply(x - threshold)


def test_a_threshold_among_the_arguments_gets_its_gradient():
    def net(within: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(INPUTS, 6), Learned(within), nn.Linear(6, CLASSES)).double()

    inner, outer = (gradients(net(within), ULR(firing=Logistic(0.4))) for within in (True, False))
    assert float(inner[0].abs().max()) > 0
    for a, b in zip(inner, outer, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


class Loop(nn.Module):
    """A model without any module that fires: two layers of one width on one line, and a readout that leaks."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self.weights = nn.ParameterList([torch.randn(INPUTS, 6) * 0.9, torch.randn(6, 6) * 0.9])
        self.out = nn.Parameter(torch.randn(6, CLASSES) * 0.5)

    def fire(self, v: Tensor) -> Tensor:
        return AtLeast.apply(v.T, 5.0).T if self.transposed else AtLeast.apply(v, 5.0)

    def forward(self, x: Tensor) -> Tensor:
        v = [torch.zeros(x.shape[1], 6, dtype=x.dtype) for _ in self.weights]
        y, found = torch.zeros(x.shape[1], CLASSES, dtype=x.dtype), []
        for now in x:
            for i, weight in enumerate(self.weights):
                v[i] = 0.9 * v[i] + now @ weight
                now = self.fire(v[i] - 1.0)
                v[i] = v[i] - now.detach()
            y = 0.8 * y + now @ self.out
            found.append(y)
        return torch.stack(found)


def test_layers_on_one_line_of_a_loop_are_one_site_and_train():
    torch.manual_seed(0)
    model = Loop()
    found = plan(model.double(), data())
    assert [site for site, *_ in found.sites] == ["model"] and not found.untrained
    grads = gradients(model, ULR())
    assert len(grads) == 3 and all(float(g.abs().max()) > 0 for g in grads)


def test_samples_may_lie_on_any_axis():
    """The noise follows the samples, so that the gradient of a batch is that of its parts."""

    def grads(transposed: bool) -> list[Tensor]:
        torch.manual_seed(0)
        return gradients(Loop(transposed).double(), ULR(firing=Logistic(0.4)))

    for a, b in zip(grads(True), grads(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.product
@pytest.mark.parametrize("lengths", [None, torch.tensor([9, 3, 5, 1] * 4)], ids=["even", "lengths"])
@pytest.mark.parametrize("form", ["whole", "folded", "joined", "batch first", "folded, batch first"])
def test_functions_of_all_time_steps_at_once(form, lengths):
    """A layer without a state that fires in one call: the same draws in each form of its argument."""

    class Once(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if form == "folded":
                return Above.apply(x.flatten(0, 1) - 1.0).unflatten(0, x.shape[:2])
            if form == "joined":
                return Above.apply(x.flatten(1) - 1.0).view(x.shape)
            if form == "folded, batch first":
                return Above.apply(x.transpose(0, 1).flatten(0, 1) - 1.0).unflatten(0, x.shape[1::-1]).transpose(0, 1)
            if form == "batch first":
                return Above.apply(x.transpose(0, 1) - 1.0).transpose(0, 1)
            return Above.apply(x - 1.0)

    class Each(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([Above.apply(now - 1.0) for now in x])

    for estimator in (ULR(firing=Logistic(0.4)), ULR(credit="global", copies=2, firing=Logistic(0.4))):
        nets = (layered(lambda _, kind=kind: kind()) for kind in (Once, Each))
        at_once, in_steps = (gradients(net, estimator, lengths) for net in nets)
        assert all(float(g.abs().max()) > 0 for g in at_once)
        for a, b in zip(at_once, in_steps, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_all_time_steps_at_once_are_drawn_by_one_kernel(monkeypatch):
    """And not by one for each time step, which made such models slow."""

    class Once(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Above.apply(x - 1.0)

    drawn, draw = [], dispatch.StepDraw.__call__
    monkeypatch.setattr(dispatch.StepDraw, "__call__", lambda self, t, drive: drawn.append(t) or draw(self, t, drive))
    x, y = data()
    with attach(layered(lambda _: Once()).float(), ULR(), seed=5) as ulr:
        ulr.backward(x.float(), y)
    assert drawn == [0, 0]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("lengths", [None, torch.tensor([9, 3, 5, 1] * 4)], ids=["whole", "lengths"])
def test_later_calls_do_what_the_first_one_does(lengths, frozen, monkeypatch):
    """They run in a fraction of its time. Frozen layers fire without noise."""

    class Each(nn.Module):
        def __init__(self, function: Any, *rest: Any) -> None:
            super().__init__()
            self.function, self.rest = function, rest

        def forward(self, x: Tensor) -> Tensor:
            v, found = torch.zeros_like(x[0]), []
            for now in x:
                v = 0.9 * v + now
                fired = self.function.apply(v, *self.rest)
                v = v - fired
                found.append(fired)
            return torch.stack(found)

    x, y = data()

    def found() -> list[Tensor]:
        torch.manual_seed(3)
        layers = [Each(Half), Each(AtLeast, 3.0), Each(Over, torch.tensor(0.8)), Each(Sign)]
        model = nn.Sequential(*(m for layer in layers for m in (nn.Linear(INPUTS, INPUTS), layer)))
        model.append(nn.Linear(INPUTS, CLASSES))
        model[:-1].requires_grad_(not frozen)
        with attach(model, ULR(), seed=5) as ulr:
            ulr.backward(x.float(), y, lengths=lengths)
            ulr.backward(x.float(), y, lengths=lengths)
        return [q.grad for q in model.parameters() if q.requires_grad]

    used, later = [], Later.__call__
    monkeypatch.setattr(Later, "__call__", lambda self, arguments: used.append(1) or later(self, arguments))
    fast = found()
    assert len(used) >= 4 * (STEPS - 1)
    assert all(float(g.abs().max()) > 0 for g in fast)
    monkeypatch.setattr(Place, "later", lambda *about: None)
    assert all(map(torch.equal, fast, found()))


def test_layers_on_one_line_are_told_apart_where_they_can_be():
    """Each call that holds all time steps is a site, and so are calls with other numbers of neurons."""

    class Deep(nn.Module):
        def __init__(self, widths: tuple[int, ...], steps: bool) -> None:
            super().__init__()
            sizes = zip((INPUTS, *widths[:-1]), widths, strict=True)
            self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in sizes)
            self.out, self.steps = nn.Linear(widths[-1], CLASSES), steps

        def forward(self, x: Tensor) -> Tensor:
            if self.steps:
                return torch.stack([self.one(now) for now in x])
            return self.one(x)

        def one(self, x: Tensor) -> Tensor:
            for linear in self.layers:
                x = Above.apply(linear(x) - 0.5)
            return self.out(x)

    torch.manual_seed(0)
    for model in (Deep((6, 6), steps=False), Deep((8, 6), steps=True)):
        assert [site for site, *_ in plan(model.double(), data()).sites] == ["Above", "Above_2"]
        assert all(float(g.abs().max()) > 0 for g in gradients(model, ULR()))


# -- what is left alone ------------------------------------------------------------------------------------


def functions() -> Iterator[tuple[type[Function], dict[str, Any]]]:
    for function in (Above, AtLeast, Half, Over, Ternary, Count):
        yield function, dict(vars(function))


def test_functions_are_let_go_as_they_were():
    before = dict(functions())
    gradients(layered(lambda beta: Own(beta, "zero", lambda v: AtLeast.apply(v, 2.0))), ULR())
    model = layered(lambda beta: Own(beta, "zero", Above.apply))
    with pytest.raises(ValueError, match="in the midst"), attach(model, ULR(), seed=5) as ulr:
        ulr.backward(*data())
        model[0].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("in the midst")))
        ulr.backward(*data())
    for function, attributes in before.items():
        assert dict(vars(function)) == attributes
    own = torch.randn(3, 4)
    assert torch.equal(Above.apply(own), (own > 0).float())


def test_other_threads_call_the_functions_own_forward():
    """While one thread trains, another's calls of the same function stay as they are."""
    stop, wrong = threading.Event(), []

    def calls() -> None:
        x = torch.linspace(-1, 1, 64)
        while not stop.is_set():
            if not torch.equal(Above.apply(x), (x > 0).float()):
                wrong.append(1)

    other = threading.Thread(target=calls)
    other.start()
    try:
        gradients(layered(lambda beta: Own(beta, "zero", Above.apply)), ULR(), times=20)
    finally:
        stop.set()
        other.join()
    assert not wrong


def test_a_handler_of_a_handler_is_put_back():
    def first(own: Any, arguments: Any) -> Any:
        return own() + 1, None

    def second(own: Any, arguments: Any) -> Any:
        return own() + 2, None

    x = torch.tensor([-1.0, 1.0])
    with handled(AtLeast, first):
        with handled(AtLeast, second):
            assert AtLeast.apply(x, 1.0).tolist() == [2.0, 3.0]
        assert AtLeast.apply(x, 1.0).tolist() == [1.0, 2.0]
    assert AtLeast.apply(x, 1.0).tolist() == [0.0, 1.0]


def test_a_calls_backward_may_be_another_functions():
    """`intercept.set_backward` relies on how torch looks a backward up; this fails if torch changes it."""
    from ulr_snn.adapters.intercept import set_backward

    class Double(Function):
        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    x = torch.ones(3, requires_grad=True)
    with handled(Above, lambda own, arguments: (own(), lambda ctx: set_backward(ctx, Double))):
        Above.apply(x).sum().backward()
    assert x.grad.tolist() == [2.0] * 3


def test_evaluation_is_that_of_the_models_own_forward():
    model = layered(lambda beta: Own(beta, "zero", Above.apply)).float()
    x, y = data()[0].float(), data()[1]
    with torch.no_grad():
        own = model(x)
    assert evaluate(model, [(x, y)], loss=lambda o, _: (o - own).abs().amax((0, 2)), device="cpu")["loss"] == 0
    noisy = evaluate(model, [(x, y)], mode="stochastic", copies=4, device="cpu")
    assert noisy["samples"] == BATCH


def test_weights_of_few_values_keep_their_functions():
    """A straight-through estimator of weights is no neuron; nothing draws it."""

    class Binary(Straight):
        @staticmethod
        def forward(ctx, w):
            return (w > 0).to(w)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, INPUTS))
            self.neuron, self.out = Own(0.8, "zero", Above.apply), nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.neuron(x @ Binary.apply(self.weight).T))

    torch.manual_seed(0)
    found = plan(Net().double(), data())
    assert [site for site, *_ in found.sites] == ["neuron"] and not found.untrained
    assert all(float(g.abs().max()) > 0 for g in gradients(Net().double(), ULR()))


def test_a_readout_behind_frozen_layers_trains_and_layers_may_thaw():
    """No surrogate is asked for, before and after."""
    model, (x, y) = layered(lambda beta: Own(beta, "subtract", Above.apply)), data()
    model[:4].requires_grad_(False)

    def mean_loss() -> Tensor:
        return nn.functional.cross_entropy(model(x.double()).sum(0), y)

    with attach(model, seed=5, total_steps=8) as ulr:
        ulr.backward(x, y)
        exact = torch.autograd.grad(mean_loss(), list(model[4].parameters()))
        for q, expected in zip(model[4].parameters(), exact, strict=True):
            torch.testing.assert_close(q.grad, expected)
        for thawed, sites in ((model[2], 1), (model[0], 2)):
            thawed.requires_grad_(True)
            ulr.backward(x, y)
            assert all(float(q.grad.abs().max()) > 0 for q in thawed.parameters())
            assert len(ulr.structure.exact) == sites


# -- the rest of the library -------------------------------------------------------------------------------


def test_sites_are_named_after_the_innermost_module_of_their_own():
    names = [site for site, *_ in plan(layered(lambda beta: Own(beta, "zero", Above.apply)), data()).sites]
    assert names == ["1", "3"]

    class Gates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(INPUTS, 6), nn.Linear(INPUTS, 6), nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(Above.apply(self.a(x)) * Above.apply(self.b(x)))

    found = plan(Gates().double(), data())
    assert [site for site, *_ in found.sites] == ["Above", "Above_2"]


def test_a_decision_that_only_a_detached_reset_reads_gets_no_noise():
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            v, found = torch.zeros_like(x[0]), []
            for now in x:
                reset = Above.apply(v - 1.0).detach()
                v = 0.8 * v * (1 - reset) + now
                found.append(Above.apply(v - 1.0))
            return torch.stack(found)

    found = plan(nn.Sequential(nn.Linear(INPUTS, 6), Twice(), nn.Linear(6, CLASSES)).double(), data())
    says = {site: credit for site, _, credit in found.sites}
    assert says["1.Above"].startswith("none, and no noise") and says["1.Above_2"] == "direct"


def test_training_compares_records_and_diagnoses():
    """Own neurons with a surrogate that works, so that BPTT has it too."""

    class Smooth(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (x > 0).to(x)

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            return gradient / (1 + 10 * x.abs()) ** 2

    def model() -> nn.Module:
        return layered(lambda beta: Own(beta, "zero", Smooth.apply)).float()

    x, y = data()
    batches = [(x.float(), y)] * 4
    result = train(model(), batches, epochs=2, progress=False, device="cpu", val_loader=batches)
    assert result.metrics["forward_passes"] >= 8 * BATCH
    recorded = ulr_snn.runs.recording.record(model(), batches[0])
    assert list(recorded.layers) == ["1", "3"] and recorded.layers["1"].spikes.shape == (STEPS, BATCH, 8)
    membranes = recorded.layers["1"].membranes
    assert membranes is not None and torch.isfinite(membranes).all()
    found = ulr_snn.compare(model(), batches, batches, epochs=1, lr={"surrogate": [1e-2]}, progress=False)
    assert "surrogate" in str(found)
    assert "surrogate" in str(ulr_snn.diagnose(model(), batches[0], draws=4, reference_draws=4, warm_up=2))


def test_ulrs_own_neurons_may_stand_beside():
    torch.manual_seed(0)
    layers = nn.Linear(INPUTS, 8), LIF(0.8), nn.Linear(8, 6), Own(0.7, "zero", Above.apply), nn.Linear(6, CLASSES)
    model = nn.Sequential(*layers).double()
    found = plan(model, data())
    assert [(site, credit) for site, _, credit in found.sites] == [("1", "exact map to layer 3"), ("3", "direct")]
    assert all(float(g.abs().max()) > 0 for g in gradients(model, ULR()))


def test_noise_on_the_current_of_such_a_module_can_be_asked_for():
    model = layered(lambda beta: Own(beta, "zero", Above.apply)).float()
    x, y = data()
    found = plan(model, (x.float(), y), ULR(noise={"1": CurrentNoise(), "3": CurrentNoise()}))
    assert all(noise.startswith("gaussian on its current") for _, noise, _ in found.sites)


# -- what cannot be ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "why"),
    [
        (ULR(credit="residual"), "credit='residual' needs layers one by one"),
        (ULR(maps="learned"), "maps='learned' needs layers one by one"),
        (ULR(noise={"1": CurrentNoise()}), "1 has noise on its current"),
        (ULR(credit="feedback", sampling=Independent(2, multi_sample=True)), "ULR got multi_sample"),
    ],
    ids=["residual", "learned", "current", "multi-sample"],
)
def test_what_needs_layers_one_by_one_is_refused(estimator, why):
    model = layered(lambda beta: Own(beta, "zero", Above.apply))
    with pytest.raises(UsageError, match=why):
        plan(model, data(), estimator)


def test_code_that_did_not_run_in_the_first_batch_is_refused():
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            return Above.apply(x - 1.0) if x.shape[1] == BATCH or x.shape[1] < 4 else 1 * Above.apply(x - 0.5)

    model = nn.Sequential(nn.Linear(INPUTS, 6), Fickle(), nn.Linear(6, CLASSES)).double()
    x, y = data()
    with attach(model, ULR(), seed=5) as ulr:
        ulr.backward(x, y)
        with pytest.raises(UsageError, match="Above fires at a place in the model's code where it did not run"):
            ulr.backward(x[:, :8], y[:8])


def test_a_threshold_that_changes_after_the_first_batch_is_refused():
    class Moving(Unasked):
        at = 1.0

        @staticmethod
        def forward(ctx, x):
            return (x > Moving.at).to(x)

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([Moving.apply(now) for now in x])

    x, y = data()
    with attach(nn.Sequential(nn.Linear(INPUTS, 6), Net(), nn.Linear(6, CLASSES)).double(), ULR(), seed=5) as ulr:
        ulr.backward(x, y)
        Moving.at = 2.0
        with pytest.raises(UsageError, match="Moving has another threshold than in the first batch"):
            ulr.backward(x, y)


def test_code_that_runs_or_is_made_anew_is_refused():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda z: Above.apply(z - 1.0), x, use_reentrant=False)

    class Making(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            class Made(Unasked):
                @staticmethod
                def forward(ctx, x):
                    return (x > 0).to(x)

            return Made.apply(x - 1.0)

    for kind, why in (
        (Checkpointed, "leave torch.utils.checkpoint out"),
        (Making, "the model makes Made"),
    ):
        with pytest.raises(UsageError, match=why):
            plan(nn.Sequential(nn.Linear(INPUTS, 6), kind(), nn.Linear(6, CLASSES)).double(), data())


class WholeStep(Unasked):
    """A time step of LIF neurons, membranes and spikes."""

    @staticmethod
    def forward(ctx, v, x):
        spikes = (0.8 * v + x > 1).to(x)
        return spikes, 0.8 * v + x - spikes


class Mapped(Unasked):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return (x > 0).to(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


@torch.library.custom_op("ulr_snn_tests::fire", mutates_args=())
def fire(x: Tensor) -> Tensor:
    return (x > 0).to(x)


fire.register_autograd(lambda ctx, gradient: gradient)


class Looped(nn.Module):
    """A layer of neurons and a readout. step: the neurons' time step, (membranes, current) -> (spikes, membranes)."""

    def __init__(self, step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.step, self.input, self.out = step, nn.Linear(INPUTS, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        v, found = torch.zeros(x.shape[1], 6).to(x), []
        for now in x:
            spikes, v = self.step(v, self.input(now))
            found.append(self.out(spikes))
        return torch.stack(found)


def leaky(fire: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def step(v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        spikes = fire(0.8 * v + x - 1.0)
        return spikes, 0.8 * v + x - spikes

    return step


class Ensemble(nn.Module):
    """Members of one weight each, by vmap or on an axis behind the samples."""

    def __init__(self, mapped: bool) -> None:
        super().__init__()
        self.mapped, self.weight, self.out = mapped, nn.Parameter(torch.rand(3, INPUTS, 6)), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.mapped:
            spikes = torch.func.vmap(lambda weight: Mapped.apply(x @ weight - 1.0))(self.weight)
            return self.out(spikes).mean(0)
        return self.out(Mapped.apply(torch.einsum("tbi,eio->tbeo", x, self.weight) - 1.0)).mean(2)


class MicroBatches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Looped(leaky(Above.apply))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(part) for part in x.chunk(2, 1)], 1)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (
            lambda: Looped(WholeStep.apply),
            "Looped has no layer that gets noise: WholeStep in Looped .* 2 tensors",
        ),
        (lambda: Looped(leaky(fire)), "the operation ulr_snn_tests::fire fires"),
        (MicroBatches, "Above in Looped fires for a part of the batch in a call"),
        (lambda: Ensemble(mapped=True), "Mapped runs inside of vmap"),
    ],
)
def test_what_fires_and_gets_no_noise_is_named(model, why):
    with pytest.raises(UsageError, match=why):
        train(model().double(), [data()], epochs=1, progress=False, device="cpu")


def test_what_is_advised_in_their_place_trains():
    for model in (Looped(leaky(Above.apply)), Ensemble(mapped=False)):
        found = plan(model.double(), data())
        assert found.sites and not found.untrained


def test_a_module_that_is_made_anew_fires_at_one_place():
    class Fires(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Above.apply(x)

    class Neuron(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([Fires()(now - 1.0) for now in x])

    made = gradients(layered(lambda _: Neuron()), ULR(firing=Logistic(0.4)))
    assert all(float(g.abs().max()) > 0 for g in made)


# -- SpikingJelly's nodes that no adapter takes over -------------------------------------------------------


def jelly(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A model with two layers of these nodes, and the features of its input."""
    neuron = library_of("spikingjelly.activation_based.neuron")
    layer = library_of("spikingjelly.activation_based.layer")
    functional = library_of("spikingjelly.activation_based.functional")
    makes: dict[str, Callable[[int], nn.Module]] = {
        "GatedLIFNode": lambda n: neuron.GatedLIFNode(STEPS, n),
        "MPBNLIFNode": lambda n: neuron.MPBNLIFNode(out_channels=n),
        "LIAFNode": lambda n: neuron.LIAFNode(torch.relu, False),
        "SimpleLIFNode": lambda n: neuron.SimpleLIFNode(2.0, True),
        "PSN": lambda n: neuron.PSN(STEPS),
        "MaskedPSN": lambda n: neuron.MaskedPSN(2, STEPS, lambda_init=1.0, step_mode="m"),
        "SlidingPSN": lambda n: neuron.SlidingPSN(2, step_mode="m"),
    }
    make = makes.get(name, lambda n: getattr(neuron, name)())
    torch.manual_seed(0)
    if name.startswith("ILC"):  # populations of 2 x 3 neurons that excite each other
        nodes = [getattr(neuron, name)(2, 3) for _ in range(2)]
        return nn.Sequential(nn.Linear(INPUTS, 6), nodes[0], nn.Linear(6, 6), nodes[1], nn.Linear(6, CLASSES)), (
            INPUTS,
        )
    layers = layer.Conv2d(2, 4, 3, padding=1), layer.BatchNorm2d(4), make(4), layer.Conv2d(4, 6, 3), make(6)
    model = nn.Sequential(*layers, layer.Flatten(), layer.Linear(24, CLASSES))
    functional.set_step_mode(model, "m")
    return model, (2, 4, 4)


NODES = [
    *("SimpleIFNode", "SimpleLIFNode", "CUBALIFNode", "RAFNode", "ComplementaryLIFNode", "GatedLIFNode", "LIAFNode"),
    *("MPBNLIFNode", "TernaryIFNode", "TernaryLIFNode", "PSN", "MaskedPSN", "SlidingPSN", "ILIFNode", "ILCIFNode"),
    *("ILCLIFNode", "ILCCUBALIFNode"),
]


@pytest.mark.product
@pytest.mark.parametrize("name", NODES)
def test_nodes_of_spikingjelly_train_without_their_surrogates(name, monkeypatch):
    functional = library_of("spikingjelly.activation_based.functional")
    model, features = jelly(name)
    x = 2 * torch.rand(STEPS, 6, *features, generator=torch.Generator().manual_seed(1))
    batch = x, torch.arange(6) % CLASSES
    with torch.no_grad():
        own = model.eval()(x)
    functional.reset_net(model)
    assert evaluate(model, [batch], loss=lambda o, _: (o - own).abs().amax((0, 2)), device="cpu")["loss"] == 0
    surrogates = library_of("spikingjelly.activation_based.surrogate")
    for kind in vars(surrogates).values():
        if isinstance(kind, type) and issubclass(kind, Function) and kind is not Function:
            monkeypatch.setattr(kind, "backward", staticmethod(lambda *_: pytest.fail("a surrogate was asked for")))
    before = {q: p.clone() for q, p in model.named_parameters()}
    train(model.train(), [batch] * 2, epochs=2, progress=False, device="cpu", loss="ce_rate")
    weights = [q for q, p in model.named_parameters() if p.ndim > 1][:2]
    assert not any(torch.equal(model.get_parameter(q), before[q]) for q in weights)


@pytest.mark.parametrize("name", ["SpikingLSTM", "SpikingGRU", "SpikingVanillaRNN"])
def test_recurrent_nets_of_spikingjelly_train(name):
    rnn = library_of("spikingjelly.activation_based.rnn")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = getattr(rnn, name)(INPUTS, 8, 2), nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0])

    torch.manual_seed(0)
    model, (x, y) = Net(), data()
    found = plan(model, (x.float(), y))
    assert found.sites and not found.untrained
    train(model, [(x.float(), y)] * 2, epochs=2, progress=False, device="cpu")


def test_a_function_that_chooses_by_another_rule_keeps_its_gradient_and_is_noted():
    class Largest(Straight):
        @staticmethod
        def forward(ctx, x):
            return nn.functional.one_hot(x.argmax(-1), x.shape[-1]).to(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.neuron, self.b = nn.Linear(INPUTS, 6), Own(0.8, "zero", Above.apply), nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(Largest.apply(self.neuron(self.a(x)) + self.a(x)))

    found = plan(Net().double(), data())
    assert any(note.startswith("Largest in Net gives 0 or one value") for note in found.notes)


def test_a_threshold_that_also_runs_without_gradients_is_not_noted():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(INPUTS, 6), nn.Linear(6, CLASSES)

        def step(self, x: Tensor, membrane: Tensor | float) -> tuple[Tensor, Tensor]:
            membrane = 0.9 * membrane + self.a(x)
            return membrane, Above.apply(membrane - 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                membrane, _ = self.step(x[0], 0.0)
            outputs = []
            for now in x:
                membrane, spikes = self.step(now, membrane)
                outputs.append(self.b(spikes))
            return torch.stack(outputs)

    assert not any("gives 0 or one value" in note for note in plan(Net().double(), data()).notes)
