"""Trainings that end early, by errors, signals and kills, and go on as if they had not."""

import copy
import multiprocessing
import os
import random
import signal
import time
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)

import ulr_snn
from tests.helpers import batches, net
from tests.runs_to_kill import BATCHES, EPOCHS, Noisy, figures, killed, plain, stacked, train_one, without_room
from tests.written import Above
from tests.written import Own as WrittenOut
from ulr_snn import ULR, Online, UsageError
from ulr_snn.errors import Interrupted, LoaderError, SaveError, Terminated
from ulr_snn.peers import METHODS
from ulr_snn.runs import directory
from ulr_snn.runs.checkpoints import checkpoints
from ulr_snn.runs.directory import RunDirectory


class Stop(Exception):
    pass


class Stopping:
    """Cross-entropy of the outputs summed over time, which fails at its n-th call, in the midst of a step."""

    def __init__(self, at: int, error: type[BaseException] = Stop) -> None:
        self.at, self.error, self.calls = at, error, 0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        outputs = outputs.sum(0) if outputs.ndim == 3 else outputs
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    def __repr__(self) -> str:
        return "cross-entropy"


def same(first: object, second: object) -> bool:
    """Whether trees of tensors and plain values are equal bit for bit."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


# -- data ----------------------------------------------------------------------------------------------------


class Own(Sampler):
    """Draws its order from NumPy, and tells apart epochs that it was told of."""

    def __init__(self, count: int) -> None:
        self.count, self.random, self.epoch = count, numpy.random.RandomState(5), -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        return iter(numpy.roll(self.random.permutation(self.count), self.epoch).tolist())


class Streamed(IterableDataset):
    def __iter__(self):
        return iter(plain())


def seeded(seed: int = 4) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loader_of(dataset=None, size: int = 16, **options) -> DataLoader:
    return DataLoader(plain() if dataset is None else dataset, size, collate_fn=stacked, **options)


LOADERS = {
    "list": lambda: [(x.transpose(0, 1), y) for x, y in batches()],
    "shuffled by torch": lambda: loader_of(shuffle=True),
    "shuffled by its generator": lambda: loader_of(shuffle=True, generator=seeded()),
    "random data": lambda: loader_of(Noisy(), shuffle=True, generator=seeded()),
    "random sampler": lambda: loader_of(sampler=RandomSampler(plain(), generator=seeded())),
    "with replacement": lambda: loader_of(
        sampler=RandomSampler(plain(), replacement=True, num_samples=96, generator=seeded())
    ),
    "weighted": lambda: loader_of(sampler=WeightedRandomSampler([1.0] * 48 + [2.0] * 48, 96)),
    "batch sampler": lambda: DataLoader(
        plain(), batch_sampler=BatchSampler(RandomSampler(plain()), 16, False), collate_fn=stacked
    ),
    "own sampler": lambda: loader_of(sampler=Own(96)),
    "distributed sampler": lambda: loader_of(sampler=DistributedSampler(plain(), 1, 0)),
    "processes": lambda: loader_of(Noisy(), shuffle=True, generator=seeded(), num_workers=2),
    "processes that stay": lambda: loader_of(
        plain(), shuffle=True, generator=seeded(), num_workers=1, persistent_workers=True
    ),
}


def run(loader, folder, resume: bool | str = False, at: int = 0, estimator=None, **options):
    torch.manual_seed(2)
    numpy.random.seed(2)
    random.seed(2)
    estimator = estimator or ULR(copies=2)
    settings = {"estimator": estimator, "time_first": False, "progress": False, "device": "cpu", "save_every": 2}
    settings |= {"loss": Stopping(at)} | options
    settings["save_every"] = settings["save_every"] if folder is not None else None
    random_layer = [] if isinstance(estimator, Online) else [nn.Dropout(0.2)]
    model = nn.Sequential(nn.Linear(8, 12), ulr_snn.LIF(), *random_layer, nn.Linear(12, 2))
    result = ulr_snn.train(model, loader, 2, run_dir=folder, resume=resume, **settings)
    return figures(result)


def counted(*args, **options) -> tuple[object, int]:
    """The figures of a run, and how often it called its loss."""
    loss = Stopping(0)
    return run(*args, loss=loss, **options), loss.calls


@pytest.mark.product
@pytest.mark.parametrize("kind", LOADERS)
def test_an_epoch_goes_on_in_its_midst(kind, tmp_path):
    straight, calls = counted(LOADERS[kind](), None)
    for at in (calls // 3, calls - 2):  # in the midst of the first epoch, and of the second
        with pytest.raises(Stop):
            run(LOADERS[kind](), tmp_path / str(at), at=at)
        assert same(run(LOADERS[kind](), tmp_path / str(at), resume=True), straight)


ESTIMATORS = {
    "global": ULR(credit="global", copies=4),
    "residual": ULR(credit="residual", copies=4),
    "learned maps": ULR(maps="learned"),
    "layer by layer": ULR(credit="global", copies=4, layerwise=True),
    "weight noise": ULR(noise={"0.weight": ulr_snn.WeightNoise()}, copies=4),
    "adaptive": ULR(credit="global", copies=ulr_snn.Adaptive()),
    "online": Online(),
}
TRAININGS = {
    "accumulated": {"accumulate": 2, "save_every": 1},
    "schedule by loss": {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau},
    "momentum": {"optimizer": lambda q: torch.optim.SGD(q, 0.05, momentum=0.9), "scheduler": None},
    "clipped": {"clip": 0.1},
    "own metric": {"metrics": {"error": lambda outputs, y: outputs.sum(0).argmax(-1) != y}},
}


class Cut(DataLoader):
    """Fails at the 5th batch of its 2nd epoch."""

    epochs = 0

    def __iter__(self):
        self.epochs += 1
        for i, batch in enumerate(super().__iter__()):
            if (self.epochs, i) == (2, 4):
                raise Stop
            yield batch


@pytest.mark.product
@pytest.mark.parametrize("case", [*ESTIMATORS, *TRAININGS])
def test_all_that_a_step_changes_is_saved(case, tmp_path):
    options = {"loss": "ce_rate", "estimator": ESTIMATORS.get(case)} | TRAININGS.get(case, {})
    kind = LOADERS["shuffled by its generator"]
    straight = run(kind(), None, **options)
    with pytest.raises(Stop):
        run(Cut(plain(), 16, shuffle=True, generator=seeded(), collate_fn=stacked), tmp_path, **options)
    assert checkpoints(tmp_path)[-1].state["ranks"][0]["under_way"] is not None
    resumed = run(kind(), tmp_path, resume=True, **options)
    if case == "online":  # which observes the model anew, by a pass more
        assert resumed[0][-1].pop("forward_passes") == straight[0][-1].pop("forward_passes") + 16
    assert same(resumed, straight)


def test_a_stream_goes_on_at_the_start_of_its_epoch_and_says_so(tmp_path):
    _, calls = counted(loader_of(Streamed()), None, scheduler=None)
    with pytest.raises(Stop):
        run(loader_of(Streamed()), tmp_path, at=calls - 3, scheduler=None)
    with pytest.warns(UserWarning, match="cannot be begun in the midst of epoch 2"):
        history, _ = run(loader_of(Streamed()), tmp_path, resume=True, scheduler=None)
    assert [entry["epoch"] for entry in history] == [1, 2]


# -- signals -------------------------------------------------------------------------------------------------


class Signalling(Stopping):
    """Raises a signal in the midst of a step, which is to end."""

    def __init__(self, at: int, number: int, times: int = 1) -> None:
        super().__init__(0)
        self.after, self.number, self.times = at, number, times

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.calls == self.after:
            for _ in range(self.times):
                signal.raise_signal(self.number)
        return super().__call__(outputs, targets)


@pytest.mark.parametrize("number, error", [(signal.SIGINT, Interrupted), (signal.SIGTERM, Terminated)])
def test_a_signal_ends_the_training_after_its_step(number, error, tmp_path):
    straight = run(LOADERS["list"](), None)
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(error, match=r"in epoch 1 after step \d, which is saved.*resume=True and run_dir=") as raised:
        run(LOADERS["list"](), tmp_path, loss=Signalling(4, number), save_every="10m")
    assert isinstance(raised.value, KeyboardInterrupt if number == signal.SIGINT else SystemExit)
    assert number == signal.SIGINT or raised.value.code == 143
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert f"after step {checkpoints(tmp_path)[-1].state['steps']}," in str(raised.value)
    assert same(run(LOADERS["list"](), tmp_path, resume=True), straight)


def test_a_second_signal_ends_the_training_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt) as raised:
        run(LOADERS["list"](), tmp_path, loss=Signalling(5, signal.SIGINT, times=2))
    assert not isinstance(raised.value, Interrupted) and checkpoints(tmp_path)


def test_a_handler_of_the_users_own_is_called_after_the_training_is_saved(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(len(checkpoints(tmp_path))))
    try:
        with pytest.raises(Terminated):
            run(LOADERS["list"](), tmp_path, loss=Signalling(4, signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen and seen[0] >= 1


def test_without_a_run_directory_signals_are_as_usual():
    with pytest.raises(KeyboardInterrupt) as raised:
        run(LOADERS["list"](), None, loss=Signalling(4, signal.SIGINT))
    assert not isinstance(raised.value, Interrupted)


# -- errors --------------------------------------------------------------------------------------------------


def failing(entry: dict, model: nn.Module) -> None:
    if entry["epoch"] == 2:
        raise Stop


def test_an_error_of_a_callback_costs_no_step(tmp_path):
    straight = run(LOADERS["shuffled by torch"](), None)
    with pytest.raises(Stop) as raised:
        run(LOADERS["shuffled by torch"](), tmp_path, callbacks=[failing], save_every="10m")
    assert "saved up to step 12" in raised.value.__notes__[0]
    assert not list(tmp_path.glob("try*"))
    before = len(list(tmp_path.glob("checkpoint-*")))
    assert same(run(LOADERS["shuffled by torch"](), tmp_path, resume=True), straight) and before == 2


class Dying(TensorDataset):
    """A data set one of whose samples ends the process that fetches it, after the training has made a step."""

    def __getitem__(self, i):
        if i == 60:
            time.sleep(0.5)
            os._exit(3)
        return super().__getitem__(i)


def test_a_loaders_process_that_dies_is_one_error_and_no_step_is_lost(tmp_path):
    straight = run(loader_of(num_workers=1), None)  # first, so that no kernel is compiled in the first step below
    dataset = Dying(*plain().tensors)
    with pytest.raises(LoaderError, match="lost a process"):
        run(loader_of(dataset, num_workers=1), tmp_path, save_every="10m")
    assert checkpoints(tmp_path)[-1].state["steps"] in (1, 2, 3)
    assert same(run(loader_of(num_workers=1), tmp_path, resume=True), straight)


def root_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss of output spikes that is 0 where its derivative is infinite."""
    wanted = 4.0 * nn.functional.one_hot(targets, 2)
    return (((outputs.sum(0) if outputs.ndim == 3 else outputs) * 0 + wanted - wanted) ** 2).sum(1).sqrt()


