"""The run directory, which holds checkpoints of a run, and its figures after the end.

run_dir/
  .lock                held by the process that trains
  checkpoint-0006/     the two newest ones are kept, see checkpoints.py
  checkpoint-0007/
  best.safetensors     weights of the epoch with the best validation, if there is any
  curves.png           written at the end of the run
  metrics.json         written last; it exists only in a finished run
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from ulr_snn.errors import UsageError
from ulr_snn.runs.checkpoints import (
    TEMPORARY,
    Checkpoint,
    checkpoints,
    load_weights,
    newest,
    remove,
    save,
    save_weights,
    to_json,
    write_atomically,
)

BEST = "best.safetensors"


class RunDirectory:
    """The directory of one run. Raises UsageError for a file, or a run without `resume`.

    resume: continue the run in the directory, if there is one. config: recorded with every checkpoint, for
    `read_config`; None keeps the config of a resumed run.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, resume: bool = False, config: Mapping[str, Any] | None = None
    ) -> None:
        _require("safetensors", "matplotlib")
        self.path, self.resume, self.config = Path(path), resume, config
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"run_dir '{self.path}' is a file: name a directory")
        self._check_new()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"run_dir '{self.path}' cannot be made: {error.strerror}") from error

    def _check_new(self) -> None:
        if not self.resume and (checkpoints(self.path) or (self.path / "metrics.json").exists()):
            raise UsageError(f"run_dir '{self.path}' holds a run already: resume it, or name another")

    @contextmanager
    def in_use(self) -> Iterator[Self]:
        """Keeps other processes from training in the directory. Raises UsageError if one does."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UsageError(f"another process trains in run_dir '{self.path}': wait for it, or name another") from None
        except OSError as error:
            raise UsageError(f"run_dir '{self.path}' cannot be written: {error.strerror}") from error
        except NotImplementedError:
            warnings.warn(f"run_dir '{self.path}' cannot be locked: keep others from training there", stacklevel=2)
        try:
            self._check_new()  # another process may have trained in it since
            for path in self.path.glob(f"{TEMPORARY}*"):  # which a killed run could not remove
                remove(path)
            yield self
        finally:
            remove(self.path / ".lock")  # before the release, so that no other process holds this file
            lock.release()

    def save_checkpoint(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Saves `model` and `state` (tensors and plain Python values). Raises SaveError if the disk refuses it."""
        if self.config is None:
            self.config = read_config(self.path) if checkpoints(self.path) else {}
        save(self.path, model, state, self.config)
        # A finished run was resumed for more epochs: its figures are no longer those of the newest checkpoint.
        (self.path / "metrics.json").unlink(missing_ok=True)
        (self.path / "curves.png").unlink(missing_ok=True)

    def save_best(self, model: nn.Module) -> None:
        """Replaces the weights of the best epoch."""
        write_atomically(self.path / BEST, lambda file: save_weights(model, file))

    @property
    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; None if there is none at all. Raises UsageError if all are damaged."""
        return newest(self.path) if checkpoints(self.path) else None

    def finish(self, metrics: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        """Draws curves.png, and writes metrics.json with the history."""
        from ulr_snn.runs.plots import save_curves

        text = to_json({**metrics, "history": list(history)})
        write_atomically(self.path / "curves.png", lambda file: save_curves(history, file))
        write_atomically(self.path / "metrics.json", lambda file: file.write_text(text))


def load_checkpoint(path: str | os.PathLike[str], model: nn.Module, best: bool = False) -> dict[str, Any]:
    """Loads a run's newest weights into `model`, or those of its best epoch. Returns the newest state, on the CPU."""
    checkpoint = newest(path)
    if best and not (Path(path) / BEST).exists():
        raise UsageError(f"the run in '{os.fspath(path)}' has no best epoch: it had no validation data")
    load_weights(Path(path) / BEST, model) if best else checkpoint.load_weights(model)
    return checkpoint.state


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the config of the run in `path`, from its newest checkpoint."""
    return newest(path).config


def versions() -> dict[str, str]:
    """Returns the versions on which a result depends, for metrics.json."""
    import numpy

    return {
        "ulr_snn": importlib.metadata.version("ulr-snn"),
        "torch": str(torch.__version__),  # its own class would not load again
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
