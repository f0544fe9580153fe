"""NIR: what is written is read by snnTorch, Norse and `from_nir` with the same outputs, and the rest is refused."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.helpers import Loop, batches, library_of, train
from ulr_snn import LIF, Fold, LeakyReadout, RecurrentLIF, TimeAverage, UsageError, evaluate, from_nir, to_nir

nir = pytest.importorskip("nir")
STEPS, BATCH, DT = 25, 4, 1e-4
pytestmark = pytest.mark.filterwarnings("ignore:.*nirtorch.load", "ignore::DeprecationWarning")


def events(*features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(STEPS, BATCH, *features, generator=generator) < 0.4).float()


# -- readers -----------------------------------------------------------------------------------------------


def stepped(net: nn.Module, x: Tensor) -> Tensor:
    """Runs an imported net, (x, state) -> (outputs, state), over time."""
    state, outputs = None, []
    for now in x:
        out, state = net(now, state)
        outputs.append(out)
    return torch.stack(outputs)


def snntorch_reads(graph: Any, x: Tensor) -> Tensor:
    library_of("snntorch")
    from snntorch.import_nir import import_from_nir

    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        return stepped(import_from_nir(graph), x)


def norse_reads(graph: Any, x: Tensor) -> Tensor:
    return stepped(library_of("norse.torch").from_nir(graph, dt=DT), x)


def ours_reads(graph: Any, x: Tensor) -> Tensor:
    return from_nir(graph)(x)


READERS = [snntorch_reads, norse_reads, ours_reads]


def by_file(graph: Any, folder: Path) -> Any:
    nir.write(folder / "model.nir", graph)
    return nir.read(folder / "model.nir")


def outputs_agree(graph: Any, expected: Callable[[Tensor], Tensor], x: Tensor, readers: Any = READERS) -> None:
    with torch.no_grad():
        wanted = expected(x)
        for reader in readers:
            found = reader(graph, x)
            assert found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-6, rtol=1e-6), reader.__name__
            assert wanted.std() > 0


# -- models ------------------------------------------------------------------------------------------------


def dense(*neurons: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Linear(20, 12)]
    for neuron in neurons:
        layers += [neuron, nn.Linear(12, 12, bias=len(layers) > 2)]
    return nn.Sequential(*layers)


def recurrent(*options: Any) -> RecurrentLIF:
    torch.manual_seed(2)
    return RecurrentLIF(12, *options)


DENSE = {
    "subtract": lambda: dense(LIF(0.9, 0.3)),
    "zero": lambda: dense(LIF(0.9, 0.3, "zero")),
    "none": lambda: dense(LIF(0.5, 0.3, "none")),
    "without a leak": lambda: dense(LIF(1.0, 0.5), LIF(1.0, 0.2, "zero")),
    "no memory": lambda: dense(LIF(0.0, 0.2), LIF(0.0, 0.1, "zero")),
    "leaks of neurons": lambda: dense(LIF(torch.rand(12), 0.2), LIF(torch.rand(12), 0.1, "zero")),
    "learned": lambda: dense(LIF(0.7, 0.3, learn_beta=True, learn_threshold=True)),
    "recurrent, subtract": lambda: dense(recurrent(0.9, 0.3)),
    "recurrent, zero": lambda: dense(recurrent(0.9, 0.3, "zero")),
    "recurrent, none": lambda: dense(recurrent(0.5, 0.3, "none"), LIF(0.9, 0.2)),
}


def convolutional(reset: str = "subtract") -> nn.Sequential:
    torch.manual_seed(1)
    features = nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4), nn.AvgPool2d(2)
    layers: list[nn.Module] = [
        Fold(*features, nn.Dropout()),
        LIF(0.8, 0.2, reset),
        Fold(nn.Conv2d(4, 6, 3, bias=False)),
    ]
    pooled = [LIF(0.9, 0.1, reset), Fold(nn.AvgPool2d(2), nn.Flatten()), nn.Linear(6, 5)]
    model = nn.Sequential(*layers, *pooled)
    model[0][1].running_mean.copy_(torch.rand(4) / 5)
    model[0][1].running_var.copy_(torch.rand(4) / 4 + 0.1)
    return model.eval()


@pytest.mark.parametrize("name", DENSE)
def test_dense_and_recurrent_nets_are_read_with_the_same_outputs(name, tmp_path):
    model = DENSE[name]()
    outputs_agree(by_file(to_nir(model, events(20)), tmp_path), model, events(20))


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
def test_convolutional_pooled_nets_are_read_with_the_same_outputs(reset, tmp_path):
    model = convolutional(reset)
    outputs_agree(by_file(to_nir(model, events(2, 8, 8)), tmp_path), model, events(2, 8, 8))


def test_the_reset_matters_in_these_nets():
    outputs = [dense(LIF(0.9, 0.3, reset))(events(20)) for reset in ("subtract", "zero", "none")]
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])


def test_another_time_step_is_another_model():
    model = dense(LIF(0.9, 0.3))
    outputs_agree(to_nir(model, events(20), dt=1e-3), model, events(20), [lambda graph, x: from_nir(graph, dt=1e-3)(x)])
    with pytest.raises(UsageError, match="dt with which it was written"):
        from_nir(to_nir(model, events(20), dt=1e-3))


def test_the_model_comes_back(tmp_path):
    model = dense(LIF(0.9, 0.3), recurrent(torch.rand(12), 0.25), LIF(1.0, 0.2, "zero"), LIF(0.7, torch.rand(12) + 0.1))
    nir.write(tmp_path / "model.nir", to_nir(model, events(20)))
    found = from_nir(tmp_path / "model.nir")
    assert [type(module) for module in found] == [type(module) for module in model]
    for ours, theirs in zip(found, model, strict=True):
        assert getattr(ours, "reset", None) == getattr(theirs, "reset", None)
        for name, value in theirs.state_dict().items():
            assert torch.allclose(ours.state_dict()[name], value, rtol=1e-6), name


def test_a_readout_and_a_mean_over_time_come_back():
    model = nn.Sequential(*dense(LIF(0.9, 0.3)), LeakyReadout(0.8))
    with pytest.warns(UserWarning, match="snnTorch refuses and Norse skips"):
        graph = to_nir(model, events(20))
    outputs_agree(graph, model, events(20), [ours_reads])
    with pytest.raises(ValueError, match="LI"):
        snntorch_reads(graph, events(20))
    model = nn.Sequential(nn.Linear(20, 12), LIF(0.9, 0.3), TimeAverage(), nn.Linear(12, 5))
    graph = to_nir(model, events(20))
    outputs_agree(graph, model, events(20), [ours_reads])
    outputs_agree(graph, model, events(20), [lambda *given: snntorch_reads(*given).mean(0)])


def test_a_trained_model_is_as_accurate_where_it_is_read():
    x, y = (torch.cat([batch[i] for batch in batches(96)], 1 - i) for i in range(2))
    model = train(epochs=3).model
    found = from_nir(to_nir(model, x))
    assert evaluate(found, [(x, y)])["accuracy"] == evaluate(model, [(x, y)])["accuracy"] > 0.8
    assert ((snntorch_reads(to_nir(model, x), x).mean(0).argmax(1) == y).float().mean() > 0.8).item()


def test_what_is_read_trains():
    found = from_nir(to_nir(dense(LIF(0.9, 0.3), recurrent(0.9, 0.3)), events(20)))
    x, y = events(20), torch.arange(BATCH)
    before = [q.detach().clone() for q in found.parameters()]
    train(found, [(x, y)], epochs=1)
    assert all(not torch.equal(q, old) for q, old in zip(found.parameters(), before, strict=True))


@pytest.mark.slow
def test_it_does_not_depend_on_the_hash_of_names():
    """The importers go through sets of names."""
    library_of("snntorch"), library_of("norse")
    code = """
