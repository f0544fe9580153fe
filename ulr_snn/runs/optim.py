"""The optimizer and the learning rate schedule of a training."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import shown
from ulr_snn.estimators.attachment import Attaches
from ulr_snn.estimators.base import Estimator
from ulr_snn.kernels import ranks
from ulr_snn.model.mode import trainable

RATES = ("lr", "initial_lr")  # of a group; the second is that of torch's schedules
WARM_UP = 0.1  # fraction of the steps, in the cosine schedule
RISE, FIRST = 0.4, 1 / 25  # fraction of the steps until the highest rate of one cycle, and the share that it begins at


@dataclass(frozen=True)
class Defaults:
    """Learning rate, momentum and schedule of `train` where nothing else is asked for."""

    lr: float
    momentum: float
    schedule: str


USUAL = Defaults(lr=1e-2, momentum=0.9, schedule="cosine")
OWN = Defaults(lr=1.5e-2, momentum=0.8, schedule="one-cycle")  # with an estimator's own step sizes


def defaults(estimator: Estimator) -> Defaults:
    """Returns the defaults of `train`'s own optimizer for an estimator."""
    return OWN if isinstance(estimator, Attaches) else USUAL


def make_optimizer(model: nn.Module, optimizer: Any, lr: float | None, estimator: Estimator) -> Optimizer:
    """Returns the optimizer that `train` was given, made, or asked to make.

    The default is Adam, each of whose parameters has the rate `lr` (see `defaults`) times a factor of its own (see
    estimators/step_sizes.py): smaller where a step would move membranes by several thresholds, larger in a readout,
    and over T for `Online()` with T time steps. For `ULR` and `Online` its momentum is short, because the credit of a
    layer turns with the weights above it.
    """
    parameters = trainable(model)
    if lr is not None and optimizer is not None:
        raise UsageError(f"train got lr={lr} and an optimizer, which has its own; give one of them")
    if optimizer is None:
        held = [p for p in model.parameters() if p.requires_grad or p.is_floating_point()]  # also for those that thaw
        fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in held)
        usual, groups = defaults(estimator), [{"params": [p]} for p in held]
        return torch.optim.Adam(groups, usual.lr if lr is None else lr, betas=(usual.momentum, 0.999), fused=fused)
    if not (isinstance(optimizer, Optimizer) or callable(optimizer)):
        raise UsageError(
            f"train got optimizer={shown(optimizer)}; it is an optimizer or a factory parameters -> optimizer"
        )
    made = optimizer if isinstance(optimizer, Optimizer) else optimizer(parameters)
    check_optimizer(made, parameters)
    return made


