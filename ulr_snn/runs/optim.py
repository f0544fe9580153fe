"""The optimizer and the learning rate schedule of a training."""

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ulr_snn.errors import UsageError

DEFAULT_LR = 1e-2
LR_WARM_UP = 0.1  # fraction of the steps, in the cosine schedule


def make_optimizer(model: nn.Module, optimizer: Any, lr: float | None) -> Optimizer:
    """Returns the optimizer that `train` was given, made, or asked to make.

    The default is Adam, each of whose parameters has the rate `lr` (1e-2) times a factor of its own (see
    estimators/step_sizes.py): smaller where a step would move membranes by several thresholds, larger in a readout,
    rising over the training if layers begin at rest, and over T for `Online()` with T time steps.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise UsageError(f"{type(model).__name__} has no trainable parameter; unfreeze some (requires_grad_(True))")
    if lr is not None and (optimizer is not None or not lr > 0):
        raise UsageError(f"train got lr={lr}; give a positive lr, or an optimizer, not both")
    if optimizer is None:
        fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in trainable)
        return torch.optim.Adam([{"params": [p]} for p in trainable], DEFAULT_LR if lr is None else lr, fused=fused)
    if isinstance(optimizer, Optimizer):
        return optimizer
    if not callable(optimizer):
        raise UsageError(f"train got optimizer={optimizer!r}; it is an optimizer or a factory parameters -> optimizer")
    made = optimizer(trainable)
    step = inspect.signature(made.step).parameters.get("closure") if isinstance(made, Optimizer) else None
    if step is not None and step.default is step.empty:
        raise UsageError(
            f"{type(made).__name__} evaluates the loss several times a step, which random firing does not allow; use "
            "an optimizer such as torch.optim.Adam"
        )
    return made


def make_scheduler(
    optimizer: Optimizer,
    scheduler: Any,
    loader: Iterable[Any],
    epochs: int,
    accumulate: int,
    max_steps: int | None,
) -> LRScheduler | None:
    """Returns the learning rate schedule that `train` was asked for; None for a constant rate."""
    if scheduler is None:
        return None
    if scheduler != "cosine":
        if not callable(scheduler):
            raise UsageError(
                f"train got scheduler={scheduler!r}; it is 'cosine', None or a factory optimizer -> scheduler"
            )
        return scheduler(optimizer)
    steps = total_steps(loader, epochs, accumulate, max_steps)
    if steps is None:
        raise UsageError(
            "the cosine schedule needs the number of steps: give a loader with a length, or scheduler=None"
        )
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))


def learning_rate_factor(step: int, steps: int) -> float:
    """Returns the factor of the cosine schedule: a half cosine from 1 to 0, times a linear warm-up.

    The first gradients of a new net are mostly noise, because it fires little. Adam would turn them into steps of full
    size, which silence whole layers of a deep net for good.
    """
    warm = min(1.0, (step + 1) / (LR_WARM_UP * steps))
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def loader_length(loader: Iterable[Any]) -> int | None:
    """Returns the number of batches in an epoch; None for a loader without a length, such as a generator."""
    try:
        return len(loader)  # type: ignore[arg-type]  # a loader may have no length
    except TypeError:
        return None


def total_steps(loader: Iterable[Any], epochs: int, accumulate: int, max_steps: int | None) -> int | None:
    """Returns the number of optimizer steps of the run; None if neither the loader nor `max_steps` tells."""
    batches = loader_length(loader)
    if batches is None:
        return max_steps
    steps = epochs * -(-batches // accumulate)
    return steps if max_steps is None else min(steps, max_steps)
