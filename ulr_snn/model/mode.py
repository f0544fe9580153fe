"""Device and mode of a model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

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
