"""Checkpoints: folders that are whole or not there, and whose files are checked before they are read.

    checkpoint-0007/
      model.safetensors  weights and buffers
      state.pt           all else that a resumed run needs, as tensors and plain Python values
      config.json        what the caller records
      manifest.json      size and SHA-256 of the other files

A checkpoint is written under a temporary name and renamed when it is complete. So a run killed at any moment leaves
the checkpoints before or the new one as well, never parts of it. Nothing that a file holds is executed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ulr_snn.errors import SaveError, UsageError, lost_process, reason
from ulr_snn.kernels.ranks import unwrapped

_NAME = re.compile(r"checkpoint-(\d{4,})")
WEIGHTS, STATE, CONFIG, MANIFEST = "model.safetensors", "state.pt", "config.json", "manifest.json"
TEMPORARY = ".tmp-"
KEPT = 2  # newest checkpoints; the older one serves if the newest is damaged


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk."""

    folder: Path

    @property
    def number(self) -> int:
        return int(self.folder.name.removeprefix("checkpoint-"))

    @property
    def damage(self) -> str | None:
        """What is wrong with the files; None if nothing is."""
        try:
            entries = json.loads((self.folder / MANIFEST).read_text())["files"]
            if set(entries) != {WEIGHTS, STATE, CONFIG}:
                return f"{MANIFEST} lists other files"
            for name, entry in entries.items():
                if not (self.folder / name).is_file():
                    return f"{name} is missing"
                if _entry(self.folder / name) != entry:
                    return f"{name} is not the file that was written"
        except FileNotFoundError:
            return f"{MANIFEST} is missing: it was copied in part, or is of an earlier version"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{MANIFEST} cannot be read, {error}"
        return None

    @cached_property
    def state(self) -> dict[str, Any]:
        """The state that was saved with the weights, on the CPU."""
        return torch.load(self.folder / STATE, map_location="cpu", weights_only=True)

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / CONFIG).read_text())

    def load_weights(self, model: nn.Module) -> None:
        """Loads the weights. Raises UsageError if they are of another model."""
        load_weights(self.folder / WEIGHTS, model)


def load_weights(file: Path, model: nn.Module) -> None:
    """Loads weights and buffers. Raises UsageError for a damaged file, and weights of another model."""
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    try:
        load_model(unwrapped(model), str(file))
    except RuntimeError as error:
        raise UsageError(f"the weights in '{file}' do not fit this model: {' '.join(str(error).split())}") from error
    except (SafetensorError, OSError) as error:
        raise UsageError(f"the weights in '{file}' cannot be read, {error}; copy the file again") from error


def checkpoints(path: str | os.PathLike[str]) -> list[Checkpoint]:
    """Returns the checkpoints of a run directory, oldest first."""
    if not Path(path).is_dir():
        return []
    found = [Checkpoint(folder) for folder in Path(path).iterdir() if _NAME.fullmatch(folder.name)]
    return sorted(found, key=lambda checkpoint: checkpoint.number)


def newest(path: str | os.PathLike[str]) -> Checkpoint:
    """Returns the newest checkpoint that is not damaged, with a warning for each that is.

    Raises UsageError if there is none.
    """
    found = checkpoints(path)
    if not found:
        raise UsageError(f"'{os.fspath(path)}' holds no checkpoint: name the run_dir of a training run")
    damages: list[str] = []
    for checkpoint in reversed(found):
        damage = checkpoint.damage
        if damage is None:
            for text in damages:
                warnings.warn(f"{text}; {checkpoint.folder.name} before it is used", stacklevel=2)
            return checkpoint
        damages.append(f"checkpoint '{checkpoint.folder}' is damaged ({damage})")
    raise UsageError(f"{damages[0]}, and there is no whole one before it; copy it again, or start anew")


