"""Models of other libraries: their neurons run as they do, are let go as they were, and get the right gradient."""

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ulr_snn
from tests.helpers import Loop, library_of, nets, raising, separable
from ulr_snn import LIF, ULR, Logistic, RecurrentLIF, TimeAverage, UsageError, attach, evaluate, plan, train
from ulr_snn.adapters import adapt
from ulr_snn.credit.recurrence import Recurrence, StepRecurrence
from ulr_snn.losses.named import resolve
from ulr_snn.model.batch import Batch
from ulr_snn.model.call import model_outputs
from ulr_snn.model.finding import find_call
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.noise.random import Noise
from ulr_snn.sites.binding import bind, bind_sites
from ulr_snn.sites.records import Record

LONG, STEPS, BATCH = 100, 6, 4


@dataclass
class Kind:
    """A spiking module with its options: how it is made, the features [...] of a step, whether a call is one step."""

    library: str
    make: Callable[[Any], nn.Module]
    shape: tuple[int, ...] = (6,)
    by_step: bool = True
    gain: float = 2.0  # of random inputs: enough to fire


def way(model: nn.Module, batch: tuple[Tensor, Tensor]) -> str:
    """Returns how the model is called."""
    return find_call(model, Batch.of(model, *batch, None, resolve("ce_count")))[0].way


def snntorch_kinds() -> Iterator[tuple[str, Kind]]:
    def kind(name: str, shape: tuple[int, ...] = (6,), by_step: bool = True, **options: Any) -> Kind:
        hidden = {"init_hidden": True} if by_step else {}
        return Kind("snntorch", lambda snn: getattr(snn, name)(**options, **hidden), shape, by_step)

    per_neuron = torch.linspace(0.5, 1.5, 6)
    for reset in ("subtract", "zero", "none"):
        for delay in (True, False):
            how = {"reset_mechanism": reset, "reset_delay": delay}
            late = "" if delay else ", reset at once"
            yield f"Leaky, {reset}{late}", kind("Leaky", beta=0.9, learn_beta=True, **how)
            yield f"Synaptic, {reset}{late}", kind("Synaptic", alpha=0.8, beta=0.9, learn_alpha=True, **how)
            yield f"RLeaky, {reset}{late}", kind("RLeaky", beta=0.9, linear_features=6, learn_beta=True, **how)
        how = {"reset_mechanism": reset}
        yield f"RSynaptic, {reset}", kind("RSynaptic", alpha=0.8, beta=0.9, linear_features=6, **how)
        yield f"Alpha, {reset}", kind("Alpha", alpha=0.9, beta=0.8, learn_beta=True, **how)
        yield f"Lapicque, {reset}", kind("Lapicque", beta=0.9, **how)
        yield f"SLSTM, {reset}", kind("SLSTM", input_size=6, hidden_size=6, threshold=0.2, **how)
        lstm = {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "threshold": 0.1}
        yield f"SConv2dLSTM, {reset}", kind("SConv2dLSTM", (2, 6, 6), **lstm, **how)
        yield f"SConv2dLSTM, pooled, {reset}", kind("SConv2dLSTM", (2, 6, 6), max_pool=2, **lstm, **how)
    yield "RLeaky, one to one", kind("RLeaky", beta=0.9, all_to_all=False, V=0.5)
    yield "RLeaky, convolution", kind("RLeaky", (2, 5, 5), beta=0.9, conv2d_channels=2, kernel_size=3)
    yield "Leaky, output", kind("Leaky", beta=0.9, output=True)
    yield "Leaky, inhibition", kind("Leaky", beta=0.9, inhibition=True)
    yield "Leaky, graded", kind("Leaky", beta=0.9, graded_spikes_factor=0.5, learn_graded_spikes_factor=True)
    yield "Leaky, thresholds", kind("Leaky", beta=0.9, threshold=per_neuron, learn_threshold=True)
    yield "DeltaLeaky", kind("DeltaLeaky", delta_threshold=0.1, beta=0.9)
    yield "LeakyParallel", kind("LeakyParallel", by_step=False, input_size=6, hidden_size=5, threshold=0.2)
    yield "StateLeaky", kind("StateLeaky", by_step=False, beta=0.9, channels=6, threshold=5.0)
    yield "LinearLeaky", kind("LinearLeaky", by_step=False, beta=0.9, in_features=6, out_features=5)
    associative = {"in_dim": 6, "d_value": 4, "d_key": 4, "num_spiking_neurons": 16}
    yield "AssociativeLeaky", kind("AssociativeLeaky", by_step=False, **associative)


