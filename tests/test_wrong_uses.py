"""Wrong uses end in one sentence before a weight changes, and correct uses at the border pass."""

import copy
import math
import re
import sys
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR, StepLR

import ulr_snn
from ulr_snn import (
    LIF,
    ULR,
    Adaptive,
    Comparison,
    CurrentNoise,
    Diagnosis,
    Feedback,
    Fold,
    Gaussian,
    Global,
    Independent,
    LeakyReadout,
    Logistic,
    OutputNoise,
    RecurrentLIF,
    SpikeBudget,
    TimeAverage,
    UsageError,
    WeightNoise,
    data,
)
from ulr_snn.errors.arguments import Count, check_fields, checked
from ulr_snn.peers import METHODS
from ulr_snn.runs.cli import main

NAN, INF = math.nan, math.inf
STEPS, BATCH = 4, 3
X = torch.rand(STEPS, BATCH, 2, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 1])
ONE = ((X, Y),)


def net(*start: nn.Module) -> nn.Sequential:
    """Makes a net. start: replaces the first layer and the neurons."""
    torch.manual_seed(0)
    return nn.Sequential(*(start or (nn.Linear(2, 3), LIF())), TimeAverage(), nn.Linear(3, 2))


def shown(value: object) -> str:
    """Returns a value for a test's name, without addresses: all processes collect the same tests."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def holding(value: float, layer: int) -> nn.Module:
    model = net()
    with torch.no_grad():
        model[layer].weight[0, 0] = value
    return model


def with_buffer(value: float) -> nn.Module:
    neuron = LIF()
    neuron.register_buffer("mask", torch.tensor([0.0, value]))
    return neuron


def at(tensor: Tensor, index: tuple[int, ...], value: float) -> Tensor:
    """Returns the tensor with another value at one place."""
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


class Changed(nn.Module):
    """A net whose result is changed. static: it repeats its input over time."""

    def __init__(self, change, static: bool = False) -> None:
        super().__init__()
        self.net, self.change, self.static = net(), change, static

    def forward(self, x: Tensor):
        return self.change(self.net(x.expand(STEPS, *x.shape) if self.static else x))


class Applied(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def generator():
    return (batch for batch in ONE * 4)


class TwoInputs(nn.Module):
    """A net of the sum of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.net(x + other)


def train(model, loader=ONE, **options):
    return ulr_snn.train(model, loader, **{"epochs": 1, "progress": False, "device": "cpu", **options})


def evaluate(model, loader=ONE, **options):
    return ulr_snn.evaluate(model, loader, **{"device": "cpu", **options})


def compare(model, **options):
    return ulr_snn.compare(model, ONE, ONE, **{"epochs": 1, "progress": False, "device": "cpu", **options})


def diagnose(model, batch=(X, Y), **options):
    return ulr_snn.diagnose(model, batch, **options)


def step(model, x=X, y=Y, estimator=None, loss="ce_count", lengths=None, **options):
    with ulr_snn.attach(model, estimator, loss, **options) as ulr:
        return ulr.backward(x, y, lengths=lengths)


def options(verb, **values):
    """Returns a use for each value of each option."""
    return {
        f"{verb.__name__} {name}={shown(value)}": (partial(_use, verb, name, value), name)
        for name, each in values.items()
        for value in each
    }


def _use(verb, name, value, model):
    return verb(model, **{name: value})


def made(what, *given, **named):
    """Returns a use that makes an object, of whatever model."""
    return lambda _model: what(*given, **named)


def other(factory=SGD):
    return factory(net().parameters(), 0.1)


NO_COUNT = (0, -2, 1.5, 2.0, "3", True, NAN)
NO_SEED = (0.5, None, "a", NAN, True)
NO_SIZE = (0, -1.0, NAN, INF, "0.1", True)

