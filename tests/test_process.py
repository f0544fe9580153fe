"""Training leaves the process and the model as they were, and works in threads, forks, workers and notebooks."""

import asyncio
import copy
import gc
import importlib
import logging
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import ulr_snn
from benchmarks import soak
from ulr_snn import UsageError, data

THREADS = 4
SECONDS = 60  # after which a child process counts as hanging


# -- state -------------------------------------------------------------------------------------------------


def state_of_process() -> dict[str, Any]:
    """All that a library may change for the rest of its process."""
    modes = torch.get_float32_matmul_precision(), torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    hooks = [name for name in vars(nn.modules.module) if name.startswith("_global") and name.endswith("hooks")]
    return {
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": [str(item) for item in numpy.random.get_state()],
        "random": random.getstate(),
        "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "threads of numba": threads_of_numba(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "modes": modes,
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
        ),
        "autocast": [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")],
        "autocast cache": torch.is_autocast_cache_enabled(),
        "anomaly": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "denormal numbers": float(torch.tensor([1e-39]) * 1.0),
        "print options of torch": str(vars(torch._tensor_str.PRINT_OPTS)),
        "modules' hooks": {name: list(getattr(nn.modules.module, name)) for name in hooks},
        "numpy": (numpy.geterr(), numpy.get_printoptions()),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "matplotlib": dict(dict.items(matplotlib.rcParams)),
        "pyplot": "matplotlib.pyplot" in sys.modules,
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "path": list(sys.path),
        "logging": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        "python": (sys.excepthook, threading.excepthook, sys.getrecursionlimit(), sys.gettrace(), gc.isenabled()),
        "threads": sorted(t.name for t in threading.enumerate() if not t.name.startswith("ThreadPoolExecutor")),
    }


def threads_of_numba() -> int | None:
    """The number of threads that numba has launched; None if it has launched none. (Its own `get_num_threads` launches
    them, and these set the number of torch's threads.)"""
    numba = sys.modules.get("numba")
    try:
        return None if numba is None or numba.threading_layer() is None else numba.get_num_threads()
    except ValueError:  # numba has launched no threads
        return None


def state_of_model(model: nn.Module) -> dict[str, Any]:
    """All of a model but the values of its parameters and buffers: attributes, hooks, modes and flags of modules."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            held = isinstance(value, dict)
            found[f"{name}.{key}"] = {k: id(v) for k, v in value.items()} if held else (id(value), str(value)[:200])
    for name, q in model.named_parameters():
        found[f"{name} learns"] = q.requires_grad
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {name: (before.get(name), after.get(name)) for name in before | after if before.get(name) != after.get(name)}


def draws(model: nn.Module) -> bool:
    """Whether the model's own modules draw from torch's global generator."""
    return any(isinstance(module, nn.Dropout) for module in model.modules())


def check_unchanged(before: dict[str, Any], model: nn.Module, of_model: dict[str, Any]) -> None:
    found = differences(before, state_of_process())
    if draws(model):
        found.pop("torch generator", None)
    assert not found
    assert not differences(of_model, state_of_model(model))


@pytest.fixture(scope="module", autouse=True)
def other_libraries() -> None:
    """Imports what is imported when it is first needed, and sets warning filters or environment variables itself."""
    for name in ("torch._inductor.config", "sklearn.datasets", "numba", "matplotlib.figure"):
        importlib.import_module(name)


# -- trainings ---------------------------------------------------------------------------------------------


def made(name: str) -> nn.Module:
    return soak.KINDS[name].model()


def few(name: str, count: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Batches of 8 samples, time first."""
    return [(x[:, :8], y[:8]) for x, y in soak.batches(count)]


def run(name: str, model: nn.Module | None = None, seed: int = 0, **options: Any) -> tuple[Any, ...]:
    """All bits of a short training: losses, weights and buffers."""
    model = made(name) if model is None else model
    options = {"progress": False, "device": "cpu", "val_loader": few(name, 1), **soak.KINDS[name].options, **options}
    history = ulr_snn.train(model, options.pop("loader", few(name)), 2, seed=seed, **options).history
    losses = [(entry["train_loss"], entry["val_loss"]) for entry in history]
    return losses, [value.numpy().tobytes() for value in model.state_dict().values()]


FAST = ("dense", "snntorch")  # the other kinds are slow tests


def marked(names: Iterable[str]) -> list[Any]:
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


KINDS = [name for name, kind in soak.KINDS.items() if not kind.workers]
REPEATABLE = [name for name in KINDS if name != "recurrent"]  # whose dropout draws from a generator of all threads


@pytest.mark.parametrize("name", marked(KINDS))
def test_training_leaves_process_and_model_as_they_were(name, tmp_path):
    model = made(name)
    of_model = state_of_model(model)
    before = state_of_process()
    run(name, model, run_dir=tmp_path / "run")
    check_unchanged(before, model, of_model)