def norse_kinds() -> Iterator[tuple[str, Kind]]:
    feed_forward = ("LIF", "LIFEx", "LIFAdEx", "LIFRefrac", "LIFAdExRefrac", "LSNN", "IAF", "LIFBox")
    recurrent = ("LIF", "LIFEx", "LIFAdEx", "LIFRefrac", "LIFAdExRefrac", "LSNN")

    def kind(name: str, by_step: bool, *arguments: Any, gain: float = 2.0) -> Kind:
        return Kind("norse.torch", lambda norse: getattr(norse, name)(*arguments), (6,), by_step, gain)

    for name in feed_forward:
        yield f"{name}Cell", kind(f"{name}Cell", True)
        if name not in ("LIFRefrac", "LIFAdExRefrac", "LIFBox"):
            yield name, kind(name, False)
    for name in recurrent:
        yield f"{name}RecurrentCell", kind(f"{name}RecurrentCell", True, 6, 5)
        yield f"{name}Recurrent", kind(f"{name}Recurrent", False, 6, 5)
    for name in ("Izhikevich", "IzhikevichRecurrent"):
        sizes = (6, 5) if "Recurrent" in name else ()
        for suffix, by_step in (("", False), ("Cell", True)):

            def make(norse: Any, name: str = name + suffix, sizes: tuple = sizes) -> nn.Module:
                behaviour = import_module("norse.torch.functional.izhikevich").tonic_spiking
                return getattr(norse, name)(*sizes, behaviour)

            yield name + suffix, Kind("norse.torch", make, (6,), by_step, 300.0)


def spikingjelly_kinds() -> Iterator[tuple[str, Kind]]:
    names = {"IFNode": 1.0, "LIFNode": 2.0, "ParametricLIFNode": 2.0, "KLIFNode": 2.0}
    names |= {"QIFNode": 2.0, "EIFNode": 2.0, "IzhikevichNode": 2.0, "HalfThresholdIFNode": 1.0}
    names |= {"SLTTLIFNode": 2.0, "OTTTLIFNode": 2.0, "ILIFNode": 2.0}
    for name, gain in names.items():
        hard = name in ("QIFNode", "EIFNode", "IzhikevichNode")
        soft = name in ("HalfThresholdIFNode", "ILIFNode")
        for reset in ("soft",) if soft else ("hard",) if hard else ("hard", "soft"):
            for mode in "s" if name in ("SLTTLIFNode", "OTTTLIFNode") else "sm":
                options: dict[str, Any] = {"step_mode": mode}
                if not soft:
                    options["v_reset"] = 0.0 if reset == "hard" else None
                if hard:
                    options["v_reset"] = -0.1

                def make(neuron: Any, name: str = name, options: dict = options) -> nn.Module:
                    return getattr(neuron, name)(**options)

                library = "spikingjelly.activation_based.neuron"
                yield f"{name}, {reset} reset, mode {mode}", Kind(library, make, (6,), mode == "s", gain)


KINDS = {f"{library}: {name}": kind for library, kinds in (
    ("snnTorch", snntorch_kinds()), ("Norse", norse_kinds()), ("SpikingJelly", spikingjelly_kinds())
) for name, kind in kinds}  # fmt: skip


def made(kind: Kind, dtype: torch.dtype = torch.float32) -> nn.Module:
    library = library_of(kind.library)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind.make(library).to(dtype)


