"""Callbacks of `train`: early stopping, TensorBoard and CSV records, also of runs that go on."""

import csv
import gc
import math
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from ulr_snn import LIF, UsageError, compare, train
from ulr_snn.runs.callbacks import CSVLog, EarlyStopping, TensorBoard

BATCHES = [(torch.ones(4, 8, 3), torch.zeros(8, dtype=torch.long))] * 2
VALUES = [(torch.ones(4, 8, 3), torch.zeros(8, 2))] * 2
MODEL = nn.Identity()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), LIF(), nn.Linear(6, 2))


def quiet(batches, epochs, *callbacks, **options):
    return train(net(), batches, epochs, callbacks=callbacks, device="cpu", progress=False, **options)


def entries(values, metric="val_loss", start=1):
    return [
        {"epoch": epoch, "train_loss": 0.5, "train_accuracy": None, metric: value, "lr": 0.01}
        for epoch, value in enumerate(values, start)
    ]


def epochs_until_stop(callback, values, metric="val_loss", start=1) -> int | None:
    for entry in entries(values, metric, start):
        if callback(entry, MODEL):
            return entry["epoch"]
    return None


# -- early stopping


@pytest.mark.parametrize(
    "options, values, stop",
    [
        ({"patience": 2}, [3.0, 2.0, 2.0, 1.0, 1.5, 1.2, 0.5], 6),
        ({"patience": 1}, [3.0, 2.0, 1.0], None),
        ({"patience": 2, "min_delta": 0.5}, [3.0, 2.6, 2.5, 2.4], 3),  # an improvement by 0.5 is not more than 0.5
        ({"patience": 2}, [math.nan, 1.0, math.nan, math.nan], 4),
        ({"patience": 2}, [math.nan, math.nan, 1.0], 2),
        ({"patience": 1}, [-math.inf], 1),
        ({"patience": 2, "metric": "val_accuracy"}, [0.1, 0.2, 0.2, 0.1, 0.9], 4),
        ({"patience": 1, "metric": "val_r2", "mode": "max"}, [0.1, 0.2, 0.1], 3),
        ({"patience": 1, "metric": "val_r2", "mode": "min"}, [0.1, 0.2], 2),
        ({"patience": 1, "metric": "val_loss", "mode": "max"}, [1.0, 2.0, 1.5], 3),
    ],
)
def test_early_stopping_stops_after_epochs_without_improvement(options, values, stop):
    assert epochs_until_stop(EarlyStopping(**options), values, options.get("metric", "val_loss")) == stop


@pytest.mark.parametrize("cut", range(1, 6))
def test_early_stopping_goes_on_where_it_was(cut):
    values = [3.0, 2.0, 2.5, 1.0, 1.5, 1.2, 1.1]
    first, second = EarlyStopping(patience=3), EarlyStopping(patience=3)
    assert epochs_until_stop(first, values[:cut]) is None
    second.load_state_dict(first.state_dict())
    assert epochs_until_stop(second, values[cut:], start=cut + 1) == 7


def test_early_stopping_begins_anew_with_a_training():
    stopping = EarlyStopping("train_loss", patience=2, mode="max")  # the loss falls
    assert len(quiet(BATCHES, 9, stopping).history) == len(quiet(BATCHES, 9, stopping).history) == 3
    options = {"lr": [0.01, 0.02], "callbacks": [stopping], "device": "cpu", "progress": False}
    found = compare(net(), BATCHES, BATCHES, ["ulr"], 9, **options)
    assert [len(row["history"]) for row in found.rows] == [3, 3]


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: EarlyStopping(patience=0), "patience=0"),
        (lambda: EarlyStopping(min_delta=-1), "min_delta=-1"),
        (lambda: EarlyStopping(mode="up"), "mode='up'"),
        (lambda: EarlyStopping(metric=3), "metric=3"),
        (lambda: EarlyStopping(metric="val_r2"), "mode='min' or mode='max'"),
        (lambda: TensorBoard(""), "log_dir=''"),
        (lambda: CSVLog(3), "path=3"),
    ],
)
def test_wrong_arguments_are_told(make, told):
    with pytest.raises(UsageError, match=f"(?s){told}"):
        make()


def test_a_metric_that_is_not_there_is_told_with_those_that_are():
    stopping = EarlyStopping()
    with pytest.raises(UsageError, match=r"metric='val_loss'.*give one of train_loss, train_accuracy, seconds, .*lr$"):
        quiet(BATCHES, 2, stopping)
    with pytest.raises(UsageError, match=r"metric='train_accuracy'.*train_loss, seconds"):
        quiet(VALUES, 2, EarlyStopping("train_accuracy"), loss="mse")