def check_optimizer(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    """Raises UsageError unless an optimizer moves some of the parameters, by dense gradients of one evaluation."""
    if not (callable(getattr(optimizer, "step", None)) and hasattr(optimizer, "param_groups")):
        raise UsageError(f"the optimizer factory returned {shown(optimizer)}; return an optimizer such as Adam")
    name, own = type(optimizer).__name__, {id(q) for q in parameters}
    if not any(id(q) in own for group in optimizer.param_groups for q in group["params"]):
        raise UsageError(f"{name} holds no trainable parameter of this model; make it of model.parameters()")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UsageError(
            f"{name} evaluates the loss several times a step, which random firing does not allow; use an optimizer "
            "such as torch.optim.Adam"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise UsageError("SparseAdam takes sparse gradients, but these are dense; use torch.optim.Adam")


def make_scheduler(optimizer: Optimizer, scheduler: Any, steps: int | None, usual: Defaults) -> LRScheduler | None:
    """Returns the learning rate schedule that `train` was asked for; None for a constant rate.

    steps: of the training, None if they are not known. usual: has the schedule for "auto": one cycle for `ULR` and
    `Online` with `train`'s own optimizer, else the cosine.
    """
    if scheduler is None:
        return None
    if callable(scheduler):
        made = scheduler(optimizer)
        check_scheduler(made, optimizer, steps)
        return made
    name = usual.schedule if scheduler == "auto" else scheduler
    if not isinstance(name, str) or name not in SCHEDULES:
        raise UsageError(
            f"train got scheduler={shown(scheduler)}; it is 'auto', {', '.join(map(repr, SCHEDULES))}, None or a "
            "factory optimizer -> scheduler"
        )
    if steps is None:
        raise UsageError(
            f"the {name} schedule needs the number of steps: give a loader with a length, or scheduler=None"
        )
    return LambdaLR(optimizer, lambda step: SCHEDULES[name](step, steps))


@contextmanager
def same_rates(optimizer: Optimizer, scheduler: Any) -> Iterator[None]:
    """Gives the groups of an optimizer their learning rates back after a schedule of `train`'s own, which ends at zero.
    Torch would also take the first rates again for a schedule of the next training."""
    kept = [(group, {name: group[name] for name in RATES if name in group}) for group in optimizer.param_groups]
    try:
        yield
    finally:
        for group, rates in kept if isinstance(scheduler, str) else ():
            for name in RATES:
                group.pop(name, None)
            group.update(rates)


def check_scheduler(scheduler: Any, optimizer: Optimizer, steps: int | None) -> None:
    """Raises UsageError unless a scheduler sets the rates of this optimizer, for so many steps if they are known."""
    if not all(callable(getattr(scheduler, method, None)) for method in ("step", "state_dict", "load_state_dict")):
        raise UsageError(f"the scheduler factory returned {shown(scheduler)}; return a scheduler of the optimizer")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise UsageError(f"{type(scheduler).__name__} is of another optimizer; make it of the one that it is given")
    planned = getattr(scheduler, "total_steps", None)  # of OneCycleLR, which refuses to go on after them
    if isinstance(planned, int) and steps is not None and planned < steps:
        raise UsageError(
            f"{type(scheduler).__name__} got total_steps={planned}, but the training has {steps}; give it as many"
        )


def cosine(step: int, steps: int) -> float:
    """Returns the factor of the cosine schedule: a half cosine from 1 to 0, times a linear warm-up.

    The first gradients of a new net are mostly noise, because it fires little. Adam would turn them into steps of full
    size, which silence whole layers of a deep net for good.
    """
    warm = min(1.0, (step + 1) / (WARM_UP * steps))
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def one_cycle(step: int, steps: int) -> float:
    """Returns the factor of one cycle (Smith & Topin, arXiv 1708.07120): half a cosine up to 1, and another down to 0.

    Its long rise lets layers that hardly fire, whose gradients are mostly noise, wake up in small steps. The highest
    rate may then be higher than with a short warm-up.
    """
    progress = min(1.0, (step + 0.5) / steps)
    if progress < RISE:
        return FIRST + (1 - FIRST) * 0.5 * (1 - math.cos(math.pi * progress / RISE))
    return 0.5 * (1 + math.cos(math.pi * (progress - RISE) / (1 - RISE)))


SCHEDULES: dict[str, Callable[[int, int], float]] = {"one-cycle": one_cycle, "cosine": cosine}


def loader_length(loader: Iterable[Any]) -> int | None:
    """Returns the number of batches in an epoch; None for a loader without a length, such as a generator."""
    try:
        return len(loader)  # type: ignore[arg-type]  # a loader may have no length
    except TypeError:
        return None


def length(loader: Iterable[Any], epochs: int, accumulate: int, max_steps: int | None) -> tuple[int | None, int | None]:
    """Returns the optimizer steps and the batches of the run; None if neither the loader nor `max_steps` tells."""
    lengths = ranks.gathered(loader_length(loader))
    known = [each for each in lengths if each is not None]
    most = math.inf if max_steps is None else max_steps
    if len(known) < len(lengths):
        return max_steps, None if max_steps is None else max_steps * accumulate
    batches = min(known)  # an epoch ends when one rank has no batch left
    return int(min(epochs * -(-batches // accumulate), most)), int(min(epochs * batches, most * accumulate))