def events(kind: Kind, steps: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return kind.gain * torch.rand(steps, BATCH, *kind.shape, generator=generator, dtype=dtype)


@pytest.fixture
def double() -> Iterator[None]:
    """Libraries make their states in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def noise(seed: int = 3) -> Noise:
    sample = torch.arange(BATCH, dtype=torch.int32)
    return Noise(seed, 0, sample, torch.zeros_like(sample))


# -- one module --------------------------------------------------------------------------------------------


@pytest.mark.product
@pytest.mark.parametrize("name", KINDS)
def test_deterministic_firing_is_the_librarys_own_bit_for_bit(name):
    module, x = made(KINDS[name]), events(KINDS[name], LONG)
    by_step = KINDS[name].by_step
    with torch.no_grad():
        expected = model_outputs(copy.deepcopy(module), x, by_step)
        with bind(module, NoiseLevel(Logistic()), steps=LONG):
            ours = model_outputs(module, x, by_step)
        assert torch.equal(ours, expected)
    assert 0 < int((expected != 0).sum()) < expected.numel()


@pytest.mark.parametrize("name", KINDS)
def test_a_module_is_let_go_as_it_was(name):
    module, x = made(KINDS[name]), events(KINDS[name], STEPS)
    attributes, keys = dict(module.__dict__), list(module.state_dict())
    buffers = dict(module._buffers)
    with bind(module, NoiseLevel(Logistic(0.5)), noise(), steps=STEPS) as records:
        model_outputs(module, x, KINDS[name].by_step)
    assert len(records) == 1
    assert list(module.__dict__) == list(attributes)
    assert all(module.__dict__[key] is value for key, value in attributes.items())
    assert module._buffers.keys() == buffers.keys()
    assert all(module._buffers[key] is value for key, value in buffers.items())
    assert list(module.state_dict()) == keys
    copy.deepcopy(module)


@dataclass
class Forced:
    """Fires given spikes and keeps the drives."""

    spikes: Tensor
    drives: list[Tensor] = field(default_factory=list)
    last: Tensor | None = None
    resetting: Tensor | None = None

    def begin(self, current: Tensor) -> None:
        pass

    def fire(self, drive: Tensor) -> Tensor:
        self.last = self.spikes if drive.ndim == self.spikes.ndim else self.spikes[len(self.drives)]
        self.resetting = self.last
        self.drives.append(drive)
        return self.last

    def end(self, states: list[Any]) -> None:
        pass


@contextmanager
def forced(module: nn.Module, spikes: Tensor) -> Iterator[Forced]:
    site = Forced(spikes)
    with bind_sites(module, [site], None):
        yield site


def one_pass(kind: Kind) -> tuple[nn.Module, Tensor, Record]:
    """A module in float64, events and what a stochastic pass over them left."""
    module, x = made(kind, torch.float64), events(kind, STEPS, torch.float64).requires_grad_()
    with bind(module, NoiseLevel(Logistic(0.5)), noise(), steps=STEPS) as records:
        model_outputs(module, x, kind.by_step)
    (record,) = records
    return module, x, record


def trainable(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", KINDS)
def test_the_local_derivative_is_a_finite_difference_at_fixed_spikes(name, double):
    """∂u/∂(input and parameters) with the spikes held fixed, in float64, along a random direction."""
    kind = KINDS[name]
    module, x, record = one_pass(kind)
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(record.x.shape, generator=generator, dtype=torch.float64)
    asked = {"input": x, **trainable(module)}
    found = torch.autograd.grad(record.x, list(asked.values()), weights, allow_unused=True)
    assert found[0].abs().sum() > 0
    for (label, tensor), gradient in zip(asked.items(), found, strict=True):
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if label == "recurrent_weights":
            direction.fill_diagonal_(0.0)  # Norse leaves the diagonal out of the gradient

        def value(size: float, tensor: Tensor = tensor, direction: Tensor = direction) -> float:
            with torch.no_grad(), forced(module, record.spikes) as site:
                tensor.add_(size * direction)
                model_outputs(module, x.detach(), kind.by_step)
                tensor.sub_(size * direction)
            drives = torch.stack(site.drives) if len(site.drives) > 1 else site.drives[0]
            return float((weights * drives / record.scale).sum())

        difference = (value(1e-6) - value(-1e-6)) / 2e-6
        ours = 0.0 if gradient is None else float((gradient * direction).sum())
        assert ours == pytest.approx(difference, rel=1e-5, abs=1e-6), label


@pytest.mark.parametrize("name", KINDS)
def test_response_is_the_transpose_of_credit(name, double):
    _, _, record = one_pass(KINDS[name])
    generator = torch.Generator().manual_seed(2)
    a, innovations = (torch.randn(record.x.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    change = torch.randn(record.current.shape, generator=generator, dtype=torch.float64)
    path = StepRecurrence(record)
    if record.trace is None:  # it runs as a scan
        path = Recurrence(record.neuron, record.response_of_membrane, record.spikes.detach(), record.membrane)
    total, currents = path.credit(a)
    left = (a * path.response(innovations, change)).sum()
    torch.testing.assert_close(left, (total * innovations).sum() + (currents * change).sum())
    assert currents.abs().sum() > 0


# -- same noise, same gradient -----------------------------------------------------------------------------


def native(recurrent: bool, reset: str) -> nn.Sequential:
    learn = {"reset": reset, "learn_beta": True, "learn_threshold": True}
    first = RecurrentLIF(8, 0.8, **learn) if recurrent else LIF(0.8, **learn)
    return nn.Sequential(nn.Linear(5, 8), first, nn.Linear(8, 6), LIF(0.7, **learn), nn.Linear(6, 3)).double()


def pairs(loop: nn.Module, ours: nn.Sequential) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Parameters of the two that mean the same."""
    found = []
    for theirs, own in ((loop.fc1, ours[0]), (loop.fc2, ours[2]), (loop.fc3, ours[4])):
        found += [(theirs.weight, own.weight), (theirs.bias, own.bias)]
    for theirs, own in ((loop.lif1, ours[1]), (loop.lif2, ours[3])):
        found += [(theirs.beta, own.beta), (theirs.threshold, own.threshold)]
    if loop.recurrent:
        found.append((loop.lif1.recurrent.weight, ours[1].recurrent.weight))
    return found


def gradient_of(model: nn.Module, estimator: ULR, batch: tuple[Tensor, Tensor], lengths: Tensor | None = None) -> None:
    model.zero_grad()
    with attach(model, estimator, seed=5, total_steps=8) as ulr:
        ulr.binder.own_code = True  # tests/test_engine.py is about the other
        for _ in range(3):
            ulr.backward(*batch, lengths=lengths)


@pytest.mark.parametrize("lengths", [None, torch.tensor([9, 3, 5, 1] * 4)], ids=["whole", "lengths"])
@pytest.mark.parametrize("reset", ["subtract", "none"])
@pytest.mark.parametrize(
    ("recurrent", "estimator"),
    [
        (False, ULR()),
        (False, ULR(credit="feedback", copies=2)),
        (False, ULR(credit="residual", copies=4)),
        (False, ULR(credit="global", copies=2)),
        (True, ULR(credit="global", copies=2, firing=Logistic(0.4))),
    ],
    ids=["feedback", "feedback, a pair", "residual", "global", "recurrent, global"],
)
def test_snntorch_and_our_own_neurons_get_the_same_gradient(reset, recurrent, estimator, lengths):
    """Equal equations, noise and start of the noise, on two paths through the library."""
    snn = library_of("snntorch")
    torch.manual_seed(0)
    ours = native(recurrent, reset)
    loop = Loop(snn, recurrent, reset_mechanism=reset, learn_beta=True, learn_threshold=True).double()
    if recurrent:
        nn.init.zeros_(loop.lif1.recurrent.bias)
        nn.init.normal_(ours[1].recurrent.weight, 0.0, 0.3)
    for theirs, own in pairs(loop, ours):
        theirs.data.copy_(own.data)
    batch = (torch.rand(9, 16, 5) < 0.5).double() * 2, torch.randint(0, 3, (16,))
    gradient_of(ours, estimator, batch, lengths)
    gradient_of(loop, estimator, batch, lengths)
    for theirs, own in pairs(loop, ours):
        assert own.grad.abs().sum() > 0
        torch.testing.assert_close(theirs.grad.view_as(own.grad), own.grad, rtol=1e-9, atol=1e-12)


def test_a_model_called_once_a_step_is_the_model_with_the_loop():
    snn = library_of("snntorch")
    torch.manual_seed(0)
    loop = Loop(snn, False).double()
    hidden = nn.Sequential(
        loop.fc1, snn.Leaky(0.8, init_hidden=True), loop.fc2, snn.Leaky(0.7, init_hidden=True), loop.fc3
    ).double()
    batch = (torch.rand(9, 16, 5) < 0.5).double() * 2, torch.randint(0, 3, (16,))
    assert (way(hidden, batch), way(loop, batch)) == ("step", "sequence")
    gradient_of(loop, ULR(), batch)
    expected = [p.grad.clone() for p in loop.parameters()]
    gradient_of(hidden, ULR(), batch)
    torch.testing.assert_close([p.grad for p in hidden.parameters()], expected)
    own, theirs = (evaluate(model, [batch]) for model in (hidden, loop))
    assert own == theirs


def test_norse_cells_in_a_sequential_carry_their_states():
    norse = library_of("norse.torch")
    torch.manual_seed(0)
    cells = norse.SequentialState(nn.Linear(5, 8), norse.LIFCell(), nn.Linear(8, 3))
    layers = norse.SequentialState(cells[0], norse.LIF(), cells[2])
    batch = 20 * torch.rand(9, 16, 5), torch.randint(0, 3, (16,))
    assert (way(cells, batch), way(layers, batch)) == ("step", "sequence")
    gradient_of(cells, ULR(), batch)
    expected = [p.grad.clone() for p in cells.parameters()]
    gradient_of(layers, ULR(), batch)
    assert expected[0].abs().sum() > 0
    torch.testing.assert_close([p.grad for p in layers.parameters()], expected)
    with torch.no_grad():
        torch.testing.assert_close(norse.Lift(cells)(batch[0])[0], model_outputs(cells, batch[0], by_step=True))


# -- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["snntorch", "norse", "spikingjelly"])
def test_training_calls_no_surrogate_and_leaves_a_plain_model(library, monkeypatch, tmp_path):
    torch.manual_seed(0)
    model, batches = nets()[library](), separable()
    if library == "norse":
        threshold = import_module("norse.torch.functional.threshold")
        for name in ("superspike_fn", "heaviside", "threshold"):
            if hasattr(threshold, name):
                monkeypatch.setattr(threshold, name, raising)
        for module in ("lif", "lif_refrac"):
            monkeypatch.setattr(import_module(f"norse.torch.functional.{module}"), "threshold", raising)
    keys, kind = list(model.state_dict()), type(model)
    before = [p.detach().clone() for p in model.parameters()]
    result = train(model, batches, 14, val_loader=batches, seed=0, progress=False, run_dir=tmp_path / "run")
    assert result.history[-1]["val_accuracy"] > 0.8
    assert list(model.state_dict()) == keys and type(model) is kind
    assert all((p - q).abs().sum() > 0 for p, q in zip(before, trainable(model).values(), strict=True))
    copy.deepcopy(model)
    if library == "norse":
        monkeypatch.undo()
        own = model(batches[0][0])[0].sum(0).argmax(1)
        found = evaluate(model, batches[:1])["accuracy"]
        assert float((own == batches[0][1]).float().mean()) == pytest.approx(found)
        pickle.loads(pickle.dumps(model.state_dict()))


def test_plan_shows_layers_of_other_libraries():
    snn = library_of("snntorch")
    found = plan(Loop(snn, True), separable()[0])
    assert [site for site, *_ in found.sites] == ["lif1", "lif2"]
    assert not found.untrained


# -- what cannot be trained is said ------------------------------------------------------------------------


def test_a_neuron_for_two_layers_is_refused():
    snn = library_of("snntorch")

    class Twice(nn.Module):
        def __init__(self, apart: bool) -> None:
            super().__init__()
            self.fc, self.lif = nn.Linear(5, 5), snn.Leaky(0.9)
            self.other = snn.Leaky(0.9) if apart else self.lif

        def forward(self, x: Tensor) -> Tensor:
            mem1 = mem2 = self.lif.reset_mem()
            outputs = []
            for step in x:
                spk, mem1 = self.lif(self.fc(step), mem1)
                spk, mem2 = self.other(self.fc(spk), mem2)
                outputs.append(spk)
            return torch.stack(outputs)

    with pytest.raises(UsageError, match=r"lif ran more than once in a time step.*they may share weights"):
        train(Twice(apart=False), separable(), 1, progress=False)
    train(Twice(apart=True), separable(), 1, progress=False)


class Shared(nn.Module):
    """One net on two views of a sample, in rows of the batch, or on an axis behind the samples."""

    def __init__(self, neuron: nn.Module, rows: bool) -> None:
        super().__init__()
        self.fc, self.neuron, self.out, self.rows = nn.Linear(5, 6), neuron, nn.Linear(6, 2), rows

    def forward(self, x: Tensor) -> Tensor:
        views = torch.cat([x, x.flip(0)], 1) if self.rows else torch.stack([x, x.flip(0)], 2)
        state, found = None, []
        for step in views:
            spikes, state = self.neuron(self.fc(step), *(() if state is None else (state,)))
            found.append(self.out(spikes))
        outputs = torch.stack(found)
        return sum(outputs.chunk(2, 1)) if self.rows else outputs.sum(2)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("kind", ["snntorch", "norse"])
def test_views_of_a_sample_lie_behind_it_and_never_in_rows_of_the_batch(kind, samples):
    library = library_of(kind)
    neuron = library.Leaky(0.9) if kind == "snntorch" else library.torch.LIFCell()
    x, y = torch.rand(4, samples, 5), torch.zeros(samples, dtype=torch.long)
    with attach(Shared(neuron, rows=False), seed=0) as ulr:
        ulr.backward(x, y)
    refused = f"neuron got {2 * samples} rows in a pass of {samples} samples; .* an axis behind it"
    with attach(Shared(neuron, rows=True), seed=0) as ulr, pytest.raises(UsageError, match=refused):
        ulr.backward(x, y)


def covered() -> str:
    """The table of docs/libraries.md, of what is tested above, in Markdown."""
    options: dict[tuple[str, str], list[str]] = {}
    for name in KINDS:
        library, _, rest = name.partition(": ")
        kind, _, option = rest.partition(", ")
        options.setdefault((library, kind), []).append(option)
    classes: dict[tuple[str, str], list[str]] = {}  # of the same options
    for (library, kind), found in options.items():
        classes.setdefault((library, "; ".join(option for option in found if option)), []).append(kind)
    lines = ["| library | classes | covered options |", "|---|---|---|"]
    for (library, found), kinds in classes.items():
        lines.append(f"| {library} | {', '.join(kinds)} | {found or 'the defaults'} |")
    return "\n".join(lines)


def test_the_table_in_the_documents_is_what_is_tested():
    page = (Path(__file__).parents[1] / "docs" / "libraries.md").read_text()
    assert covered() in page, f"put this into docs/libraries.md:\n{covered()}"


def spiking_classes(library: str) -> dict[str, type]:
    """All classes of modules that a library's namespace for neurons exports."""
    return {
        name: kind
        for name, kind in vars(library_of(library)).items()
        if inspect.isclass(kind) and issubclass(kind, nn.Module)
    }


NOT_SPIKING = {
    "snntorch": {"GradedSpikes"},
    "norse.torch": {
        "LI", "LICell", "LIBoxCell", "LILinearCell", "Lift", "SequentialState", "RecurrentSequential", "LConv2d",
        "RegularizationCell", "SpikesToTimesDecoder", "TemporalReceptiveField", "SpatialReceptiveField2d",
        "ParameterizedSpatialReceptiveField2d", "SampledSpatialReceptiveField2d",
        "ConstantCurrentLIFEncoder", "SpikeLatencyLIFEncoder", "SpikeLatencyEncoder", "PoissonEncoder",
        "SignedPoissonEncoder", "PopulationEncoder",  # make events of pictures, before the model
        "ConvNet", "ConvNet4", "VGG", "MobileNetV2",  # models of the layers above
    },
    "spikingjelly.activation_based.neuron": {
        "NonSpikingBaseNode", "NonSpikingIFNode", "NonSpikingLIFNode", "NoisyNonSpikingBaseNode",
        "NoisyNonSpikingIFNode",
    },
}  # fmt: skip


# Their own code fires by functions; tests/test_places.py trains them.
BY_FUNCTION = {
    "SimpleIFNode", "SimpleLIFNode", "CUBALIFNode", "RAFNode", "ComplementaryLIFNode", "GatedLIFNode", "LIAFNode",
    "MPBNLIFNode", "TernaryIFNode", "TernaryLIFNode", "PSN", "MaskedPSN", "SlidingPSN",
    "ILCIFNode", "ILCLIFNode", "ILCCUBALIFNode",
}  # fmt: skip


@pytest.mark.parametrize("library", NOT_SPIKING)
def test_every_class_of_a_library_is_supported_or_refused_by_name(library):
    """A new class of a library is neither, and fails here."""
    tested = {type(made(kind)) for kind in KINDS.values() if kind.library == library}
    for name, kind in spiking_classes(library).items():
        module = kind.__new__(kind)
        nn.Module.__init__(module)
        if kind in tested or name in (*NOT_SPIKING[library], *BY_FUNCTION):
            continue
        with pytest.raises(UsageError, match=f"model is a {library.partition('.')[0]} {kind.__name__}"):
            adapt(module, "model")


def test_no_library_is_imported_before_a_model_has_a_module_of_it():
    import subprocess
    import sys

    code = "import sys, ulr_snn; assert not {'snntorch', 'norse', 'spikingjelly'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_time_average_of_spikes_of_another_library():
    """Layers of two libraries in one model."""
    snn = library_of("snntorch")

    class Lifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif = snn.Leaky(0.9)

        def forward(self, x: Tensor) -> Tensor:
            mem, spikes = self.lif.reset_mem(), []
            for step in x:
                spk, mem = self.lif(step, mem)
                spikes.append(spk)
            return torch.stack(spikes)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), Lifted(), nn.Linear(16, 16), LIF(), TimeAverage(), nn.Linear(16, 3))
    result = ulr_snn.train(model, separable(), 12, val_loader=separable(), seed=0, progress=False)
    assert result.history[-1]["val_accuracy"] > 0.8