@pytest.mark.parametrize("choice", ["stop", "skip", "shrink"])
def test_gradients_that_are_not_finite_never_reach_the_weights(choice, tmp_path):
    model = net()
    before = copy.deepcopy(model.state_dict())

    def go():
        estimator = ULR(credit="feedback", on_nonfinite=choice)
        return ulr_snn.train(model, batches(), 1, loss=root_of, estimator=estimator, run_dir=tmp_path, progress=False)

    if choice == "stop":
        with pytest.raises(FloatingPointError, match=r"the gradient of \S+ is not finite at step 1 \(\d+ NaN"):
            go()
        assert not checkpoints(tmp_path)
    else:
        go()
        assert checkpoints(tmp_path)[-1].state["stepper"]["size"] == (2.0**-BATCHES if choice == "shrink" else 1)
    for name, value in before.items():
        assert torch.equal(value, model.state_dict()[name])


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    def spoil(entry, model):
        if entry["epoch"] == 2:
            next(model.parameters()).data[0] = torch.nan

    with pytest.raises(FloatingPointError, match=r"0\.weight is not finite"):
        ulr_snn.train(net(), batches(), 2, run_dir=tmp_path, callbacks=[spoil], progress=False)
    assert checkpoints(tmp_path)[-1].state["epoch"] == 1


