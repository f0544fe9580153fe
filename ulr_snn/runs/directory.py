"""The run directory: the checkpoints of a run while it lasts, its figures once it is finished.

    run_dir/
      checkpoint-0007/     only the newest one is kept
        model.safetensors  weights and buffers
        state.pt           optimizer, scheduler, estimator, counters, history
        config.json        what the run was started with
      curves.png           written at the end, and
      metrics.json         last of all: where it exists, the run is finished

A checkpoint is a directory because its files belong together: it is written under a temporary name and
renamed when it is complete, so that a run killed at any moment leaves the previous checkpoint or the new
one, never parts of both.
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
    """Where one run keeps its checkpoints, metrics and curves.

    `config` is recorded with every checkpoint, for `read_config`. Without `resume` the directory must not
    hold a run yet; with it, a run that is there goes on (keeping its config where none is given), and where
    there is none it starts.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, resume: bool = False, config: Mapping[str, Any] | None = None
    ) -> None:
        _require("safetensors", "matplotlib")
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"run_dir '{self.path}' is a file: name a directory.")
        if not resume and _holds_run(self.path):
            raise UsageError(f"run_dir '{self.path}' holds a run already: resume it, or name another.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"run_dir '{self.path}' cannot be made: {error.strerror}.") from error
        self._remove_leftovers()
        if config is None:
            config = read_config(self.path) if _checkpoints(self.path) else {}
        self.config = dict(config)

    def save_checkpoint(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Replaces the checkpoint by one of `model` and `state` (tensors and plain Python values)."""
        from safetensors.torch import save_model

        previous = _checkpoints(self.path)
        # They describe an older checkpoint from now on (a finished run was resumed for more epochs).
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
        """Draws curves.png and writes metrics.json with the history in it."""
        from ulr_snn.runs.plots import save_curves

        text = _to_json({**metrics, "history": list(history)})
        _write_atomically(self.path / "curves.png", lambda file: save_curves(history, file))
        _write_atomically(self.path / "metrics.json", lambda file: file.write_text(text))

    def _remove_leftovers(self) -> None:
        """Clears away what a killed run could not clear away itself."""
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
    """What the run in `path` was started with, as its newest checkpoint records it."""
    return json.loads((_newest(path) / "config.json").read_text())


def versions() -> dict[str, str]:
    """The versions that a result depends on, for metrics.json."""
    import numpy

    return {
        "ulr_snn": importlib.metadata.version("ulr-snn"),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory in use so far: allocated on a CUDA device, else resident in this process.

    None where the system does not tell (Windows). On CUDA, `torch.cuda.reset_peak_memory_stats` starts anew.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB, macOS in bytes


def _require(*libraries: str) -> None:
    """Says before the first step what would otherwise fail after the last one."""
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"a run_dir needs {' and '.join(missing)}: pip install {' '.join(missing)}.")


def _number(folder: Path) -> int:
    return int(_CHECKPOINT.fullmatch(folder.name).group(1))


def _checkpoints(path: Path) -> list[Path]:
    """The complete checkpoints in a directory, oldest first."""
    if not path.is_dir():
        return []
    return sorted((folder for folder in path.iterdir() if _CHECKPOINT.fullmatch(folder.name)), key=_number)


def _newest(path: str | os.PathLike[str]) -> Path:
    checkpoints = _checkpoints(Path(path))
    if not checkpoints:
        raise UsageError(f"'{os.fspath(path)}' holds no checkpoint: name the run_dir of a training run.")
    return checkpoints[-1]


def _holds_run(path: Path) -> bool:
    return bool(_checkpoints(path)) or (path / "metrics.json").exists()


def _write_atomically(target: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` make a file or directory under a temporary name, and renames it when it is complete."""
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
    try:  # A state that cannot be read back is found now, not when the run is resumed.
        torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UsageError(
            "the state of this run cannot be saved for resuming: optimizer, scheduler and estimator must "
            f"keep only tensors and plain Python values in their state_dict ({_first_line(error)})."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _flush(file: Path) -> None:
    """Has the system write a file to the disk, so that a power cut cannot leave it without its content."""
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
    """The value as JSON knows it: 0-d tensors and NumPy numbers as Python's, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