WRONG = {
    # numbers, flags and words
    **options(train, epochs=(*NO_COUNT, None), accumulate=(*NO_COUNT, None), max_steps=NO_COUNT, seed=NO_SEED),
    **options(train, lr=NO_SIZE, clip=NO_SIZE, autocast=("bf16", torch.float32, True), resume=("no", 2, True)),
    **options(train, progress=("no", 2), callbacks=(print, 3, [3], [lambda entry: None])),
    **options(train, scheduler=("linear", 3, ["cosine"])),
    **options(train, run_dir=(True, 123, "", b"runs"), optimizer=("adam", 3)),
    **options(train, device=("gpu", "", None, "meta", "mps", "xpu", 1.5), val_loader=(3, [], "text")),
    **options(train, loader=(None, 5, [], "text"), metrics=([len], {"a": 3}, {"b": lambda o: 0.0})),
    **options(evaluate, mode=("noisy", None), copies=NO_COUNT, samples=NO_COUNT, seed=NO_SEED, activity=("no",)),
    **options(compare, lr=([NAN], [], "0.1", {"ulr": INF}, 0), epochs=NO_COUNT, seed=NO_SEED, progress=("no",)),
    **options(compare, methods=("ulr", ["magic"], []), clip=(-1.0,), run_dir=("runs",)),
    **options(diagnose, draws=(0, 3, 4.5, "8", True), reference_draws=(3,), warm_up=(-1, 0.5), progress=(2, NAN, "a")),
    **options(diagnose, seed=NO_SEED),
    **options(step, total_steps=(0, -3, "a", 2.5), seed=NO_SEED, time_first=("no",), layout=("TBC",), output=(2.5,)),
    # objects
    **{
        f"{what.__name__} {named}": (made(what, **named), name)
        for what, named, name in (
            *((ULR, {"copies": value}, "copies") for value in NO_COUNT),
            *((ULR, {"sampling": value}, "sampling") for value in NO_COUNT),
            *((ULR, {flag: "no"}, flag) for flag in ("antithetic", "quasi_monte_carlo", "layerwise")),
            *((ULR, {"firing": value}, "firing") for value in (Logistic, "logistic", 0.1)),
            *((ULR, {"noise": value}, "noise") for value in (CurrentNoise(), "all", {"0": 0.5})),
            *((ULR, {"flow": value}, "flow") for value in ("frozen", {"0": "held"})),
            *((ULR, {name: "other"}, name) for name in ("credit", "maps", "memory", "on_nonfinite")),
            (ulr_snn.Online, {"maps": "other"}, "maps"),
            *((Logistic, {name: value}, name) for name in ("scale", "start", "end") for value in NO_SIZE),
            *((Gaussian, {"secants": value}, "secants") for value in (-1, 0.5, True)),
            *((CurrentNoise, {"scale": value}, "scale") for value in NO_SIZE),
            *((WeightNoise, {"relative": value}, "relative") for value in NO_SIZE),
            *((OutputNoise, {"draws": value}, "draws") for value in (0, 3, 2.0, True)),
            *((Feedback, {"refresh": value}, "refresh") for value in NO_COUNT),
            *((Feedback, {"rate": value}, "rate") for value in NO_SIZE),
            (Global, {"reward_to_go": "yes"}, "reward_to_go"),
            (Independent, {"copies": 4, "multi_sample": "yes"}, "multi_sample"),
            *((Adaptive, {"variance": value}, "variance") for value in NO_SIZE),
            *((Adaptive, {"least": value}, "least") for value in (1, 4.5, "4", 128)),
            *((SpikeBudget, {"limit": value}, "limit") for value in NO_SIZE),
            *((METHODS["surrogate"], {"slope": value}, "slope") for value in NO_SIZE),
            *((LIF, {"beta": value}, "beta") for value in (-0.5, 1.5, NAN, "0.9", torch.tensor([0.9, 2.0]))),
            *((LIF, {"threshold": value}, "threshold") for value in (0, -1.0, NAN, "1", torch.tensor([1.0, NAN]))),
            *((LIF, {"reset": value}, "reset") for value in (None, "soft")),
            *((RecurrentLIF, {"features": value}, "features") for value in NO_COUNT),
            (LeakyReadout, {"beta": 2.0}, "beta"),
            (LIF, {"learn_beta": "no"}, "learn_beta"),
            *((data.Augmentation, {"flip": value}, "flip") for value in (1.5, -0.1, NAN, "a")),
            (data.Augmentation, {"shift": 1.5}, "shift"),
        )
    },
    **{
        f"data.loader {name}={shown(value)}": (made(data.loader, [(X[:, 0], 0)], **{name: value}), name)
        for name, each in {"batch_size": NO_COUNT, "seed": NO_SEED, "shuffle": ("no",), "num_workers": (-1,)}.items()
        for value in each
    },
    "data.loader of None": (made(data.loader, None), "dataset"),
    "data.split of a list": (made(data.split, [1, 2], 0.5), "dataset"),
    "data.load seed": (made(data.load, "digits", seed=0.5), "seed"),
    "data.load binary": (made(data.load, "digits", binary="no"), "binary"),
    "a recording that is a number": (made(data.collate, [(torch.tensor(1.0), 0)]), "[T, ...]"),
    # models
    "model None": (lambda _: train(None), "give a model"),
    "a class for a model": (lambda _: train(LIF), "give a model"),
    "weights NaN": (
        lambda _: train(holding(NAN, 0)),
        "0.weight of the model holds NaN or infinite values, 1 of 6, the",
    ),
    "weights infinite": (lambda _: train(holding(INF, 3)), "3.weight"),
    "weights NaN to attach": (lambda _: step(holding(NAN, 0)), "0.weight"),
    "weights NaN to evaluate": (lambda _: evaluate(holding(NAN, 0)), "0.weight"),
    "weights NaN to compare": (lambda _: compare(holding(NAN, 0)), "0.weight"),
    "weights NaN to plan": (lambda _: ulr_snn.plan(holding(NAN, 0), (X, Y)), "0.weight"),
    "weights NaN to diagnose": (lambda _: diagnose(holding(NAN, 0)), "0.weight"),
    "a model on the meta device": (lambda _: train(net().to("meta")), "meta"),
    "a lazy layer": (lambda _: train(net(nn.LazyLinear(3), LIF())), "0.weight"),
    "all frozen to attach": (lambda model: step(model.requires_grad_(False)), "requires_grad_"),
    "all frozen by flow": (lambda model: train(model, estimator=ULR(flow={"0": "frozen", "3": "frozen"})), "freezes"),
    "a leak for other neurons": (lambda _: step(net(nn.Linear(2, 3), LIF(beta=torch.rand(7)))), "beta"),
    "a threshold for others": (lambda _: step(net(nn.Linear(2, 3), LIF(threshold=torch.rand(7) + 1))), "threshold"),
    "results complex": (lambda _: step(Changed(lambda o: torch.complex(o, o))), "complex"),
    "results complex over time": (
        lambda _: step(nn.Sequential(*net()[:2], nn.Linear(3, 2), Applied(lambda o: torch.complex(o, o)))),
        "complex",
    ),
    "results whole": (lambda _: step(Changed(lambda o: (10 * o).long())), "int64"),
    "results on meta": (lambda _: step(Changed(lambda o: o.to("meta"))), "meta"),
    "results NaN": (lambda _: train(Changed(lambda o: o * NAN)), "step 1"),
    "results NaN, by a peer": (lambda _: train(Changed(lambda o: o * NAN), estimator=METHODS["surrogate"]()), "step 1"),
    "a loader to plan": (lambda model: ulr_snn.plan(model, [(X, Y)]), "a batch is (x, y)"),
    "too few inputs": (lambda _: ulr_snn.plan(TwoInputs(), (X, Y)), "the 1 argument that"),
    "too few inputs by name": (lambda _: ulr_snn.plan(TwoInputs(), {"x": X, "label": Y}), "the 1 argument that"),
    "an estimator's class to compare": (lambda model: compare(model, methods={"mine": ULR}), "is no estimator"),
    "an estimator's name to diagnose": (lambda model: diagnose(model, estimators={"mine": "ulr"}), "is no estimator"),
    # batches
    "a batch for a loader": (lambda model: train(model, (X, Y)), "give (x, y)"),
    "a tensor for a loader": (lambda model: train(model, X), "tensor [T, B, ...]"),
    "events complex": (lambda model: step(model, X.to(torch.complex64)), "complex"),
    "events on meta": (lambda model: step(model, X.to("meta")), "meta"),
    "events too large": (lambda model: step(model, torch.full((4, 3, 2), 1e300, dtype=torch.float64)), "too large"),
    "events nested": (lambda model: step(model, torch.nested.nested_tensor([X[0], X[1]])), "nested"),
    "events of other features": (lambda model: step(model, torch.rand(4, 3, 5)), "5 features"),
    "events that another layer refuses": (
        lambda _: step(nn.Sequential(Fold(nn.Unflatten(-1, (1, 2)), nn.Flatten()), *net()), torch.rand(4, 3, 5)),
        "0.0 (Unflatten) got an input (12, 5), which it does not take; unflatten: Provided",
    ),
    "events without a feature": (lambda model: step(model, torch.rand(4, 3, 0)), "a feature"),
    "lengths of half steps": (lambda model: step(model, lengths=torch.tensor([4.0, 2.5, 1.0])), "whole numbers"),
    "lengths NaN": (lambda model: step(model, lengths=torch.tensor([4.0, NAN, 1.0])), "whole numbers"),
    "lengths bool": (lambda model: step(model, lengths=torch.tensor([True] * 3)), "lengths"),
    "targets complex": (lambda model: step(model, y=Y.to(torch.complex64)), "complex64"),
    "events NaN": (lambda model: step(model, at(X, (2, 1, 0), NAN)), "first at time step 2 of sample 1"),
    "events NaN, one step": (lambda model: step(model, at(X, (0, 2, 1), NAN)[:1]), "first at time step 0 of sample 2"),
    "events NaN, sparse": (lambda model: step(model, at(X, (2, 1, 0), INF).to_sparse()), "time step 2 of sample 1"),
    "events NaN, batch first": (
        lambda model: step(model, at(X, (2, 1, 0), NAN).transpose(0, 1), layout="BT"),
        "time step 2 of sample 1",
    ),
    "events NaN to evaluate": (lambda model: evaluate(model, [(at(X, (3, 0, 1), NAN), Y)]), "time step 3 of sample 0"),
    "events NaN to train": (lambda model: train(model, [(at(X, (3, 0, 1), NAN), Y)]), "time step 3 of sample 0"),
    "events NaN, static": (
        lambda _: step(Changed(lambda o: o, static=True), at(X[0], (1, 0), NAN), layout="B"),
        "first in sample 1; clean",
    ),
    "events NaN, two inputs": (
        lambda _: step(TwoInputs(), (X, at(X, (1, 2, 0), NAN))),
        "first at time step 1 of sample 2, in the input 1",
    ),
    "events NaN, inputs by name": (
        lambda _: step(TwoInputs(), {"x": at(X, (1, 2, 0), NAN), "other": X[0]}),
        "first at time step 1 of sample 2, in the input 'x'",
    ),
    "events NaN, an input without time": (
        lambda _: step(TwoInputs(), {"x": X, "other": at(X[0], (2, 1), NAN)}),
        "first in sample 2, in the input 'other'",
    ),
    "events too large, placed": (
        lambda model: step(model, at(X.double(), (1, 1, 1), 1e300)),
        "time step 1 of sample 1",
    ),
    "events too large for half": (
        lambda _: step(net().half(), at(X, (1, 0, 1), 1e6)),
        "too large for torch.float16, the type of the model, first at time step 1 of sample 0",
    ),
    "targets NaN": (
        lambda model: step(model, y=at(torch.zeros(3, 2), (1, 0), NAN), loss="mse"),
        "the targets contain NaN or infinite values, first in sample 1",
    ),
    "targets NaN over time": (
        lambda _: step(
            nn.Sequential(*net()[:2], nn.Linear(3, 2)), y=at(torch.zeros(4, 3, 2), (3, 1, 0), NAN), loss="mse"
        ),
        "first at time step 3 of sample 1",
    ),
    "a buffer NaN": (
        lambda _: step(net(nn.Linear(2, 3), with_buffer(NAN))),
        "the buffer 1.mask of the model holds NaN",
    ),
    "targets on meta": (lambda model: step(model, y=Y.to("meta")), "meta"),
    "targets in words": (lambda model: train(model, [(X, ["a", "b", "b"])]), "'a'"),
    "a generator for validation": (lambda model: train(model, val_loader=generator(), epochs=2), "val_loader"),
    # losses
    "no loss": (lambda model: step(model, loss=None), "None"),
    "a class for a loss": (lambda model: step(model, loss=nn.CrossEntropyLoss), "CrossEntropyLoss"),
    "a loss of three arguments": (lambda model: step(model, loss=lambda o, y, m: o.sum(1)), "two arguments"),
    "a loss in words": (lambda model: step(model, loss=lambda o, y: ["a"] * 3), "'a'"),
    "a complex loss": (lambda model: step(model, loss=lambda o, y: o.sum(1) + 0j), "complex"),
    "a loss that is infinite": (lambda model: train(model, loss=lambda o, y: o.sum(1) + INF), "step 1"),
    "a weight that is NaN": (lambda model: step(model, loss={"ce_count": NAN}), "weight"),
    "a weight that is True": (lambda model: step(model, loss={"ce_count": True}), "weight"),
    "a loss that refuses targets": (lambda model: step(model, loss=nn.MSELoss()), "MSELoss"),
    # optimizers and schedules
    "an optimizer of another model": (lambda model: train(model, optimizer=other()), "model.parameters()"),
    "a factory of another model": (lambda model: train(model, optimizer=lambda _: other()), "model.parameters()"),
    "an optimizer factory of None": (lambda model: train(model, optimizer=lambda _: None), "returned None"),
    "LBFGS": (lambda model: train(model, optimizer=torch.optim.LBFGS(model.parameters())), "several times"),
    "SparseAdam": (lambda model: train(model, optimizer=torch.optim.SparseAdam), "dense"),
    "lr and optimizer": (lambda model: train(model, optimizer=SGD, lr=0.1), "give one of them"),
    "a scheduler factory of None": (lambda model: train(model, scheduler=lambda _: None), "returned None"),
    "a schedule of another": (lambda model: train(model, scheduler=lambda _: StepLR(other(), 1)), "another optimizer"),
    "a schedule too short": (
        lambda model: train(model, ONE * 5, scheduler=lambda o: OneCycleLR(o, 0.1, total_steps=2)),
        "total_steps=2",
    ),
    "validation data of an iterator": (lambda model: train(model, epochs=2, val_loader=iter(ONE)), "a tuple_iterator"),
    "comparisons on an iterator": (
        lambda model: ulr_snn.compare(model, iter(ONE), ONE),
        "the loader is a tuple_iterator",
    ),
    "comparisons by an iterator": (
        lambda model: ulr_snn.compare(model, ONE, map(tuple, ONE)),
        "the val_loader is a map",
    ),
    "a list of modules": (lambda model: train(nn.ModuleList([model])), "ModuleList has no forward"),
    "a module without super": (lambda _: train(type("Bare", (nn.Module,), {"__init__": lambda _: None})()), "super()"),
    "nothing to diagnose": (lambda model: diagnose(net().requires_grad_(False)), "no trainable parameter"),
    "estimators without names": (lambda model: diagnose(model, estimators=[ULR()]), "by name"),
    "no estimators": (lambda model: diagnose(model, estimators={}), "by name"),
    "frozen since": (
        lambda model: ulr_snn.attach(model).backward(X, model.requires_grad_(False) and Y),
        "no trainable",
    ),
    "inference since": (lambda model: torch.inference_mode()(ulr_snn.attach(model).backward)(X, Y), "inference_mode"),
    "a row that was not compared": (lambda _: Comparison([{"method": "ulr"}], {}).best("surrogate"), "are ulr"),
    "a row that was not diagnosed": (
        lambda _: Diagnosis([{"estimator": "mine", "layer": "0"}], "").row("mine", "1"),
        "the names are 'mine', '0'",
    ),
    "a comparison into nowhere": (lambda _: Comparison([], {}).save("/nowhere/a.json"), "'/nowhere/a.json' cannot be"),
    "an array of objects": (lambda model: train(model, [(X.numpy().astype(object), Y)]), "an array of object"),
    "optimizers": (lambda model: train(model, optimizer=[SGD(model.parameters(), 0.1)]), "optimizer=[SGD ( Parameter"),
    "resume without run_dir": (lambda model: train(model, resume=True), "run_dir"),
    "in inference mode": (lambda model: torch.inference_mode()(train)(model), "inference_mode"),
    "an estimator's class": (lambda model: train(model, estimator=ULR), "estimator"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_a_wrong_use_is_one_sentence_before_a_weight_changes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use, says = WRONG[name]
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError) as error:
        use(model)
    message = str(error.value)
    assert says in message
    assert "\n" not in message and ". " not in message and len(message) < 300
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not list(tmp_path.iterdir())


# -- uses that are right -----------------------------------------------------------------------------------


RIGHT = {
    "numbers of NumPy's": lambda m: train(
        m, epochs=np.int64(2), seed=np.int64(3), lr=np.float32(0.01), clip=np.int8(1)
    ),
    "tensors without axes": lambda m: train(m, epochs=torch.tensor(1), lr=torch.tensor(0.01), resume=np.bool_(False)),
    "large and negative seeds": lambda m: [train(m, seed=seed) for seed in (2**70, -3)],
    "large seeds with learned maps": lambda m: step(m, seed=2**70, estimator=ULR(credit="feedback", maps="learned")),
    "large seeds to compare": lambda m: compare(m, methods=["ulr"], seed=2**70),
    "large and negative seeds of data": lambda _: [
        (data.loader([(X[:, 0], 0)], seed=seed), data.load("dynamics/sine", seed=seed, samples=4))
        for seed in (2**70, 2**63 + 1, -(2**70), -3)
    ],
    "a negative seed of a split": lambda _: data.split(data.load("digits")[1], 0.5, seed=-3),
    "a whole learning rate": lambda m: train(m, lr=1),
    "no progress": lambda m: train(m, progress=None),
    "callbacks of an iterator": lambda m: train(m, callbacks=iter([lambda entry, model: None, print])),
    "an object as callback": lambda m: train(m, callbacks=[partial(lambda extra, entry, model: None, 1)]),
    "part of the model": lambda m: train(m, optimizer=SGD(m[3].parameters(), 0.1)),
    "a loss with parameters": lambda m: train(m, optimizer=lambda q: SGD([*q, nn.Parameter(torch.ones(1))], 0.1)),
    "an array of rates": lambda m: compare(m, methods=["ulr"], lr=np.array([0.01, 0.1])),
    "rates by method": lambda m: compare(m, methods=["ulr"], lr={"ulr": (1, 0.1)}),
    "a path": lambda m: train(m, run_dir=Path("run")) and train(m, run_dir="run", resume=True, epochs=2),
    "a generator that max_steps ends": lambda m: train(m, generator(), epochs=2, max_steps=3, scheduler=None),
    "a generator for the first epoch": lambda m: train(
        m, val_loader=generator(), epochs=2, callbacks=[lambda entry, model: True]
    ),
    "lengths in a list": lambda m: step(m, lengths=[4, 2, 1]),
    "lengths of whole floats": lambda m: step(m, lengths=torch.tensor([4.0, 2.0, 1.0])),
    "a threshold of shape [1, N]": lambda _: step(net(nn.Linear(2, 3), LIF(threshold=torch.ones(1, 3)))),
    "complex numbers between layers": lambda _: step(
        nn.Sequential(nn.Linear(2, 3), Applied(torch.fft.fft), Applied(torch.abs), *net()[1:])
    ),
    "a mask that is infinite": lambda _: step(net(nn.Linear(2, 3), with_buffer(-INF))),
    "neurons that never fire": lambda _: evaluate(net(nn.Linear(2, 3), LIF(threshold=INF))),
    "a leak of 0 and of 1": lambda _: [LIF(beta=0), LIF(beta=1), LIF(beta=torch.tensor([0.0, 1.0])), LIF(beta=[0.5])],
    "whole results, global credit": lambda _: step(Changed(lambda o: (9 * o).long()), estimator=ULR(credit="global")),
    "targets NaN, by a loss of one's own": lambda m: step(
        m, y=torch.full((3, 2), NAN), loss=lambda o, y: (o - y.nan_to_num()).square().sum(1)
    ),
    "copies of NumPy's": lambda m: train(m, estimator=ULR(copies=np.int64(2), antithetic=np.bool_(True))),
    "events of eight bits": lambda m: step(m, x=X.to(torch.float8_e4m3fn)),
    "arrays that torch refuses": lambda m: torch.testing.assert_close(
        step(m, x=X.numpy()[::-1].astype(">f4"), y=Y.numpy()[::-1]).loss, step(net(), x=X.flip(0), y=Y.flip(0)).loss
    ),
    "a traced net for inference": lambda m: torch.testing.assert_close(torch.jit.trace(m, X)(X), m(X)),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore:no gradient")
def test_a_right_use_passes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RIGHT[name](net())


def test_numbers_become_pythons_own():
    assert type(Logistic(np.float32(0.5)).scale) is float and Logistic(scale=1).scale == 1
    assert type(OutputNoise(draws=torch.tensor(8)).draws) is int
    assert hash(ULR(copies=np.int64(4))) == hash(ULR(copies=4)) and ULR(copies=np.int64(4)) == ULR(copies=4)


def test_weights_lost_in_training_are_named():
    """A hidden layer that is NaN fires no spike, and the loss stays finite."""
    with pytest.raises(FloatingPointError, match=r"^0\.weight is not finite after step 1"):
        train(net(), optimizer=lambda parameters: Spoiling(parameters, 0.1), epochs=2)


class Spoiling(SGD):
    """An optimizer that makes the first parameter NaN."""

    @torch.no_grad()
    def step(self, closure=None):
        self.param_groups[0]["params"][0].fill_(NAN)


def test_a_first_loss_that_is_not_finite_is_both_kinds_of_error():
    with pytest.raises(FloatingPointError) as error:
        train(net(), loss=lambda o, y: o.sum(1) * NAN)
    assert isinstance(error.value, UsageError)
    train(net(), [*ONE, (X, Y)], loss=nan_once(), estimator=ULR(on_nonfinite="skip"))


def nan_once():
    factors = iter([NAN])
    return lambda o, y: o.sum(1) * next(factors, 1.0)


@pytest.mark.parametrize("place", ["optimizer", "scheduler"])
@pytest.mark.parametrize("kind", [TypeError, ValueError, RuntimeError, KeyError])
def test_a_factory_that_raises_keeps_its_traceback(place, kind):
    def factory(_):
        raise kind("own")

    with pytest.raises(kind, match="own") as error:
        train(net(), **{place: factory})
    assert not isinstance(error.value, UsageError)
    assert traceback.extract_tb(error.value.__traceback__)[-1].name == "factory"


def test_calls_that_python_refuses_keep_its_words():
    with pytest.raises(TypeError, match=r"train\(\) missing 1 required positional argument: 'loader'"):
        ulr_snn.train(net())
    with pytest.raises(TypeError, match="unexpected keyword argument 'epoch'"):
        train(net(), epoch=3)


def test_a_rule_holds_in_functions_and_dataclasses_of_ones_own():
    @checked
    def repeat(word: str, times: Count = 2, *words: str, **others: int) -> str:
        return word * times

    @dataclass(frozen=True)
    class Noise(Logistic):
        extra: "Unknown" = 3  # noqa: F821  # annotations of others are not read
        times: Count | None = None

    assert repeat("a") == "aa" and repeat("a", np.int64(3)) == "aaa" and Noise(times=None).extra == 3
    for wrong in (lambda: repeat("a", 0), lambda: repeat("a", times="2"), lambda: Noise(times=0)):
        with pytest.raises(UsageError, match=r"(repeat|Noise) got times=.*; it must be a whole number, at least 1"):
            wrong()
    with pytest.raises(UsageError, match="scale"):
        Noise(scale=-1)
    check_fields(Noise())


# -- the command line --------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory, importable as the command line makes it and as before afterwards."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


TRAIN = ("train", "digits", "--device", "cpu", "--no-progress", "--epochs", "1")
COMMANDS = {
    "lr of infinity": ((*TRAIN, "--lr", "inf"), "--lr: must be positive and finite, not 'inf'"),
    "lr of NaN": ((*TRAIN, "--lr", "nan"), "--lr"),
    "lr of a word": ((*TRAIN, "--lr", "high"), "--lr"),
    "lr of a comparison": (("compare", "digits", "--lr", "0.1", "0"), "--lr"),
    "epochs": ((*TRAIN, "--epochs", "1.5"), "--epochs: must be a whole number, at least 1, not '1.5'"),
    "seed": ((*TRAIN, "--seed", "0.5"), "--seed"),
    "batch size": (("plan", "digits", "--batch-size", "0"), "--batch-size"),
    "threads": ((*TRAIN, "--threads", "-1"), "--threads"),
    "too many threads": ((*TRAIN, "--threads", "100000"), "--threads: must be a whole number, at least 1, at most "),
    "too many threads of diagnose": (("diagnose", "digits", "--threads", "100000"), "--threads"),
    "a run directory without a name": ((*TRAIN, "--run-dir", ""), "--run-dir: must be a path, not ''"),
    "a run directory of a long name": ((*TRAIN, "--run-dir", "x" * 300), "--run-dir: must be a path, not 'xxx"),
    "a run directory with a null": ((*TRAIN, "--run-dir", "a\0b"), "--run-dir"),
    "a checkpoint without a name": (("evaluate", ""), "RUN_DIR"),
    "a comparison without a name": (("compare", "digits", "--run-dir", ""), "--run-dir"),
    "data without a folder": (("train", "nmnist", "--data-root", ""), "--data-root"),
    "a picture in no folder": (("diagnose", "digits", "--draws", "4", "--picture", "no/x.png"), "no/x.png"),
    "a signal": (("train", "dynamics/sine", *TRAIN[2:]), "dynamics/sine is a signal"),
    "a factory of no arguments": ((*TRAIN, "--model", "nets:net"), "does not take (sample_shape, classes)"),
    "a factory of three": ((*TRAIN, "--model", "nets:three"), "does not take (sample_shape, classes)"),
    "a file of factories": ((*TRAIN, "--model", "../nets:net"), "--model takes module:factory"),
    "a relative module": ((*TRAIN, "--model", "..:net"), "--model takes module:factory"),
    "draws": (("diagnose", "digits", "--draws", "3"), "--draws: must be a whole number, at least 4, not '3'"),
    "device": ((*TRAIN, "--device", "meta"), "meta"),
    "resume": ((*TRAIN, "--resume"), "--run-dir"),
    "weights NaN": ((*TRAIN, "--model", "nets:spoilt"), "1.weight"),
    "frozen": ((*TRAIN, "--model", "nets:frozen"), "requires_grad_"),
    "a layer in a factory": ((*TRAIN, "--model", "nets:leaky"), "beta=2.0"),
}
NETS = """
from torch import nn
from ulr_snn import LIF
def net():
    return nn.Sequential(nn.Flatten(2), nn.Linear(512, 4), LIF(), nn.Linear(4, 10))
def three(shape, classes, width):
    return net()
def spoilt(shape, classes):
    model = net()
    model[1].weight.data.fill_(float("nan"))
    return model
def frozen(shape, classes):
    return net().requires_grad_(False)
def leaky(shape, classes):
    return LIF(beta=2.0)
def broken(shape, classes):
    open("weights-of-mine.pt")
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_command_is_one_line(name, here, capsys):
    (here / "nets.py").write_text(NETS)
    sys.modules.pop("nets", None)
    arguments, says = COMMANDS[name]
    try:
        code = main(arguments)
    except SystemExit as error:  # argparse's way out
        code = error.code
    told = capsys.readouterr()
    assert code == 2 and told.out == ""
    assert told.err.count("\n") == 1 and told.err.startswith("ulr-snn: ") and says in told.err
    assert not list(here.glob("runs/*"))


def test_a_model_factory_that_raises_keeps_its_traceback(here):
    (here / "nets.py").write_text(NETS)
    sys.modules.pop("nets", None)
    with pytest.raises(FileNotFoundError, match="weights-of-mine") as error:
        main((*TRAIN, "--model", "nets:broken"))
    assert traceback.extract_tb(error.value.__traceback__)[-1].name == "broken"
    assert error.value.__cause__ is None and error.value.__context__ is None
