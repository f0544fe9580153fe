"""Several threads on one model take turns."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, get_ident

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import currents
from ulr_snn import LIF, Fold, TimeAverage, UsageError, attach, evaluate
from ulr_snn.noise.firing import Logistic
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.sites.binding import bind

THREADS = 4


def net() -> nn.Sequential:
    torch.manual_seed(1)
    hidden = nn.Linear(4, 16), Fold(nn.BatchNorm1d(16), nn.Dropout(0.5)), LIF()
    return nn.Sequential(*hidden, TimeAverage(), nn.Linear(16, 3))


def data(batch: int = 12) -> tuple[Tensor, Tensor]:
    return currents(6, batch, 4, 3)


@pytest.mark.parametrize("options", [{}, {"mode": "stochastic", "copies": 2}], ids=["deterministic", "stochastic"])
def test_evaluations_of_one_model(options):
    model, modes = net(), []
    alone = evaluate(copy.deepcopy(model), [data()] * 3, device="cpu", **options)

    def slowly(module: nn.Module, *_: object) -> None:
        modes.append(module.training)
        time.sleep(2e-3)  # the other threads go on

    model[2].register_forward_hook(slowly)
    together = Barrier(THREADS)

    def measured(_: int) -> dict:
        together.wait()
        return evaluate(model, [data()] * 3, device="cpu", **options)

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(measured, range(THREADS))) == [alone] * THREADS
    assert modes and not any(modes) and all(module.training for module in model.modules())


def test_an_evaluation_waits_for_a_training_step_in_another_thread():
    model, began, modes = net(), Event(), {True: [], False: []}
    evaluating = get_ident()

    def slowly(module: nn.Module, *_: object) -> None:
        modes[get_ident() == evaluating].append(module.training)
        time.sleep(5e-3)  # the other thread goes on

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        began.set()
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    def steps() -> None:
        with attach(model, loss=loss) as ulr:
            for _ in range(5):
                ulr.backward(*data())

    steps()  # what is compiled once takes no turn later
    began.clear()
    model[2].register_forward_hook(slowly)
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(steps)
        began.wait()
        evaluate(model, [data()] * 3, device="cpu")
        training.result()
    assert all(modes[False]) and not any(modes[True]) and len(modes[True]) == 4  # with a trial
    assert all(module.training for module in model.modules())


def test_a_thread_that_binds_a_model_twice_gets_an_error():
    model, bound, leave = net(), Event(), Event()

    def holding() -> None:
        with bind(model, NoiseLevel(Logistic())):
            bound.set()
            leave.wait()

    def waiting() -> None:
        with bind(model, NoiseLevel(Logistic())), pytest.raises(UsageError, match="already bound"):
            evaluate(model, [data()], device="cpu")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(holding)
        bound.wait()
        second = pool.submit(waiting)
        time.sleep(0.05)
        waits = not second.done()
        leave.set()
        first.result()
        second.result()
    assert waits
    waiting()  # and the model has been let go


def test_evaluate_does_not_touch_the_gradients_of_a_model_that_is_on_its_device(monkeypatch):
    """A training in another thread may clear them while torch looks at them."""
    model = nn.Sequential(nn.Linear(4, 3), LIF())
    monkeypatch.setattr(model, "_apply", lambda *arguments, **named: pytest.fail("the model was moved"))
    evaluate(model, [(torch.rand(5, 2, 4), torch.arange(2))], device="cpu")
