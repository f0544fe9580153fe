"""Device and mode of a model."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import Rule, shown
from ulr_snn.kernels import ranks
from ulr_snn.kernels.walk import parameters_in


@contextmanager
def mode_of(model: nn.Module, training: bool) -> Iterator[None]:
    """Puts the model into training or evaluation mode, and restores the mode of every module afterwards. For training,
    a model that is in training mode stays as it is, because the user may have put some of its modules into evaluation
    mode."""
    modes = [(module, module.training) for module in model.modules()]
    if not (training and model.training):
        model.train(training)
    if training:
        for module in list(model.modules()):
            if module.training and type(module).train is not nn.Module.train:
                module.train(True)  # as the user's own loop would do, for a class that keeps norms frozen
        for module, mode in modes if modes[0][1] else ():
            module.training &= mode
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_model(model: Any) -> nn.Module:
    """Returns the model, without its DistributedDataParallel. Raises UsageError for anything but a model, such as its
    class, for a model that is cut into parts, for parameters without finite values, and for NaN in buffers, which may
    be infinite (a threshold, a mask)."""
    if isinstance(model, nn.Module) and "_parameters" not in vars(model):
        raise UsageError(f"{type(model).__name__} was made without super().__init__(), which a torch module needs")
    model = ranks.unwrapped(model)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{shown(model)} is no torch module; give a model, as in Net()")
    if getattr(model.forward, "__func__", None) is nn.Module.forward:  # which raises an error
        raise UsageError(f"{type(model).__name__} has no forward; give a model that has one")
    if isinstance(model.parameters(), Mapping):  # as Rockpool's modules, until they are asked for torch's methods
        kind = type(model).__name__
        raise UsageError(
            f"{kind} has a parameters() of its library in place of torch's; give what its to_torch() returns"
        )
    for name, q in model.named_parameters():
        if isinstance(q, nn.UninitializedParameter):
            raise UsageError(f"{name} of the model has no shape yet; run a batch through the model first")
        if q.is_meta:
            raise UsageError(f"{name} of the model is on the meta device, without values; move it by model.to_empty()")
        if not all_finite(q):
            bad = (~torch.isfinite(q.detach())).nonzero()
            raise UsageError(
                f"{name} of the model holds NaN or infinite values, {len(bad):,} of {q.numel():,}, the first at "
                f"{bad[0].tolist()}; load or draw its weights anew"
            )
    for name, buffer in model.named_buffers():
        valued = not (buffer.is_meta or isinstance(buffer, nn.parameter.UninitializedBuffer))
        if valued and buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise UsageError(f"the buffer {name} of the model holds NaN; load the model anew, or reset it")
    return model


Model = Annotated[nn.Module, Rule("a torch module", check_model)]


def all_finite(tensor: Tensor) -> bool:
    """Returns whether a tensor holds neither NaN nor infinite values. A finite sum shows it sooner; it may overflow."""
    values = tensor.detach()
    if values.is_floating_point() and values.itemsize == 1:
        values = values.float()  # torch computes nothing in eight bits
    return not values.is_floating_point() or bool(values.sum().isfinite()) or bool(torch.isfinite(values).all())


def not_finite(model: nn.Module) -> str | None:
    """Returns the name of a parameter that is not finite; None if there is none."""
    return next((name for name, q in model.named_parameters() if not all_finite(q)), None)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Returns the trainable parameters. Raises UsageError if there are none, or inference mode rules out training."""
    parameters = parameters_in(model)
    found = [q for q in parameters if q.requires_grad]
    if not found:
        raise UsageError(f"{type(model).__name__} has no trainable parameter; unfreeze some (requires_grad_(True))")
    if torch.is_inference_mode_enabled():
        raise UsageError("a model cannot learn in torch.inference_mode(); make and train it outside of it")
    check_tracked(parameters)
    return found


def check_tracked(parameters: Iterable[nn.Parameter]) -> None:
    """Raises UsageError for parameters that were made in inference mode."""
    if any(q.is_inference() for q in parameters):
        raise UsageError("a model made in torch.inference_mode() cannot learn; make it outside of it")


def move(model: nn.Module, device: torch.device) -> None:
    """Moves a model to a device. A model that is there stays untouched: torch would look at gradients, which a training
    in another thread may clear."""
    there = torch.empty(0, device=device).device
    if any(q.device != there for q in (*model.parameters(), *model.buffers())):
        model.to(device)


def pick_device(device: Any) -> torch.device:
    """Returns the device by its name. "auto" is a CUDA device where there is one. Raises UsageError for a device that
    is not known, or not here."""
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device={device!r} is not known; use 'auto', 'cpu' or 'cuda'") from error
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device={device!r} was asked for, but there is no CUDA device here; use 'cpu'")
    try:
        torch.ones((), device=picked).item()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for a kind of device
        raise UsageError(f"device={device!r} cannot hold values here; use 'auto', 'cpu' or 'cuda'") from error
    return picked