def save(path: Path, model: nn.Module, state: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Writes a checkpoint, and removes those before the one before it. Raises SaveError if the disk refuses it."""
    before = checkpoints(path)
    number = before[-1].number + 1 if before else 1

    def write(folder: Path) -> None:
        folder.mkdir()
        save_weights(model, folder / WEIGHTS)
        _save_state(dict(state), folder / STATE)
        (folder / CONFIG).write_text(to_json(config))
        entries = {name: _entry(folder / name) for name in (WEIGHTS, STATE, CONFIG)}
        (folder / MANIFEST).write_text(to_json({"format": 1, "files": entries}))
        # safetensors keeps its file to its owner; the umask decides about the others
        shutil.copymode(folder / CONFIG, folder / WEIGHTS)
        for file in folder.iterdir():
            _flush(file)

    write_atomically(path / f"checkpoint-{number:04d}", write, left(before))
    for checkpoint in before[: 1 - KEPT]:
        shutil.rmtree(checkpoint.folder)


def try_out(path: Path, model: nn.Module) -> None:
    """Writes the weights into a run directory once, and removes them.

    Raises UsageError for weights that safetensors cannot hold, and SaveError if the disk refuses them.
    """
    target = path / "try.safetensors"
    write_atomically(target, lambda file: save_weights(model, file), left(checkpoints(path)))
    remove(target)


def left(before: list[Checkpoint]) -> str:
    """Returns what an error says of the checkpoints that are there."""
    return f"; {before[-1].folder.name} before it is whole" if before else ""


def save_weights(model: nn.Module, file: Path) -> None:
    """Writes the weights and buffers of a model."""
    from safetensors.torch import save_model

    try:
        save_model(model, str(file))  # unlike save_file, it knows tied weights
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"the weights of {type(model).__name__} cannot be saved ({reason(error)}); keep only tensors in its "
            "state_dict, each with memory of its own"
        ) from error


def write_atomically(target: Path, write: Callable[[Path], Any], intact: str = "") -> None:
    """Calls `write` with a temporary path, and renames the complete file or directory to `target`.

    Raises SaveError if the disk refuses it. intact: what the error says is left.
    """
    temporary = target.with_name(TEMPORARY + target.name)
    try:
        with _refusals(target, intact):
            write(temporary)
            if temporary.is_file():
                _flush(temporary)
            os.replace(temporary, target)
    finally:
        remove(temporary)


@contextmanager
def _refusals(target: Path, intact: str) -> Iterator[None]:
    """Makes errors of the disk, which libraries raise in their own ways, a SaveError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if lost_process(error):
            raise
        raise SaveError(
            f"{target.name} could not be written to '{target.parent}' ({reason(error)}){intact}; make room or give "
            "write access, and resume the run"
        ) from error


def _save_state(state: dict[str, Any], file: Path) -> None:
    torch.save(state, file)
    try:  # finds a state that cannot be read back now, not when the run is resumed
        torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UsageError(
            "the state of this run cannot be saved for resuming: optimizer, scheduler, estimator and callbacks must "
            "keep only tensors and plain Python values in their state_dict, as callbacks in the history"
        ) from error


def _entry(file: Path) -> dict[str, Any]:
    """Returns the entry of a file in the manifest."""
    with open(file, "rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def _flush(file: Path) -> None:
    """Flushes a file to the disk, so that a power cut cannot leave it without its content."""
    descriptor = os.open(file, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file or a folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def to_json(value: Any) -> str:
    """Returns a value as JSON, with null for NaN and infinity."""
    return json.dumps(_finite(in_numbers(value)), indent=2, allow_nan=False) + "\n"


def in_numbers(value: Any) -> Any:
    """Returns a value with Python's numbers, or lists of them, in place of tensors and of NumPy's numbers."""
    if isinstance(value, Mapping):
        return {str(key): in_numbers(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [in_numbers(item) for item in value]
    return value.tolist() if isinstance(value, Tensor | numpy.ndarray | numpy.generic) else value


def _finite(value: Any) -> Any:
    """Returns plain values with None for NaN and infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
