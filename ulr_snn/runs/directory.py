"""The run directory, which holds checkpoints of a run, and its figures after the end.

    run_dir/
      checkpoint-0007/     only the newest one is kept
        model.safetensors  weights and buffers
        state.pt           optimizer, scheduler, estimator, counters, history
        config.json        what the run was started with
      curves.png           written at the end of the run
      metrics.json         written last; it exists only in a finished run

A checkpoint is written under a temporary name and renamed when it is complete. So a run killed at any moment leaves the
previous checkpoint or the new one, never parts of both.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ulr_snn.errors import UsageError

_CHECKPOINT = re.compile(r"checkpoint-(\d{4,})")
_TEMPORARY = ".tmp-"


class RunDirectory:
    """The directory of one run. Raises UsageError for a file, or a run without `resume`.

    resume: continue the run in the directory, if there is one. config: recorded with every checkpoint, for
    `read_config`; None keeps the config of a resumed run.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, resume: bool = False, config: Mapping[str, Any] | None = None
    ) -> None:
        _require("safetensors", "matplotlib")
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"run_dir '{self.path}' is a file: name a directory")
        if not resume and (_checkpoints(self.path) or (self.path / "metrics.json").exists()):
            raise UsageError(f"run_dir '{self.path}' holds a run already: resume it, or name another")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"run_dir '{self.path}' cannot be made: {error.strerror}") from error
        self._remove_leftovers()
        if config is None:
            config = read_config(self.path) if _checkpoints(self.path) else {}
        self.config = dict(config)

    def save_checkpoint(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Replaces the checkpoint by one of `model` and `state` (tensors and plain Python values)."""
        from safetensors.torch import save_model

        previous = _checkpoints(self.path)
        # A finished run was resumed for more epochs: its figures are no longer those of the newest checkpoint.
        (self.path / "metrics.json").unlink(missing_ok=True)
        (self.path / "curves.png").unlink(missing_ok=True)

        def write(folder: Path) -> None:
            folder.mkdir()
            save_model(model, str(folder / "model.safetensors"))  # unlike save_file, it knows tied weights
            _save_state(dict(state), folder / "state.pt")
            (folder / "config.json").write_text(_to_json(self.config))
            # safetensors keeps its file to its owner; the umask decides about the others
            shutil.copymode(folder / "config.json", folder / "model.safetensors")
            for file in folder.iterdir():
                _flush(file)

        number = _number(previous[-1]) + 1 if previous else 1
        _write_atomically(self.path / f"checkpoint-{number:04d}", write)
        for folder in previous:
            shutil.rmtree(folder)

    def load_checkpoint(self, model: nn.Module) -> dict[str, Any] | None:
        """Loads the newest checkpoint into `model` and returns its state, on the CPU; None without one."""
        return load_checkpoint(self.path, model) if _checkpoints(self.path) else None

    def finish(self, metrics: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """Draws curves.png, and writes metrics.json with the history."""
        from ulr_snn.runs.plots import save_curves

        text = _to_json({**metrics, "history": list(history)})
        _write_atomically(self.path / "curves.png", lambda file: save_curves(history, file))
        _write_atomically(self.path / "metrics.json", lambda file: file.write_text(text))

    def _remove_leftovers(self) -> None:
        """Removes files that a killed run could not remove."""
        for path in self.path.glob(f"{_TEMPORARY}*"):
            _remove(path)
        for folder in _checkpoints(self.path)[:-1]:
            shutil.rmtree(folder)


def load_checkpoint(path: str | os.PathLike[str], model: nn.Module) -> dict[str, Any]:
    """Loads a run's newest checkpoint into `model` and returns the state saved with it, on the CPU."""
    from safetensors.torch import load_model

    folder = _newest(path)
    try:
        load_model(model, str(folder / "model.safetensors"))
    except RuntimeError as error:
        raise UsageError(f"the weights in '{folder}' do not fit this model: {error}") from error
    return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the config of the run in `path`, from its newest checkpoint."""
    return json.loads((_newest(path) / "config.json").read_text())


def versions() -> dict[str, str]:
    """Returns the versions on which a result depends, for metrics.json."""
    import numpy

    return {
        "ulr_snn": importlib.metadata.version("ulr-snn"),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def peak_memory_bytes(device: torch.device) -> int | None:
    """Returns the peak memory in bytes: allocated on a CUDA device, else resident in this process (None on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB, macOS in bytes


def _require(*libraries: str) -> None:
    """Raises UsageError before the first step if libraries are missing that only the end of a run needs."""
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"a run_dir needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def _checkpoints(path: Path) -> list[Path]:
    """Returns the complete checkpoints in a directory, oldest first."""
    if not path.is_dir():
        return []
    return sorted((folder for folder in path.iterdir() if _CHECKPOINT.fullmatch(folder.name)), key=_number)


def _newest(path: str | os.PathLike[str]) -> Path:
    checkpoints = _checkpoints(Path(path))
    if not checkpoints:
        raise UsageError(f"'{os.fspath(path)}' holds no checkpoint: name the run_dir of a training run")
    return checkpoints[-1]


def _write_atomically(target: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary path, and renames the complete file or directory to `target`."""
    temporary = target.with_name(_TEMPORARY + target.name)
    try:
        write(temporary)
        if temporary.is_file():
            _flush(temporary)
        os.replace(temporary, target)
    finally:
        _remove(temporary)


def _save_state(state: dict[str, Any], file: Path) -> None:
    torch.save(state, file)
    try:  # finds a state that cannot be read back now, not when the run is resumed
        torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            "the state of this run cannot be saved for resuming: optimizer, scheduler and estimator must "
            f"keep only tensors and plain Python values in their state_dict ({reason})"
        ) from error


def _flush(file: Path) -> None:
    """Flushes a file to the disk, so that a power cut cannot leave it without its content."""
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _to_json(value: Any) -> str:
    return json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Converts a value for JSON: 0-d tensors and NumPy numbers to Python numbers, NaN and infinity to None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