def test_memories_of_modules_that_do_not_fire_start_anew_and_come_back():
    """SpikingJelly's dropout keeps its mask, a synapse its current, until they are reset."""
    neuron = library_of("spikingjelly.activation_based.neuron")
    layer = library_of("spikingjelly.activation_based.layer")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 16), layer.Dropout(0.3, step_mode="m"), neuron.LIFNode(step_mode="m"), nn.Linear(16, 3),
        layer.SynapseFilter(tau=3.0, step_mode="m"),
    )  # fmt: skip
    before = [dict(module._memories) for module in model if hasattr(module, "_memories")]
    with attach(model, ULR(credit="residual", copies=4)) as ulr:
        for x, y in separable():
            ulr.backward(x[:, :10], y[:10])
    assert [dict(module._memories) for module in model if hasattr(module, "_memories")] == before


def test_events_are_told_from_spikes_in_layers_that_run_a_whole_sequence():
    snn = library_of("snntorch")
    torch.manual_seed(0)
    model = nn.Sequential(*(snn.LeakyParallel(5, 5, threshold=0.1) for _ in range(3)), nn.Linear(5, 3))
    with attach(model, ULR(maps="learned")) as ulr:
        for _ in range(3):
            assert ulr.backward(*separable()[0]).stats["copies"] == 1
        assert ulr.learner.driven == {"0"} and not ulr.structure.needs_pairs


