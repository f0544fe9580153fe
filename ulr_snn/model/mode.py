"""Device and mode of a model, and batches of a loader on its device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.errors import UsageError


@contextmanager
def mode_of(model: nn.Module, training: bool) -> Iterator[None]:
    """Puts the model into training or evaluation mode, and restores the mode of every module afterwards. For training,
    a model that is in training mode stays as it is, because the user may have put some of its modules into evaluation
    mode."""
    modes = [(module, module.training) for module in model.modules()]
    if not (training and model.training):
        model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def unpack(batch: Any, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns (x, y, lengths) on the device, with lengths None where the batch has none."""
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        raise UsageError("the loader must give (x, y) or (x, y, lengths) batches of tensors")
    moved = [torch.as_tensor(item).to(device, non_blocking=True) for item in batch]
    return moved[0], moved[1], moved[2] if len(moved) == 3 else None


def check_model(model: object) -> None:
    """Raises UsageError for anything but a model, such as its class."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"{model!r} is no torch module; give a model, as in Net()")


def pick_device(device: str | torch.device) -> torch.device:
    """Returns the device by its name. "auto" is a CUDA device where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device={device!r} is not known; use 'auto', 'cpu' or 'cuda'") from error
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device={device!r} was asked for, but there is no CUDA device here; use 'cpu'")
    return picked