from tests.test_nir import *
model = dense(recurrent(0.9, 0.3), LIF(0.8, 0.2))
outputs_agree(to_nir(model, events(20)), model, events(20))
"""
    environment = {**os.environ, "PYTHONHASHSEED": "3", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- models of other libraries -----------------------------------------------------------------------------


def of_snntorch(reset: str, recurrent: bool) -> nn.Sequential:
    snn = library_of("snntorch")
    torch.manual_seed(1)
    options = {"threshold": 0.3, "init_hidden": True, "reset_mechanism": reset}
    neuron = snn.RLeaky(0.9, linear_features=12, **options) if recurrent else snn.Leaky(0.9, **options)
    return nn.Sequential(nn.Flatten(), nn.Linear(20, 12), neuron, nn.Linear(12, 5))


def each_step(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        for module in model.modules():
            if hasattr(module, "reset_mem"):
                module.reset_mem()
        return torch.stack([model(now) for now in x])

    return run


@pytest.mark.parametrize("case", [("subtract", False), ("zero", False), ("none", False), ("subtract", True)])
def test_models_of_snntorch(case):
    model = of_snntorch(*case)
    outputs_agree(to_nir(model, events(20)), each_step(model), events(20))


def test_a_time_loop_of_snntorch():
    model = Loop(library_of("snntorch"), recurrent=True)
    x = 4 * events(5)
    outputs_agree(to_nir(model, x), lambda x: model(x)[0], x)


def test_models_of_norse():
    norse = library_of("norse.torch")
    torch.manual_seed(1)
    p = norse.LIFParameters(v_th=torch.tensor(0.1))
    boxes = norse.LIFBoxCell(norse.LIFBoxParameters(v_th=torch.tensor(0.03)))
    integrate = norse.IAFCell(norse.IAFParameters(v_th=torch.tensor(0.5)))
    linear = [nn.Linear(20, 12), nn.Linear(12, 9), nn.Linear(9, 7), nn.Linear(7, 5)]
    model = norse.SequentialState(linear[0], norse.LIFCell(p), linear[1], boxes, linear[2], integrate, linear[3])
    outputs_agree(to_nir(model, events(20)), lambda x: stepped(model, x), events(20))
    model = norse.SequentialState(norse.LIFRecurrentCell(20, 12, p), linear[1])
    outputs_agree(to_nir(model, events(20)), lambda x: stepped(model, x), events(20), [snntorch_reads, norse_reads])
    lifted = norse.SequentialState(norse.Lift(nn.Conv2d(2, 3, 3)), norse.LIF(p), nn.Flatten(2), nn.Linear(108, 5))
    outputs_agree(to_nir(lifted, events(2, 8, 8)), lambda x: lifted(x)[0], events(2, 8, 8))


def test_models_of_spikingjelly():
    library_of("spikingjelly")
    from spikingjelly.activation_based import functional, layer, neuron

    torch.manual_seed(1)
    nodes = neuron.LIFNode(v_threshold=0.2), neuron.IFNode(v_threshold=0.5, v_reset=None)
    stem = layer.Conv2d(2, 3, 3), layer.BatchNorm2d(3), nodes[0], layer.AvgPool2d(2), layer.Flatten()
    model = nn.Sequential(*stem, layer.Linear(27, 8), nodes[1], layer.Linear(8, 5)).eval()
    functional.set_step_mode(model, "m")
    outputs_agree(to_nir(model, events(2, 8, 8)), model, events(2, 8, 8))


def test_what_snntorch_writes_is_read():
    snn = library_of("snntorch")
    from snntorch.export_nir import export_to_nir

    torch.manual_seed(1)
    options = {"init_hidden": True, "reset_mechanism": "zero"}
    leaky = snn.Leaky(torch.full((12,), 0.9), torch.full((12,), 0.3), **options)
    loop = snn.RLeaky(0.8, threshold=0.3, linear_features=9, reset_delay=False, **options)
    model = nn.Sequential(nn.Linear(20, 12), leaky, nn.Linear(12, 9), loop, nn.Linear(9, 5))
    graph = export_to_nir(model, events(20)[0], ignore_dims=[0])
    outputs_agree(graph, each_step(model), events(20), [ours_reads])


# -- refusals ----------------------------------------------------------------------------------------------


def refusals() -> list[tuple[str, Callable[[], nn.Module]]]:
    sequence = nn.Sequential
    return [
        (r"layer 0\.0 \(MaxPool2d\)", lambda: sequence(Fold(nn.MaxPool2d(2)), LIF())),
        (
            r"layer 0\.0 \(Conv2d\).*'circular'",
            lambda: sequence(Fold(nn.Conv2d(2, 2, 3, 1, 1, padding_mode="circular"))),
        ),
        (r"layer 0\.0 \(Conv2d\).*square", lambda: sequence(Fold(nn.Conv2d(2, 2, (3, 1))), LIF())),
        (r"layer 0\.0 \(AvgPool2d\).*windows", lambda: sequence(Fold(nn.AvgPool2d(3, padding=1)), LIF())),
        (r"ends in an average pooling", lambda: sequence(LIF(), Fold(nn.AvgPool2d(2)))),
        (r"layer 0 \(Linear\).*nn.Flatten", lambda: sequence(nn.Linear(8, 8), LIF())),
        (r"layer 1 \(LIF\).*mean over time", lambda: sequence(TimeAverage(), LIF())),
        (r"layer 0 \(Flatten\).*features", lambda: sequence(nn.Flatten(1), LIF())),
        (r"layer 0 \(LIF\).*one threshold a channel", lambda: sequence(LIF(0.9, torch.rand(2, 8, 8) + 0.1))),
        (r"layer 0 \(LIF\).*not positive and finite", lambda: sequence(LIF(0.9, torch.tensor(float("inf")), "zero"))),
    ]


@pytest.mark.parametrize(("sentence", "make"), refusals())
def test_layers_without_exact_counterpart_are_refused_by_name(sentence, make):
    with pytest.raises(UsageError, match=sentence):
        to_nir(make(), events(2, 8, 8))


def test_neurons_of_libraries_without_exact_counterpart_are_refused_by_name():
    snn, norse = library_of("snntorch"), library_of("norse.torch")
    inhibited = snn.Leaky(0.9, graded_spikes_factor=2.0, init_hidden=True)
    reset = norse.LIFBoxCell(norse.LIFBoxParameters(v_reset=torch.tensor(-0.1)))
    for neuron, sentence in (
        (snn.Synaptic(0.9, 0.8, init_hidden=True), r"layer 1 \(Synaptic\).*equations"),
        (inhibited, r"layer 1 \(Leaky\).*graded"),
        (norse.LICell(), r"layer 1 \(LICell\)"),
        (norse.LIFAdExCell(), r"layer 1 \(LIFAdExCell\)"),
        (reset, r"layer 1 \(LIFBoxCell\).*value other than 0"),
    ):
        with pytest.raises(UsageError, match=sentence):
            to_nir(nn.Sequential(nn.Linear(20, 12), neuron), events(20))


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = dense(LIF())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.layers[0](x)


def test_a_model_that_is_no_chain_is_refused():
    with pytest.raises(UsageError, match="takes a chain of layers"):
        to_nir(Skipping(), events(20))
    with pytest.raises(UsageError, match="dt=0"):
        to_nir(dense(LIF()), events(20), dt=0)


def node(kind: str, **values: float) -> Any:
    return getattr(nir, kind)(**{name: np.full(3, value) for name, value in values.items()})


SLOW = {"tau": 1e-3, "r": 1.0, "v_leak": 0.0}


@pytest.mark.parametrize(
    ("sentence", "make"),
    [
        ("Delay", lambda: node("Delay", delay=1.0)),
        ("value other than 0", lambda: node("LIF", **{**SLOW, "v_leak": 0.5}, v_threshold=1.0)),
        ("value other than 0", lambda: node("LIF", **SLOW, v_threshold=1.0, v_reset=-1.0)),
        ("time constants", lambda: node("LIF", **{**SLOW, "tau": 1e-5}, v_threshold=1.0)),
        ("not positive", lambda: node("LIF", **SLOW, v_threshold=-1.0)),
    ],
)
def test_nodes_without_counterpart_are_refused_by_name(sentence, make):
    with pytest.raises(UsageError, match=rf"cannot read node \w+ .*{sentence}|{sentence}.*no counterpart"):
        from_nir(nir.NIRGraph.from_list(make()))


def graph_of(edges: list[tuple[str, str]]) -> Any:
    neurons = {name: node("LIF", **SLOW, v_threshold=1.0) for name in "ab"}
    ends = {"input": nir.Input(np.array([3])), "output": nir.Output(np.array([3]))}
    return nir.NIRGraph(
        {**ends, **neurons, "w": nir.Linear(np.eye(3)), "v": nir.Linear(np.eye(3))}, edges, type_check=False
    )


CHAIN = [("input", "w"), ("w", "a"), ("a", "v"), ("v", "b"), ("b", "output")]


@pytest.mark.parametrize("extra", [[("w", "b")], [("b", "w")], [("a", "output")], [("b", "a")]])
def test_graphs_that_are_no_chain_are_refused(extra):
    assert len(from_nir(graph_of(CHAIN))) == 4
    with pytest.raises(UsageError, match="reads chains of layers"):
        from_nir(graph_of(CHAIN + extra))


def test_what_is_no_graph_is_refused():
    with pytest.raises(UsageError, match="from_nir got Linear"):
        from_nir(nir.Linear(np.eye(3)))