def test_a_layer_that_never_runs_is_measured_once():
    snn = library_of("snntorch")
    torch.manual_seed(0)
    model = Loop(snn, False)
    model.spare = snn.Leaky(0.9)
    with attach(model) as ulr:
        passes = []
        for _ in range(3):
            ulr.backward(*separable()[0])
            passes.append(ulr.forward_passes)
    assert passes[2] - passes[1] == 16


def test_a_layer_that_hands_its_state_to_the_next_is_named():
    snn = library_of("snntorch")
    model = nn.Sequential(nn.Linear(6, 5), snn.Leaky(beta=0.9), nn.Linear(5, 3))
    with pytest.raises(UsageError, match=r"2 \(Linear\) got the \(spikes, state\) of a layer; give .*init_hidden"):
        plan(model, (torch.rand(4, 3, 6), torch.tensor([0, 1, 2])))


# -- neurons of a user's own, derived from a library's -----------------------------------------------------


def derived_neurons() -> dict[str, Callable[[], nn.Module]]:
    snn = library_of("snntorch")
    neuron = library_of("spikingjelly.activation_based.neuron")

    class Once(neuron.SimpleBaseNode):  # fires once at most
        def __init__(self) -> None:
            super().__init__()
            self.register_memory("fired", 0.0)

        def neuronal_charge(self, x: Tensor) -> None:
            self.v = self.v + (1 - self.fired) * x

        def neuronal_reset(self, spike: Tensor) -> None:
            self.fired = self.fired + spike
            super().neuronal_reset(spike)

    class Counting(neuron.LIFNode):  # keeps a statistic
        def single_step_forward(self, x: Tensor) -> Tensor:
            spikes = super().single_step_forward(x)
            self.total = spikes.sum().item()
            return spikes

    class Leaking(snn.Leaky):  # its leak is the sigmoid of a parameter
        def __init__(self) -> None:
            super().__init__(beta=0.9, init_hidden=True)
            self.raw = nn.Parameter(torch.tensor(2.2))

        def forward(self, x: Tensor) -> Tensor:
            self.beta = self.raw.sigmoid()
            return super().forward(x)

    class Rounding(neuron.LIFNode):  # decides on spikes by itself
        def forward(self, x: Tensor) -> Tensor:
            self.v = (self.v + x) / 2
            spikes = (self.v.detach() > 0.5).to(x)
            self.v = self.v * (1 - spikes)
            return spikes

    class Firing(snn.Leaky):
        def __init__(self) -> None:
            super().__init__(beta=0.9, init_hidden=True)

        def fire(self, mem: Tensor) -> Tensor:
            return (mem.detach() > 0.5).to(mem)

    return {"Once": Once, "Counting": Counting, "Leaking": Leaking, "Rounding": Rounding, "Firing": Firing}