class Spoiled(nn.Module):
    """A net whose second layer gets NaN at time step 3 of the last sample, once the batch is spoiled."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fire, self.second = nn.Linear(8, 6), ulr_snn.LIF(), nn.Linear(6, 4)
        self.again, self.last = ulr_snn.LIF(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        drive = self.second(self.fire(self.first(x)))
        bad = torch.zeros_like(drive)
        if (x > 1.5).any():
            bad[3, -1] = torch.nan
        return self.last(self.again(drive + bad))


def test_a_loss_that_is_not_finite_is_told_with_step_layer_and_sample():
    loader = batches()
    loader[4] = (loader[4][0] * 2, loader[4][1])
    with pytest.raises(FloatingPointError, match="at step 5") as raised:
        ulr_snn.train(Spoiled(), loader, 1, loss="ce_rate", progress=False)
    assert "the membranes of layer 'again' are the first that are not finite" in raised.value.__notes__[0]
    assert "at time step 3 of sample 15" in raised.value.__notes__[0]


def test_a_loss_alone_that_is_not_finite_is_told():
    with pytest.raises(FloatingPointError) as raised:
        ulr_snn.train(net(), batches(), 1, loss=lambda o, y: o.flatten(1).sum(1) * torch.nan, progress=False)
    assert "so look at the loss" in raised.value.__notes__[0]


@pytest.mark.parametrize("kind, threshold", [("silent", 1e6), ("saturated", 1e-6)])
def test_layers_that_say_nothing_are_reported_in_the_first_epoch(kind, threshold, capsys):
    model = nn.Sequential(
        nn.Linear(8, 8), ulr_snn.LIF(), nn.Linear(8, 6), ulr_snn.LIF(threshold=threshold), nn.Linear(6, 2)
    )
    if kind == "saturated":
        nn.init.ones_(model[2].bias)
        nn.init.zeros_(model[2].weight)
    result = ulr_snn.train(model, batches(), 2, lr=1e-6)
    assert result.history[0][kind] == ["3"] and kind not in result.history[1]
    assert (
        f"note: layer '3' {'never fires' if kind == 'silent' else 'fires at every time step'}"
        in capsys.readouterr().err
    )


def test_layers_that_fire_are_not_reported():
    assert not {"silent", "saturated"} & set(ulr_snn.train(net(), batches(), 1, progress=False).history[0])


# -- settings ------------------------------------------------------------------------------------------------

CHANGES = {
    "lr": ({"lr": 0.02}, "optimizer"),
    "estimator": ({"estimator": ULR(copies=4)}, "estimator"),
    "seed": ({"seed": 3}, "seed 0, not 3"),
    "loss": ({"loss": "ce_rate"}, "loss"),
    "accumulate": ({"accumulate": 2}, "accumulate 1, not 2"),
    "clip": ({"clip": 1.0}, "clip None, not 1.0"),
    "optimizer": ({"optimizer": torch.optim.SGD}, "optimizer .*Adam.*, not .*SGD"),
    "schedule": ({"scheduler": None}, "scheduler auto, not None"),
    "batches": ({"loader": batches(48)}, "batches an epoch 6, not 3"),
    "model": ({"model": nn.Sequential(nn.Linear(8, 16), ulr_snn.LIF(beta=0.5), nn.Linear(16, 2))}, "model"),
}


def usual(folder, resume: bool | str = False, epochs: int = 1, **options):
    given = {"model": net(), "loader": batches(), "progress": False} | options
    return ulr_snn.train(given.pop("model"), given.pop("loader"), epochs, run_dir=folder, resume=resume, **given)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    folder = tmp_path_factory.mktemp("started")
    usual(folder)
    return folder


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_with_the_settings_of_its_start(change, started):
    options, match = CHANGES[change]
    with pytest.raises(UsageError, match=f"was started with {match}"):
        usual(started, True, 2, **options)


def test_changed_settings_are_taken_where_asked_for(tmp_path):
    usual(tmp_path)
    assert len(usual(tmp_path, "changed", 2, lr=0.02, estimator=ULR(copies=4), clip=1.0).history) == 2
    with pytest.raises(UsageError, match=r"clip 1\.0, not None"):
        usual(tmp_path, True, 3, lr=0.02, estimator=ULR(copies=4))
    slow = usual(tmp_path, "changed", 3, optimizer=lambda q: torch.optim.SGD(q, 0.3), scheduler=None)
    assert slow.history[-1]["lr"] == 0.3
    assert usual(tmp_path, "changed", 4, lr=0.5, scheduler=None).history[-1]["lr"] == 0.5
    assert 0 < usual(tmp_path, "changed", 6, lr=0.5).history[-1]["lr"] < 0.5  # the cosine of six epochs


def half_frozen() -> nn.Sequential:
    model = net()
    model[0].requires_grad_(False)
    return model


def test_layers_that_have_thawed_stay_so(tmp_path):
    def thaw(entry, model):
        if entry["epoch"] == 1:
            model[0].requires_grad_(True)
        if entry["epoch"] == stop:
            raise Stop

    stop = 0
    whole, resumed = half_frozen(), half_frozen()
    ulr_snn.train(whole, batches(), 4, callbacks=[thaw], progress=False)
    stop = 2
    with pytest.raises(Stop):
        usual(tmp_path, epochs=4, model=half_frozen(), callbacks=[thaw])
    stop = 0
    usual(tmp_path, True, 4, model=resumed, callbacks=[thaw])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(UsageError, match=r"frozen parameters \(0.weight, 0.bias\), not \(\)"):
        usual(tmp_path, True, 5)


OTHERS = {
    "an estimator of another kind": ({"estimator": METHODS["surrogate"]()}, {}),
    "evolution": ({}, {"estimator": METHODS["evolution"]()}),
    "expected gradients": ({}, {"estimator": METHODS["expected"]()}),
    "groups of parameters": (
        {"optimizer": lambda q: torch.optim.SGD(q, 0.1)},
        {"optimizer": lambda q: torch.optim.SGD([{"params": [each]} for each in q], 0.1)},
    ),
    "frozen parameters": ({}, {"model": half_frozen()}),
    "precision": ({}, {"model": net().double()}),
}


@pytest.mark.parametrize("change", OTHERS)
def test_a_run_goes_on_with_other_parts(change, tmp_path):
    first, second = OTHERS[change]
    usual(tmp_path, **first)
    found = usual(tmp_path, "changed", 2, **second)
    assert len(found.history) == 2 and found.history[1]["train_loss"] < 2


@pytest.mark.parametrize(
    "first, second, epochs",
    [((1, 3), (1, 6), [1, 1]), ((1, 6), (2, 12), [1, 2]), ((2, 8), (3, 18), [1, 2, 2, 3]), ((2, 6), (2, 12), [1, 2])],
)
def test_an_epoch_that_max_steps_has_ended_goes_on(first, second, epochs, tmp_path):
    loader, told = batches(), []
    for resume, (most, steps) in enumerate((first, second)):
        options = {"max_steps": steps, "run_dir": tmp_path, "resume": bool(resume), "progress": False}
        callbacks = [lambda entry, model: told.append(entry["epoch"])]
        result = ulr_snn.train(net(), loader, most, callbacks=callbacks, **options)
        assert (result.metrics["steps"], result.metrics["epochs"]) == (steps, -(-steps // len(loader)))
    assert [entry["forward_passes"] for entry in result.history] == [sum(len(y) for _, y in loader)] * second[0]
    assert told == epochs


def test_a_validation_that_fails_behind_an_epoch_that_max_steps_has_ended(tmp_path):
    """The epoch is not over, so that nothing of it is told twice or lost."""
    loader, calls = batches(), []

    class Fails:
        def __call__(self, entry, model):
            calls.append(entry["epoch"])
            if len(calls) == 1:
                raise Stop

    options = {"run_dir": tmp_path, "progress": False}
    with pytest.raises(Stop):
        ulr_snn.train(net(), loader, 1, callbacks=[Fails()], max_steps=3, **options)
    result = ulr_snn.train(net(), loader, 1, callbacks=[Fails()], max_steps=6, resume=True, **options)
    again = ulr_snn.train(net(), loader, 1, callbacks=[Fails()], max_steps=6, resume=True, **options)
    assert [entry["epoch"] for entry in result.history] == [entry["epoch"] for entry in again.history] == [1]


def test_callbacks_see_an_epoch_that_goes_on_as_if_it_had_not_ended(tmp_path):
    class Counts:
        def __init__(self) -> None:
            self.epochs: list[int] = []

        def __call__(self, entry, model):
            self.epochs.append(entry["epoch"])

        def state_dict(self) -> dict:
            return {"epochs": list(self.epochs)}

        def load_state_dict(self, state: dict) -> None:
            self.epochs = list(state["epochs"])

    options = {"run_dir": tmp_path, "progress": False}
    ulr_snn.train(net(), batches(), 2, callbacks=[Counts()], max_steps=8, **options)
    seen = Counts()
    ulr_snn.train(net(), batches(), 3, callbacks=[seen], max_steps=18, resume=True, **options)
    assert seen.epochs == [1, 2, 3]


# -- files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    usual(tmp_path, epochs=2)
    return tmp_path


def spoil(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 16
    elif how == "cut":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = bytearray()
    file.unlink()
    if how != "missing":
        file.write_bytes(content)


@pytest.mark.product
@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "config.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "missing"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_is_used(name, how, two):
    last = sorted(two.glob("checkpoint-*"))[-1]
    spoil(last / name, how)
    with pytest.warns(UserWarning, match=r"checkpoint-0002' is damaged \(.*checkpoint-0001 before it is used"):
        result = usual(two, True, 2)
    assert [entry["epoch"] for entry in result.history] == [1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        directory.load_checkpoint(two, net())  # the damaged one is replaced


def test_no_whole_checkpoint_is_one_sentence(two):
    for folder in two.glob("checkpoint-*"):
        spoil(folder / "state.pt", "flipped")
    before = sorted(path.name for path in two.iterdir())
    for use in (lambda: usual(two, True, 2), lambda: directory.read_config(two)):
        with pytest.raises(UsageError, match=r"state\.pt is not the file that was .* there is no whole one"):
            use()
    assert sorted(path.name for path in two.iterdir()) == before


def test_files_of_another_run_are_refused(two, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    usual(other, seed=5)
    (two / "checkpoint-0002" / "state.pt").write_bytes((other / "checkpoint-0001" / "state.pt").read_bytes())
    with pytest.warns(UserWarning, match="is not the file that was written"):
        directory.read_config(two)


def test_one_process_trains_in_a_directory(tmp_path):
    first = RunDirectory(tmp_path)
    with first.in_use(), pytest.raises(UsageError, match="another process trains in run_dir"):
        usual(tmp_path)
    usual(tmp_path)
    with pytest.raises(UsageError, match="holds a run already"), first.in_use():
        pass  # it was made for a directory without a run
    assert not (tmp_path / ".lock").exists()


def test_the_best_epoch_is_kept(tmp_path):
    accuracies = iter([0.6, 0.9, 0.7])
    seen = []

    def see(entry, model):
        entry["val_accuracy"] = next(accuracies)
        seen.append(copy.deepcopy(model.state_dict()))

    result = usual(tmp_path, epochs=3, val_loader=batches(32, seed=1), callbacks=[see])
    assert result.metrics["best"] == {"epoch": 2, "metric": "val_accuracy", "value": 0.9}
    model = net(seed=5)
    directory.load_checkpoint(tmp_path, model, best=True)
    assert same(dict(model.state_dict()), dict(seen[1]))
    directory.load_checkpoint(tmp_path, model)
    assert same(dict(model.state_dict()), dict(seen[2]))


def test_no_validation_no_best_epoch(tmp_path):
    assert usual(tmp_path).metrics["best"] is None
    with pytest.raises(UsageError, match="has no best epoch"):
        directory.load_checkpoint(tmp_path, net(), best=True)


class Patience:
    """A callback that ends the training at its third call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, entry, model):
        self.calls += 1
        return self.calls == 3

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def test_callbacks_that_remember_are_saved(tmp_path):
    usual(tmp_path, epochs=2, callbacks=[Patience()])
    assert len(usual(tmp_path, True, 5, callbacks=[Patience()]).history) == 3
    assert len(usual(tmp_path, True, 5, callbacks=[Patience()]).history) == 3  # it has been stopped
    assert len(usual(tmp_path, True, 6, callbacks=[Patience()]).history) == 6


