"""Errors of a model's own code surface as they are, whatever is tried with the model."""

import traceback

import pytest
import torch
from torch import Tensor, nn

from ulr_snn import evaluate
from ulr_snn.losses.named import resolve
from ulr_snn.model.batch import Batch
from ulr_snn.model.bound import Binder
from ulr_snn.model.finding import find_call

STEPS, BATCH = 50, 4
X = torch.ones(STEPS, BATCH, 3)
MISTAKES = [AttributeError, KeyError, NameError, ZeroDivisionError, RecursionError, torch.OutOfMemoryError]


def runs_by_step(model: nn.Module, x: Tensor) -> bool:
    batch = Batch.of(model, x, torch.zeros(BATCH, dtype=torch.long), None, resolve("ce_count"))
    return find_call(model, batch)[0].way == "step"


class Failing(nn.Module):
    """Raises its errors for a whole sequence, and for one time step, if there are some."""

    def __init__(self, whole: Exception, step: Exception | None) -> None:
        super().__init__()
        calls: list[int] = []
        errors = {3: whole, 2: step}

        def answer(x: Tensor) -> Tensor:  # sees what it holds as it is: attributes are copied for a trial
            calls.append(x.ndim)
            if errors[x.ndim] is not None:
                raise errors[x.ndim]
            return x

        self.answer, self.called = answer, lambda: calls

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(x)


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_no_sign_of_the_wrong_call(kind):
    error = kind("own")
    model = Failing(error, None)
    with pytest.raises(kind, match="own") as found:
        runs_by_step(model, X)
    assert set(model.called()) == {3} and found.value is error


@pytest.mark.parametrize("kind", [AttributeError, KeyError, NameError, ZeroDivisionError])
def test_a_mistake_in_a_time_step_is_told_in_place_of_the_shape(kind):
    with pytest.raises(kind, match="own"):
        runs_by_step(Failing(RuntimeError("shapes"), kind("own")), X)


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, TypeError, IndexError, AssertionError])
def test_a_refused_shape_means_a_time_step_a_call(kind):
    assert runs_by_step(Failing(kind("shapes"), None), X)


def test_what_both_calls_raise():
    error = ValueError("own")
    with pytest.raises(ValueError, match="own") as found:
        evaluate(Failing(error, ValueError("own")), [(X, torch.zeros(BATCH, dtype=torch.long))], device="cpu")
    assert found.value is error and not hasattr(found.value, "__notes__")
    assert traceback.extract_tb(found.value.__traceback__)[-1].filename == __file__

    with pytest.raises(RuntimeError, match="of sequences") as found:
        runs_by_step(Failing(RuntimeError("of sequences"), ValueError("of steps")), X)
    assert found.value.__notes__ == ["called with a time step at a time, it raises ValueError: of steps"]


def test_the_engine_hides_no_mistake():
    snntorch = pytest.importorskip("snntorch")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.neuron, self.least, self.mistaken = nn.Linear(3, 3), snntorch.Leaky(beta=0.9), 1, False

        def forward(self, x: Tensor) -> Tensor:
            if self.mistaken and torch.is_grad_enabled():
                raise KeyError("own")
            every, state, outputs = len(x) // self.least, self.neuron.init_leaky(), []
            for step in x:
                spikes, state = self.neuron(self.linear(step), state)
                outputs.append(spikes)
            return torch.stack(outputs) * (every / every)

    def why(model: Net) -> str:
        targets = torch.zeros(BATCH, dtype=torch.long)
        return "".join(Binder(model, {}).bound(Batch.of(model, X, targets, None, resolve("ce_count")))[0].describe())

    model = Net()
    model.mistaken = True
    with pytest.raises(KeyError, match="own"):
        why(model)
    model.mistaken, model.least = False, STEPS  # fewer time steps would divide by zero
    assert "outputs are something else" in why(model)
