"""The run directory: checkpoints that are whole or not there, metrics only of finished runs."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from ulr_snn.errors import SaveError, UsageError
from ulr_snn.runs import directory as runs
from ulr_snn.runs.directory import RunDirectory

pytest.importorskip("matplotlib")

HISTORY = [
    {"epoch": 1, "train_loss": 2.0, "train_accuracy": 0.4, "val_loss": 2.1, "val_accuracy": 0.3},
    {"epoch": 2, "train_loss": 1.0, "train_accuracy": 0.8, "val_loss": 1.2, "val_accuracy": 0.7},
]


class Tied(nn.Module):
    """Two names for one weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


def names(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*")}


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_checkpoint_gives_back_weights_buffers_state_and_config(tmp_path):
    model = Tied()
    model.norm.running_mean += 3
    optimizer = trained(model)
    run = RunDirectory(tmp_path / "run", config={"data": "digits", "seed": 3})
    run.save_checkpoint(model, {"epoch": 1, "optimizer": optimizer.state_dict(), "history": HISTORY[:1]})

    restored = Tied()
    again = RunDirectory(tmp_path / "run", resume=True)
    again.newest.load_weights(restored)
    state = again.newest.state
    assert runs.read_config(tmp_path / "run") == {"data": "digits", "seed": 3}
    again.save_checkpoint(model, {})
    assert runs.read_config(tmp_path / "run") == {"data": "digits", "seed": 3}
    assert state["epoch"] == 1 and state["history"] == HISTORY[:1]
    for name, value in model.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value), name
    assert restored.second.weight is restored.first.weight
    fresh = torch.optim.Adam(restored.parameters())
    fresh.load_state_dict(state["optimizer"])
    moments = [each.state_dict()["state"][0]["exp_avg"] for each in (fresh, optimizer)]
    assert torch.equal(*moments)


def test_the_two_newest_checkpoints_stay(tmp_path):
    run, model = RunDirectory(tmp_path), nn.Linear(2, 2)
    for epoch in range(1, 4):
        run.save_checkpoint(model, {"epoch": epoch})
    folders = {"checkpoint-0002", "checkpoint-0003"}
    parts = ("model.safetensors", "state.pt", "config.json", "manifest.json")
    files = {f"{folder}/{file}" for folder in folders for file in parts}
    assert names(tmp_path) == folders | files
    assert len({(tmp_path / file).stat().st_mode for file in files}) == 1
    assert run.newest.state["epoch"] == 3


def test_new_directory_has_no_checkpoint_also_when_resuming(tmp_path):
    assert RunDirectory(tmp_path / "a" / "b", resume=True).newest is None


@pytest.mark.parametrize("part", ["safetensors.torch.save_model", "torch.save", "os.replace", "json.dumps"])
@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left"), RuntimeError("write failed"), SafetensorError("IO"), KeyboardInterrupt()]
)
def test_failed_save_leaves_the_previous_checkpoint_and_nothing_else(tmp_path, monkeypatch, part, failure):
    run, model = RunDirectory(tmp_path), nn.Linear(2, 2)
    run.save_checkpoint(model, {"epoch": 1})
    before, weight = names(tmp_path), model.weight.detach().clone()

    def fail(*_args, **_kwargs):
        for file in tmp_path.glob(".tmp-*"):  # something half-written, as a full disk leaves it
            (file / "state.pt").write_bytes(b"PK")
        raise failure

    nn.init.zeros_(model.weight)
    error = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else SaveError
    if part == "safetensors.torch.save_model" and isinstance(failure, RuntimeError):
        error = UsageError  # of weights that it cannot hold
    with monkeypatch.context() as patch, pytest.raises(error) as raised:
        patch.setattr(part, fail)
        run.save_checkpoint(model, {"epoch": 2})
    assert error is not SaveError or "checkpoint-0001 before it is whole; make room" in str(raised.value)
    assert names(tmp_path) == before
    assert runs.load_checkpoint(tmp_path, model)["epoch"] == 1
    assert torch.equal(model.weight, weight)