@pytest.mark.parametrize("name", marked(KINDS))
def test_the_same_seed_gives_the_same_bits_twice_in_a_process(name):
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(run(name))
    assert found[0] == found[1]
    torch.manual_seed(5)
    assert run(name, seed=1) != found[0]


DOORS: dict[str, Callable[[nn.Module, Path], object]] = {
    "evaluate": lambda model, path: ulr_snn.evaluate(model, few("dense"), device="cpu"),
    "stochastic": lambda model, path: ulr_snn.evaluate(model, few("dense"), "stochastic", activity=True, device="cpu"),
    "plan": lambda model, path: str(ulr_snn.plan(model, few("dense")[0])),
    "diagnose": lambda model, path: ulr_snn.diagnose(
        model, few("dense")[0], draws=4, reference_draws=4, warm_up=1
    ).plot(path / "diagnosis.png"),
    "compare": lambda model, path: ulr_snn.compare(model, few("dense"), few("dense"), epochs=1, progress=False).plot(
        path / "comparison.png"
    ),
    "attach": lambda model, path: steps_of(model),
}


def steps_of(model: nn.Module) -> None:
    with ulr_snn.attach(model) as ulr:
        for x, y in few("dense"):
            ulr.backward(x, y)
            check_unbound(model)


def check_unbound(model: nn.Module) -> None:
    assert not any("site" in vars(module) or "forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["recurrent", pytest.param("snntorch", marks=pytest.mark.slow)])
def test_other_doors_leave_process_and_model_as_they_were(door, name, tmp_path):
    model = made(name)
    for q in model.parameters():
        q.grad = torch.ones_like(q)
    gradients, weights = [q.grad for q in model.parameters()], copy.deepcopy(model.state_dict())
    of_model, before = state_of_model(model), state_of_process()
    DOORS[door](model, tmp_path)
    found = differences(before, state_of_process())
    if door == "attach" and draws(model):
        found.pop("torch generator")
    assert not found
    assert not differences(of_model, state_of_model(model))
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    if door != "attach":
        assert all(q.grad is g and bool((g == 1).all()) for q, g in zip(model.parameters(), gradients, strict=True))


def test_loading_data_leaves_the_process_as_it_was(tmp_path):
    before = state_of_process()
    train_set, _ = data.load("digits", cache_dir=tmp_path, augment=data.Augmentation(shift=2))
    next(iter(data.loader(train_set, shuffle=True)))
    assert not differences(before, state_of_process())


class Stop(Exception):
    """An error of the user's."""


def raising(error: BaseException, at: int) -> Callable[..., None]:
    """A function that raises at its call number `at`."""
    calls = []

    def function(*_: Any) -> None:
        calls.append(None)
        if len(calls) == at:
            raise error

    return function


def failing(place: str, model: nn.Module, error: BaseException) -> dict[str, Any]:
    """Options of `train` with which the second step, or what follows the first epoch, raises this error."""
    stop = raising(error, 2)

    class Loader(list):
        def __iter__(self):
            for batch in super().__iter__():
                stop()
                yield batch

    class Raises(torch.optim.SGD):
        def step(self, closure=None):
            stop()
            return super().step(closure)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if len(outputs) == 8:  # else it is a trial
            stop()
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    return {
        "loss": {"loss": loss, "val_loader": None},
        "callback": {"callbacks": [lambda entry, _: raising(error, 1)()]},
        "loader": {"loader": Loader(few("dense"))},
        "validation": {"val_loader": Loader(few("dense"))},
        "optimizer": {"optimizer": lambda parameters: Raises(parameters, lr=0.1)},
        "metric": {"metrics": {"own": lambda outputs, targets: stop() or 0.0}},
        "model": {},
    }[place]


@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("place", ["loss", "callback", "loader", "validation", "optimizer", "metric", "model"])
def test_an_exception_leaves_process_and_model_as_they_were(place, error, tmp_path):
    model = made("dense")
    model[3].weight.requires_grad_(False)
    options = failing(place, model, error)
    handle = model[3].register_forward_hook(raising(error, 9)) if place == "model" else None
    of_model, before = state_of_model(model), state_of_process()
    with pytest.raises(type(error)):
        run("dense", model, run_dir=tmp_path / "run", **options)
    check_unchanged(before, model, of_model)
    if handle is not None:
        handle.remove()
    run("dense", model)


# -- threads -----------------------------------------------------------------------------------------------


def test_training_in_a_thread_gives_the_same_bits():
    alone = run("dense")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, "dense").result() == alone


@pytest.mark.parametrize("name", marked(REPEATABLE))
def test_four_threads_train_four_models_as_each_alone(name):
    alone = [run(name, seed=seed) for seed in range(THREADS)]
    assert len({str(found) for found in alone}) == THREADS
    together, models = threading.Barrier(THREADS), [made(name) for _ in range(THREADS)]

    def one(seed: int) -> tuple[Any, ...]:
        together.wait()
        return run(name, models[seed], seed=seed)

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(one, range(THREADS))) == alone


