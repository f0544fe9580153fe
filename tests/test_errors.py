"""Every wrong use of the core ends in a UsageError: one sentence that names what is wrong."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ulr_snn
from ulr_snn import LIF, ULR, Gaussian, LeakyReadout, Logistic, RecurrentLIF, TimeAverage, UsageError, attach
from ulr_snn.credit.kinds import Auto
from ulr_snn.memory.chunks import TimeChunks
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.sampling.kinds import Adaptive, Independent
from ulr_snn.sites.binding import bind

STEPS, BATCH = 4, 3
X, Y = torch.rand(STEPS, BATCH, 2), torch.tensor([0, 1, 1])


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), LIF(), TimeAverage(), nn.Linear(3, 2))


class Returns(nn.Module):
    """A spiking net whose output is changed by hand."""

    def __init__(self, change: Callable) -> None:
        super().__init__()
        self.net, self.change = net(), change

    def forward(self, x: Tensor):
        return self.change(self.net(x))


def step(model=None, x=X, y=Y, estimator=None, loss="ce_count", **settings):
    lengths = settings.pop("lengths", None)
    with ulr_snn.attach(net() if model is None else model, estimator, loss, **settings) as ulr:
        ulr.backward(x, y, lengths=lengths)


def train(model=None, loader=((X, Y),), **settings):
    model = net() if model is None else model
    return ulr_snn.train(model, loader, **{"epochs": 1, "progress": False, "device": "cpu", **settings})


def evaluate(loader=((X, Y),), **settings):
    return ulr_snn.evaluate(net(), loader, **{"device": "cpu", **settings})


def frozen() -> nn.Module:
    return net().requires_grad_(False)


def bound_twice():
    model = net()
    with bind(model, NoiseLevel(Logistic())), bind(model, NoiseLevel(Logistic())):
        pass


def attached_twice():
    """A second attachment steps from inside the first one's forward pass."""
    model = net()

    def loss(outputs, targets):
        return outputs.sum(1)

    with ulr_snn.attach(model, loss=loss) as one, ulr_snn.attach(model, loss=loss) as two:
        model[2].register_forward_hook(lambda *_: two.backward(X, Y))
        one.backward(X, Y)


def nan(value: float) -> Tensor:
    x = X.clone()
    x[1, 2, 0] = value
    return x