@pytest.mark.product
@pytest.mark.parametrize("name", ["Once", "Counting", "Leaking", "Rounding", "Firing"])
def test_derived_neurons_train_by_their_own_equations(name, monkeypatch):
    """A class that decides on spikes as its base does is adapted like it. Others are black boxes."""
    functional = library_of("spikingjelly.activation_based.functional")
    torch.manual_seed(0)
    neuron = derived_neurons()[name]()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.b = nn.Linear(5, 16), neuron, nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            if name in ("Leaking", "Firing"):
                self.n.reset_mem()
            else:
                functional.reset_net(self)
            return torch.stack([self.b(self.n(self.a(now))) for now in x])

    model, batches = Net(), separable()
    with torch.no_grad():
        own = model(batches[0][0]).clone()
    found = evaluate(model, batches[:1], loss=lambda o, y: (o - own).abs().amax((0, 2)), device="cpu")
    assert found["loss"] == 0
    for kind in {type(f) for f in vars(neuron).values() if isinstance(f, nn.Module)}:
        monkeypatch.setattr(kind, "forward", lambda *_: pytest.fail("a surrogate was asked for"))
    says = {site: noise for site, noise, _ in plan(model, batches[0]).sites}["n"]
    assert says.startswith("gaussian on its current" if name in ("Rounding", "Firing") else "logistic")
    result = ulr_snn.train(model, batches * 4, 6, progress=False, device="cpu")
    assert result.history[-1]["train_accuracy"] > 0.8  # chance: 0.33