@pytest.mark.slow
def test_four_threads_train_models_of_different_kinds_as_each_alone():
    alone, models = {name: run(name) for name in REPEATABLE}, [made(name) for name in REPEATABLE]
    before = state_of_process()
    with ThreadPoolExecutor(THREADS) as pool:
        assert dict(zip(alone, pool.map(run, alone, models), strict=True)) == alone
    assert not differences(before, state_of_process())


@pytest.mark.parametrize("name", marked(KINDS))
def test_other_threads_read_a_model_whose_layers_are_bound_and_let_go(name):
    model, done, errors = made(name), threading.Event(), []

    def read() -> None:
        while not done.is_set() and not errors:
            try:
                list(model.named_modules())
                list(model.named_parameters())
            except Exception as error:
                errors.append(error)

    interval, reader = sys.getswitchinterval(), threading.Thread(target=read)
    sys.setswitchinterval(1e-6)
    try:
        reader.start()
        for _ in range(3):
            run(name, model)
    finally:
        done.set()
        reader.join()
        sys.setswitchinterval(interval)
    assert not errors


# -- forks and workers -------------------------------------------------------------------------------------


def in_child(function: Callable[[], bool]) -> None:
    """Runs a function in a forked child. Fails if it does not return True, or hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python, on forks in processes with threads
        child = os.fork()
    if not child:
        done = False
        try:
            done = function()
        finally:
            os._exit(0 if done else 1)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@needs_fork
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_trains(threads):
    torch.set_num_threads(threads)
    try:
        alone = run("dense")
        torch.rand(1 << 21).exp()  # with two threads, OpenMP starts its own
        in_child(lambda: run("dense") == alone)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)


@needs_fork
def test_a_child_forked_while_another_thread_trains_is_not_locked_out():
    model, began, leave = made("dense"), threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        began.set()
        leave.wait()

    handle = model[3].register_forward_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(run, "dense", model)
        began.wait()
        handle.remove()
        try:
            in_child(lambda: run("dense") == run("dense"))  # another model
            in_child(lambda: refused(model))
        finally:
            leave.set()
        training.result()


def refused(model: nn.Module) -> bool:
    """Whether the model, which another thread has bound, is refused in a sentence."""
    try:
        ulr_snn.evaluate(model, few("dense"), device="cpu")
    except UsageError as error:
        return "already bound" in str(error)
    return False


class Trains(Dataset):
    """Each item is the bits of a training, made where the item is asked for."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, seed: int) -> tuple[Any, ...]:
        return run("dense", seed=seed)


def test_a_worker_of_a_data_loader_trains():
    loader = DataLoader(Trains(), batch_size=None, num_workers=2, collate_fn=lambda item: item)
    assert list(loader) == [run("dense", seed=seed) for seed in range(2)]


# -- surroundings ------------------------------------------------------------------------------------------


def test_training_in_a_running_event_loop_as_in_a_notebook():
    async def cell() -> tuple[Any, ...]:
        return run("dense")

    assert asyncio.run(cell()) == run("dense")


@pytest.mark.parametrize("name", marked(KINDS))
def test_a_default_dtype_of_double_precision(name):
    torch.set_default_dtype(torch.float64)
    try:
        model = made(name)
        of_model, before = state_of_model(model), state_of_process()
        losses, _ = run(name, model)
        check_unchanged(before, model, of_model)
        assert all(q.dtype == torch.float64 for q in model.parameters())
        single = made(name).float()
        run(name, single)  # and a model in single precision
        assert all(q.dtype == torch.float32 for q in single.parameters())
        assert numpy.isfinite(losses).all()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", marked(KINDS))
def test_without_gradients_outside(name):
    torch.manual_seed(5)
    usual = run(name)
    torch.manual_seed(5)
    with torch.no_grad():
        assert run(name) == usual
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("name", marked(KINDS))
def test_inference_mode(name):
    model, loss = made(name), soak.loss_of(name)
    options = {"device": "cpu", "loss": loss}
    usual = [ulr_snn.evaluate(model, few(name), mode, **options) for mode in ("deterministic", "stochastic")]
    with torch.inference_mode():
        with pytest.raises(UsageError, match="inference_mode"):
            run(name, model)
        with pytest.raises(UsageError, match="inference_mode"):
            ulr_snn.attach(model)
        found = [ulr_snn.evaluate(model, few(name), mode, **options) for mode in ("deterministic", "stochastic")]
        planned = str(ulr_snn.plan(model, few(name)[0], loss=loss))
    assert found == usual
    assert planned == str(ulr_snn.plan(model, few(name)[0], loss=loss))
    run(name, model)


@pytest.mark.parametrize("name", marked(KINDS))
def test_deterministic_algorithms(name):
    torch.manual_seed(5)
    usual = run(name)
    torch.manual_seed(5)
    torch.use_deterministic_algorithms(True)
    try:
        assert run(name) == usual
    finally:
        torch.use_deterministic_algorithms(False)