# -- TensorBoard


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """Reads what TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


@pytest.fixture
def tensorboard():
    pytest.importorskip("tensorboard")


@pytest.mark.parametrize("batches, loss", [(BATCHES, "ce_count"), (VALUES, "mse")])
def test_tensorboard_shows_the_history(tmp_path, tensorboard, batches, loss):
    board = TensorBoard(tmp_path / "new" / "board")
    result = quiet(batches, 3, board, loss=loss, val_loader=batches)
    found = scalars(tmp_path / "new" / "board")
    names = {"loss/train", "loss/val", "lr", "seconds", "forward_passes"}
    assert found.keys() == (names | {"accuracy/train", "accuracy/val"} if loss == "ce_count" else names)
    for tag, name in (("loss/train", "train_loss"), ("loss/val", "val_loss"), ("lr", "lr")):
        assert [step for step, _ in found[tag]] == [1, 2, 3]
        assert [value for _, value in found[tag]] == pytest.approx([entry[name] for entry in result.history])


def test_tensorboard_shows_repeated_epochs_once(tmp_path, tensorboard):
    first, second = TensorBoard(tmp_path), TensorBoard(tmp_path)
    for entry in entries([4.0, 3.0, 2.0]):
        first(entry, MODEL)
    for entry in entries([1.5, 1.0], start=3):  # a resumed run, from the checkpoint of epoch 2
        second(entry, MODEL)
    assert scalars(tmp_path)["loss/val"] == [(1, 4.0), (2, 3.0), (3, 1.5), (4, 1.0)]
    second.close()
    second(entries([0.5], start=5)[0], MODEL)
    assert scalars(tmp_path)["loss/val"][-1] == (5, 0.5)
    second(entries([9.0])[0], MODEL)  # a new training
    assert scalars(tmp_path)["loss/val"] == [(1, 9.0)]
    first.close()
    second.close()


def test_tensorboard_ends_its_threads(tmp_path, tensorboard):
    before = threading.active_count()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for close in (True, False):
            board = TensorBoard(tmp_path)
            board(entries([1.0])[0], MODEL)
            assert threading.active_count() > before
            if close:
                board.close()
                board.close()
            del board
            gc.collect()
            assert threading.active_count() == before


def test_a_missing_tensorboard_is_told_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr("ulr_snn.runs.callbacks.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install tensorboard"):
        TensorBoard(tmp_path)


def test_a_folder_that_is_a_file_is_told(tmp_path, tensorboard):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"log_dir=.*is no folder"):
        TensorBoard(tmp_path / "file")
    with pytest.raises(UsageError, match=r"path=.*is no folder"):
        CSVLog(tmp_path / "file" / "log.csv")
    with pytest.raises(UsageError, match="cannot be read"):
        CSVLog(tmp_path)


# -- CSV


def table(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("batches, loss", [(BATCHES, "ce_count"), (VALUES, "mse")])
def test_csv_log_holds_the_history(tmp_path, batches, loss):
    path = tmp_path / "new" / "log.csv"
    pairs = {"pair": lambda outputs, targets: 1.0}
    result = quiet(batches, 3, CSVLog(path), loss=loss, metrics=pairs)
    rows = table(path)
    assert list(rows[0]) == list(result.history[0])
    for row, entry in zip(rows, result.history, strict=True):
        assert {name: float(text) if text else None for name, text in row.items()} == entry
    assert [path.name for path in path.parent.iterdir()] == ["log.csv"]


def test_csv_log_goes_on_without_doubled_epochs(tmp_path):
    path = tmp_path / "log.csv"
    for entry in entries([4.0, 3.0, 2.0]):
        CSVLog(path)(entry, MODEL)
    log = CSVLog(path)
    for entry in entries([1.5, 1.0], start=3):  # the columns are those of the first epoch
        log(entry | {"val_other": 7.0, "curve": [1, 2]}, MODEL)
    rows = table(path)
    assert [(row["epoch"], row["val_loss"]) for row in rows] == [
        ("1", "4.0"), ("2", "3.0"), ("3", "1.5"), ("4", "1.0"),
    ]  # fmt: skip
    assert "val_other" not in rows[0] and rows[0]["train_accuracy"] == ""


def test_csv_log_keeps_the_file_of_an_earlier_training(tmp_path):
    path = tmp_path / "log.csv"
    for value in (1.0, 2.0, 3.0):
        CSVLog(path)(entries([value])[0], MODEL)
    found = {file.name: [row["val_loss"] for row in table(file)] for file in tmp_path.iterdir()}
    assert found == {"log.csv": ["3.0"], "log.csv.1": ["1.0"], "log.csv.2": ["2.0"]}


def test_csv_log_is_whole_after_a_kill(tmp_path, monkeypatch):
    path = tmp_path / "log.csv"
    CSVLog(path)(entries([1.0])[0], MODEL)
    before = path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(f"os.{name}", killed)
            CSVLog(path)(entries([2.0], start=2)[0], MODEL)
        assert path.read_bytes() == before
    CSVLog(path)(entries([2.0], start=2)[0], MODEL)
    assert [row["epoch"] for row in table(path)] == ["1", "2"]


@pytest.mark.parametrize("content", [b"name,score\nme,3\n", b"epoch,loss\nlast,0.1\n", b"\x00\xff\xfe", b"epoch\n0\n"])
def test_csv_log_leaves_other_files_alone(tmp_path, content):
    path = tmp_path / "mine.csv"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="holds something else"):
        CSVLog(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("answer", [True, np.bool_(True), torch.tensor(True)])
def test_a_callback_ends_the_training_by_any_kind_of_true(answer):
    assert len(quiet(BATCHES, 3, lambda entry, model: answer).history) == 1
    assert len(quiet(BATCHES, 3, lambda entry, model: 1).history) == 3  # as of a write to a file


def test_what_callbacks_put_into_the_history_is_saved(tmp_path):
    def score(entry, model):
        entry |= {"f1": np.float64(0.5), "loss": torch.tensor(2.0), "each": np.ones(2), "words": ("a", None)}

    history = quiet(BATCHES, 2, score, run_dir=tmp_path).history
    assert history[1] | {"f1": 0.5, "loss": 2.0, "each": [1.0, 1.0], "words": ["a", None]} == history[1]
    assert type(history[0]["f1"]) is float
    again = quiet(BATCHES, 3, score, run_dir=tmp_path, resume=True).history
    assert again[:2] == history
    with pytest.raises(UsageError, match="callbacks in the history"):
        quiet(BATCHES, 1, lambda entry, model: entry.update(model=model), run_dir=tmp_path / "other")