WRONG: dict[str, tuple[Callable, str]] = {
    # neurons and noise
    "noise without width": (lambda: Logistic(0.0), "scale=0.0"),
    "noise of negative width": (lambda: Gaussian(-1.0), "Gaussian"),
    "noise scale nan": (lambda: Gaussian(float("nan")), "nan"),
    "noise that starts at nothing": (lambda: Logistic(start=0.0), "start=0.0"),
    "noise that ends below nothing": (lambda: Gaussian(end=-0.1), "end=-0.1"),
    "unknown reset": (lambda: LIF(reset="soft"), "'soft'"),
    "unknown reset of a recurrent layer": (lambda: RecurrentLIF(3, reset="hard"), "'hard'"),
    "threshold zero": (lambda: LIF(threshold=0.0), "threshold=0.0"),
    "one threshold negative": (lambda: LIF(threshold=torch.tensor([1.0, -1.0])), "threshold"),
    "neuron on one step": (lambda: LIF()(torch.rand(3, 2)), "(3, 2)"),
    "neuron on integers": (lambda: LIF()(torch.ones(4, 3, 2, dtype=torch.long)), "int64"),
    "readout on one step": (lambda: LeakyReadout()(torch.rand(3, 2)), "LeakyReadout"),
    # estimator
    "credit": (lambda: ULR(credit="local"), "'local'"),
    "non-finite policy": (lambda: ULR(on_nonfinite="ignore"), "'ignore'"),
    "no copies": (lambda: ULR(copies=0), "copies=0"),
    "half a copy": (lambda: ULR(copies=1.5), "copies=1.5"),
    "refresh never": (lambda: ULR(credit=Auto(refresh=0)), "refresh=0"),
    "no time functions": (lambda: ULR(credit=Auto(time_functions=0)), "time_functions=0"),
    "feedback rate": (lambda: ULR(credit=Auto(rate=0.0)), "rate=0.0"),
    "feedback rate of no number": (lambda: ULR(credit=Auto(rate=None)), "rate=None"),
    "variance of no number": (lambda: Adaptive(variance="low"), "variance='low'"),
    "no memory": (lambda: ULR(memory=None), "memory=None"),
    "a class for memory": (lambda: ULR(memory=TimeChunks), "memory="),
    "shorthands that drop multi_sample": (
        lambda: ULR(sampling=Independent(4, multi_sample=True), antithetic=True),
        "give sampling alone",
    ),
    "shorthands of a sampling of one's own": (
        lambda: ULR(sampling=type("Mine", (Independent,), {})(4), copies=8),
        "give sampling alone",
    ),
    "a class for an estimator": (lambda: train(estimator=ULR), "is no estimator"),
    "a class for an estimator, to evaluate": (lambda: evaluate(estimator=ULR, mode="stochastic"), "is no estimator"),
    "online with a loss of the whole": (lambda: step(estimator=ulr_snn.Online()), "Online makes an update"),
    "odd copies in pairs": (lambda: ULR(copies=3), "copies=3"),
    "residual with one pair": (lambda: ULR(credit="residual", copies=2), "at least 4"),
    "residual with one copy": (lambda: ULR(credit="residual", copies=1, antithetic=False), "at least 2"),
    "loss without gradient": (
        lambda: step(estimator=ULR(credit="feedback"), loss=lambda o, y: (o.argmax(1) != y).float()),
        "'feedback'",
    ),
    "loss without gradient, residual": (
        lambda: step(estimator=ULR(credit="residual"), loss=lambda o, y: (o.argmax(1) != y).float()),
        "credit='global'",
    ),
    # models
    "a class for a model": (lambda: train(nn.Sequential), "is no torch module; give a model"),
    "a function for a model, to evaluate": (lambda: ulr_snn.evaluate(net, [(X, Y)]), "is no torch module"),
    "a function for a model, to plan": (lambda: ulr_snn.plan(net, (X, Y)), "is no torch module"),
    "a function for a model, to compare": (
        lambda: ulr_snn.compare(net, [(X, Y)], [(X, Y)], epochs=1),
        "is no torch module",
    ),
    "a function for a model, to diagnose": (lambda: ulr_snn.diagnose(net, (X, Y)), "is no torch module"),
    "a function for a model, to attach": (lambda: ulr_snn.attach(net), "is no torch module"),
    "no spiking layer": (lambda: ulr_snn.attach(nn.Sequential(nn.Linear(2, 2))), "Sequential"),
    "no spiking layer in training": (lambda: train(nn.Linear(2, 2)), "no spiking layer"),
    "bound twice": (bound_twice, "already bound"),
    "attached twice": (attached_twice, "already bound"),
    "model returns a dictionary": (lambda: step(Returns(lambda o: {"logits": "many"})), "dict"),
    "model loses the batch": (lambda: step(Returns(lambda o: o[0])), "shape (2,)"),
    "model swaps the axes": (lambda: step(Returns(lambda o: o.expand(4, 3, 2).transpose(0, 1))), "shape"),
    "events that are not flat": (
        lambda: step(x=torch.rand(4, 3, 2, 1)),
        "0 (Linear) got a sequence of samples of shape (2, 1)",
    ),
    "a convolution of a sequence": (
        lambda: step(nn.Sequential(nn.Conv2d(1, 2, 3), LIF(), nn.Flatten(2)), torch.rand(4, 3, 1, 5, 5)),
        "Fold(nn.Conv2d(...))",
    ),
    "many events that are not flat": (
        lambda: step(nn.Sequential(nn.Linear(6, 3), LIF()), torch.rand(20, 64, 2, 3), torch.arange(64) % 2),
        "nn.Flatten(2)",
    ),
    # data and losses
    "one step only": (lambda: step(x=X[0]), "(3, 2)"),
    "no tensor": (lambda: step(x=X.tolist()), "list"),
    "axes swapped": (lambda: step(x=X.transpose(0, 1)), "time_first=False"),
    "axes swapped the other way": (lambda: step(x=X, time_first=False), "time_first=True"),
    "too few targets": (lambda: step(y=Y[:2]), "2 targets"),
    "nan in events": (lambda: step(x=nan(float("nan"))), "NaN"),
    "infinite events": (lambda: step(x=nan(float("inf"))), "infinite"),
    "length too long": (lambda: step(lengths=torch.tensor([4, 5, 1])), "lengths"),
    "length zero": (lambda: step(lengths=torch.tensor([4, 0, 1])), "lengths"),
    "lengths of another batch": (lambda: step(lengths=torch.tensor([4, 4])), "lengths"),
    "unknown loss": (lambda: step(loss="ce"), "'ce'"),
    "scalar loss": (lambda: step(loss=lambda o, y: nn.functional.cross_entropy(o, y)), "one value"),
    "a loss of torch's on a sequence": (
        lambda: step(nn.Sequential(nn.Linear(2, 3), LIF(), nn.Linear(3, 2)), loss=nn.CrossEntropyLoss()),
        "'ce_rate'",
    ),
    "labels out of range": (lambda: step(y=Y + 1), "1 to 2"),
    "labels that are not classes": (lambda: step(y=Y.float()), "float32"),
    # registers
    "a loss that is none": (lambda: ulr_snn.losses.register("mine", None), "give a NamedLoss"),
    "a data set that is none": (lambda: ulr_snn.data.register("mine", 3), "give an Entry"),
    "an adapter that is none": (lambda: ulr_snn.adapters.register("mine", "mine"), "give an Adapter"),
    # train and evaluate
    "no epochs": (lambda: train(epochs=0), "epochs=0"),
    "half an epoch": (lambda: train(epochs=0.5), "epochs=0.5"),
    "accumulate": (lambda: train(accumulate=0), "accumulate=0"),
    "max_steps": (lambda: train(max_steps=0), "max_steps=0"),
    "empty loader": (lambda: train(loader=[]), "empty"),
    "exhausted generator": (lambda: train(loader=(b for b in ()), scheduler=None), "no batch"),
    "generator used twice": (
        lambda: train(loader=(b for b in [(X, Y)]), scheduler=None, epochs=2),
        "only once",
    ),
    "generator with a schedule": (
        lambda: train(loader=(b for b in [(X, Y)])),
        "the one-cycle schedule needs the number",
    ),
    "batch without targets": (lambda: train(loader=[X]), "(x, y)"),
    "batch with too much": (lambda: train(loader=[(X, Y, Y, Y)]), "(x, y, lengths)"),
    "nothing to train": (lambda: train(frozen()), "requires_grad_"),
    "two learning rates": (lambda: train(lr=0.1, optimizer=torch.optim.SGD), "lr=0.1"),
    "learning rate": (lambda: train(lr=0.0), "lr=0.0"),
    "scheduler": (lambda: train(scheduler="linear"), "'linear'"),
    "device": (lambda: train(device="abacus"), "'abacus'"),
    "mode": (lambda: evaluate(mode="noisy"), "'noisy'"),
    "copies of deterministic firing": (lambda: evaluate(copies=2), "copies=2"),
    "no copies to evaluate": (lambda: evaluate(mode="stochastic", copies=0), "copies=0"),
    "nothing to evaluate": (lambda: evaluate([]), "no batch"),
    "evaluate with axes swapped": (lambda: evaluate([(X.transpose(0, 1), Y)]), "time_first=False"),
    "evaluate with labels out of range": (lambda: evaluate([(X, Y + 5)]), "labels"),
    "evaluate on nan": (lambda: evaluate([(nan(float("nan")), Y)]), "NaN"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_one_sentence_that_names_it(name):
    use, says = WRONG[name]
    with pytest.raises(UsageError) as error:
        use()
    message = str(error.value)
    assert says in message
    assert "\n" not in message and ". " not in message and len(message) < 250


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_gpu_is_named():
    with pytest.raises(UsageError, match="no CUDA device"):
        train(device="cuda")


def test_the_model_is_free_again_after_a_wrong_use():
    model = net()
    for wrong in (lambda: step(model, y=Y + 5), lambda: step(model, loss=lambda o, y: o.sum())):
        with pytest.raises(UsageError):
            wrong()
    step(model)


def test_a_correct_use_raises_nothing():
    step()
    train()
    evaluate(mode="stochastic", copies=2)


class Patches(nn.Module):
    """[T, B, N] -> [T, 2 B, N / 2]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (2, -1)).flatten(1, 2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 6), RecurrentLIF(7), nn.Linear(7, 3)), "recurrent weights \\(7, 7\\)"),
        (lambda: nn.Sequential(Patches(), nn.Linear(4, 3), LIF()), "shape \\(5, ., 3\\) for 5 steps"),
        (lambda: biased(RecurrentLIF(6)), "a Linear without a bias"),
    ],
)
def test_kernels_read_no_foreign_memory(model, message):
    x, y = torch.rand(5, 4, 8), torch.zeros(4, dtype=torch.long)
    with pytest.raises(UsageError, match=message), attach(model()) as ulr:
        ulr.backward(x, y)


def biased(neuron: RecurrentLIF) -> nn.Sequential:
    neuron.recurrent = nn.Linear(6, 6)
    return nn.Sequential(nn.Linear(8, 6), neuron)


def test_thresholds_of_shape_one_by_n():
    x = torch.rand(5, 4, 3)
    thresholds = torch.tensor([0.5, 0.9, 1.5])
    assert torch.equal(LIF(threshold=thresholds[None])(x), LIF(threshold=thresholds)(x))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, first: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 3), LIF(), nn.Linear(3, 2))
        self.reentrant, self.first = reentrant, first

    def forward(self, x: Tensor) -> Tensor:
        part = self.net[self.first : self.first + 2]
        return self.net[self.first + 2 :](checkpoint(part, self.net[: self.first](x), use_reentrant=self.reentrant))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_that_would_fire_again_in_the_backward_pass(reentrant):
    for first in (0, 1):
        model = Checkpointed(reentrant, first)
        for use in (
            lambda m: attach(m).backward(X, Y),
            lambda m: ulr_snn.plan(m, (X, Y)),
            lambda m: ulr_snn.compare(m, [(X, Y)], [(X, Y)], ["surrogate"], epochs=1, progress=False, device="cpu"),
        ):
            with pytest.raises(UsageError, match=r"a LIF fires in a part .* checkpoint"):
                use(model)
        plain = ulr_snn.evaluate(model.net, [(X, Y)], device="cpu")
        assert ulr_snn.evaluate(model, [(X, Y)], device="cpu") == plain


def test_layers_that_do_not_fire_may_be_checkpointed():
    model = Checkpointed(False, 2)
    found = [attach(each, seed=0).backward(X, Y).loss for each in (model, model.net)]
    assert torch.equal(*found)