def test_leftovers_of_a_kill_are_tidied_up(tmp_path):
    run, model = RunDirectory(tmp_path), nn.Linear(2, 2)
    run.save_checkpoint(model, {"epoch": 1})
    (tmp_path / ".tmp-checkpoint-0002").mkdir()
    (tmp_path / ".tmp-checkpoint-0002" / "state.pt").write_bytes(b"PK")
    (tmp_path / ".tmp-metrics.json").write_text("{")
    with RunDirectory(tmp_path, resume=True).in_use() as again:
        assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-0001", ".lock"}
        assert again.newest.state["epoch"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-0001"}


def test_state_that_could_not_be_read_back_is_refused_when_it_is_saved(tmp_path):
    run = RunDirectory(tmp_path)
    with pytest.raises(UsageError, match="plain Python values"):
        run.save_checkpoint(nn.Linear(1, 1), {"scheduler": {"schedule": print, "path": Path("x")}})
    assert names(tmp_path) == set()


def test_finish_writes_metrics_and_curves(tmp_path):
    run = RunDirectory(tmp_path)
    metrics = {"test_accuracy": torch.tensor(0.5), "epochs": 2, "versions": runs.versions(), "loss": math.nan}
    run.finish(metrics, HISTORY)
    assert names(tmp_path) == {"metrics.json", "curves.png"}
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written == {**metrics, "test_accuracy": 0.5, "loss": None, "history": HISTORY}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_failed_finish_leaves_no_metrics_and_no_temporary_file(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)

    def fail(_history, file):
        file.write_bytes(b"half a picture")
        raise OSError("disk full")

    monkeypatch.setattr("ulr_snn.runs.plots.save_curves", fail)
    with pytest.raises(SaveError, match="disk full"):
        run.finish({}, HISTORY)
    assert names(tmp_path) == set()


def test_figures_of_a_finished_run_go_when_it_is_resumed_and_saves_anew(tmp_path):
    run, model = RunDirectory(tmp_path), nn.Linear(2, 2)
    run.save_checkpoint(model, {"epoch": 2})
    run.finish({"epochs": 2}, HISTORY)
    again = RunDirectory(tmp_path, resume=True)
    assert (tmp_path / "metrics.json").exists()
    again.save_checkpoint(model, {"epoch": 3})
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-0001", "checkpoint-0002"}


def test_figures_of_a_finished_run_stay_if_no_new_checkpoint_can_be_written(tmp_path, monkeypatch):
    run, model = RunDirectory(tmp_path), nn.Linear(2, 2)
    run.save_checkpoint(model, {"epoch": 2})
    run.finish({"epochs": 2}, HISTORY)
    before = names(tmp_path)

    def refuse(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", refuse)
    with pytest.raises(SaveError, match="No space left on device"):
        RunDirectory(tmp_path, resume=True).save_checkpoint(model, {"epoch": 3})
    assert names(tmp_path) == before


def test_directory_of_another_run_is_refused(tmp_path):
    RunDirectory(tmp_path).save_checkpoint(nn.Linear(1, 1), {})
    with pytest.raises(UsageError, match="holds a run already"):
        RunDirectory(tmp_path)


def test_files_of_others_are_no_obstacle(tmp_path):
    (tmp_path / "log.txt").write_text("started")
    RunDirectory(tmp_path).finish({}, HISTORY)
    assert (tmp_path / "log.txt").read_text() == "started"


def test_wrong_paths_are_usage_errors(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UsageError, match="is a file"):
        RunDirectory(file)
    with pytest.raises(UsageError, match="cannot be made"):
        RunDirectory(file / "below")
    with pytest.raises(UsageError, match="holds no checkpoint"):
        runs.read_config(tmp_path)
    with pytest.raises(UsageError, match="holds no checkpoint"):
        runs.load_checkpoint(tmp_path / "nowhere", nn.Linear(1, 1))


def test_checkpoint_of_another_model_is_refused(tmp_path):
    RunDirectory(tmp_path).save_checkpoint(nn.Linear(2, 2), {})
    with pytest.raises(UsageError, match="do not fit"):
        runs.load_checkpoint(tmp_path, nn.Linear(3, 2))


def test_missing_library_is_told_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install safetensors matplotlib"):
        RunDirectory(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_peak_memory_is_in_bytes():
    peak = runs.peak_memory_bytes(torch.device("cpu"))
    assert peak is None or 10 * 2**20 < peak < 2**42  # torch alone takes more than 10 MiB