def test_a_callback_that_fails_leaves_others_as_if_they_had_not_seen_the_epoch(tmp_path):
    def stops(resume):
        again = [*[failing] * (not resume)]
        return usual(tmp_path, resume, 9, val_loader=batches(32, seed=1), callbacks=[Patience(), *again])

    with pytest.raises(Stop):
        stops(False)
    assert len(stops(True).history) == 3


class Named(nn.Module):
    """A model whose neurons are those of another library, and that draws dropout."""

    def __init__(self) -> None:
        super().__init__()
        snn = pytest.importorskip("snntorch")
        torch.manual_seed(0)
        self.first, self.fire, self.drop = nn.Linear(8, 16), snn.Leaky(beta=0.8), nn.Dropout(0.2)
        self.second, self.again, self.last = nn.Linear(16, 8), snn.Leaky(beta=0.8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second, outputs = self.fire.init_leaky(), self.again.init_leaky(), []
        for step in x:
            spikes, first = self.fire(self.first(step), first)
            spikes, second = self.again(self.second(self.drop(spikes)), second)
            outputs.append(self.last(spikes))
        return torch.stack(outputs)


def written() -> nn.Module:
    """Neurons that are written out, whose biases move the distance from rest to the threshold."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), WrittenOut(0.8, "subtract", Above.apply), nn.Dropout(0.2), nn.Linear(16, 2))


@pytest.mark.parametrize("cut", [4, 5, 7])
@pytest.mark.parametrize("model", [Named, written])
def test_a_model_that_runs_by_its_own_code_takes_the_same_steps_after_any_step(model, cut, tmp_path):
    def steps(folder, resume=False, **options):
        torch.manual_seed(3)
        result = ulr_snn.train(model(), batches(), 2, run_dir=folder, resume=resume, progress=False, **options)
        return figures(result)[1]

    def cut_off(outputs, targets):
        if next(count) == cut:
            signal.raise_signal(signal.SIGTERM)
        return loss(outputs, targets)

    def loss(outputs, targets):
        return nn.functional.cross_entropy(outputs.sum(0), targets, reduction="none")

    cut_off.__qualname__ = loss.__qualname__
    straight, count = steps(None, loss=loss), iter(range(1000))
    with pytest.raises(Terminated):
        steps(tmp_path, loss=cut_off)
    assert same(steps(tmp_path, True, loss=loss), straight)


# -- kills ---------------------------------------------------------------------------------------------------


def in_process(function, *args, timeout: float = 60.0) -> int | None:
    """Calls a function in a process of its own, and returns its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.runs_to_kill", "numba", "torch._dynamo", "matplotlib.figure"])
    process = context.Process(target=function, args=args)
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
    return process.exitcode


KILLS = int(os.environ.get("ULR_SNN_KILLS", "8"))


@pytest.mark.slow
def test_no_kill_loses_more_than_an_interval(tmp_path):
    straight = figures(train_one(None))
    chance = random.Random(0)
    steps, writes = EPOCHS * (BATCHES + 3), 4 * EPOCHS * (BATCHES // 2 + 1)
    for trial in range(KILLS):
        in_save = trial % 4 == 0
        folder, done = tmp_path / str(trial), tmp_path / f"done-{trial}"
        after = chance.randrange(writes if in_save else steps)
        code = in_process(killed, str(folder), False, after, in_save, str(done))
        assert code == -signal.SIGKILL, (trial, after, code)
        if trial % 4 == 1:  # killed again while it goes on
            in_process(killed, str(folder), True, chance.randrange(6), in_save, str(done))
        assert in_process(killed, str(folder), True, None, False, str(done)) == 0
        assert same(torch.load(done), straight), (trial, after)


@pytest.mark.slow
def test_no_room_on_the_disk_is_one_sentence_and_costs_nothing(tmp_path):
    folder, done = tmp_path / "run", tmp_path / "done"
    train_one(folder)
    for path in sorted(folder.glob("checkpoint-*"))[1:]:
        os.rename(path, tmp_path / path.name)  # so that there is something left to train
    before = {path.name for path in folder.iterdir()}
    assert in_process(without_room, str(folder), str(done)) == 0
    assert "could not be written" in done.read_text() and "is whole; make room" in done.read_text()
    assert {path.name for path in folder.iterdir()} == before


def test_a_folder_that_refuses_a_checkpoint_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("safetensors.torch.save_model", refuse)
    with pytest.raises(SaveError, match=r"could not be written to .* \(Permission denied\); make room"):
        usual(tmp_path)
