"""Optimizer steps: the mean gradient of some batches, its bound, and what happens if it is not finite."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ulr_snn.errors import UsageError, reason
from ulr_snn.estimators.base import Attachment
from ulr_snn.kernels.walk import named_parameters_in
from ulr_snn.model.mode import all_finite

RECOVERY = 100  # good steps after which on_nonfinite="shrink" doubles the steps again


@dataclass
class Stepper:
    """Makes the optimizer steps of a training. clip: bound of the gradient norm.

    size: factor of the learning rates, below 1 after steps that were not finite, with on_nonfinite="shrink"; good:
    steps since then.
    """

    model: nn.Module
    attached: Attachment
    optimizer: Optimizer
    schedule: LRScheduler | None
    clip: float | None
    size: float = 1.0
    good: int = 0

    def __post_init__(self) -> None:
        # The user may leave out parameters. Those that the model gets later must be held.
        self.known = {id(q): q for q in self.model.parameters() if q.requires_grad}

    def check_held(self) -> None:
        """Raises UsageError for parameters that became trainable in the training, if the optimizer does not hold
        them."""
        held = {id(q) for group in self.optimizer.param_groups for q in group["params"]} | self.known.keys()
        for name, q in self.model.named_parameters():
            if q.requires_grad and id(q) not in held:
                raise UsageError(
                    f"{name} became trainable during the training, but {type(self.optimizer).__name__} does not hold "
                    "it; give train an optimizer that does (add_param_group), or begin another training"
                )

    def warn_of_loss(self) -> None:
        """Warns of parameters of the loss that the optimizer does not hold. The first step has shown them."""
        structure = getattr(self.attached, "structure", None)
        held = {id(q) for group in self.optimizer.param_groups for q in group["params"]}
        left = [] if structure is None else [q for q in structure.brought if id(q) not in held]
        if left:
            shapes = ", ".join(str(tuple(q.shape)) for q in left)
            warnings.warn(
                f"the loss has parameters of its own, of shape {shapes}, that {type(self.optimizer).__name__} does not "
                "hold, so they stay as they are; make it a module of the model (model.loss = loss), or freeze it",
                stacklevel=6,
            )

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.optimizer.param_groups[0]["lr"]

    def zero_grad(self) -> None:
        """Clears the gradients of all parameters, also of parameters that the optimizer leaves out."""
        self.optimizer.zero_grad()
        self.model.zero_grad()

    def step(self, batches: int, number: int) -> bool:
        """Makes an optimizer step on the mean gradient of the batches. Returns False if it left the step out.

        number: of the step, in errors. Raises FloatingPointError if the gradient is not finite, unless the attachment's
        on_nonfinite says otherwise.
        """
        groups = self.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        if batches > 1:
            for p in parameters:
                p.grad /= batches
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        finite = bool(torch.isfinite(norm)) or all(map(all_finite, gradients))  # a norm may overflow
        if finite:
            if self.clip is not None:
                nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
            with self.learning_rates():
                self.optimizer.step()
            self.grow()
        else:
            self.refuse(number)
        self.zero_grad()
        return finite

    def refuse(self, number: int) -> None:
        """Leaves a step out. Raises FloatingPointError with on_nonfinite="stop"."""
        if self.attached.on_nonfinite == "stop":
            found = ((name, q.grad) for name, q in self.model.named_parameters() if q.grad is not None)
            lost = ((name, g) for name, g in found if not all_finite(g))
            name, gradient = next(lost, ("a parameter of the loss", torch.full((), torch.nan)))
            raise FloatingPointError(
                f"the gradient of {name} is not finite at step {number} ({part_of(gradient)}), with a finite loss; "
                "look for roots, logarithms and divisions at zero in the loss, lower the learning rate, or use "
                "on_nonfinite='skip' or 'shrink'"
            )
        self.shrink()

    def shrink(self) -> None:
        """Halves the steps to come, after one that was not finite, with on_nonfinite="shrink"."""
        if self.attached.on_nonfinite == "shrink":
            self.size, self.good = self.size / 2, 0

    def grow(self) -> None:
        """Doubles the steps to come after many good ones, up to their usual size."""
        if self.size < 1:
            self.good += 1
            if self.good >= RECOVERY:
                self.size, self.good = self.size * 2, 0

    def advance(self) -> None:
        """Makes a step of the schedule."""
        if self.schedule is not None and not isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step()

    def end_epoch(self, loss: float) -> None:
        """Tells a schedule that follows the loss of an epoch."""
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(loss)

    @contextmanager
    def learning_rates(self) -> Iterator[None]:
        """Multiplies the learning rates by `size`, and those of the default optimizer by the attachment's factors,
        inside the context."""
        factors = self.attached.learning_rates()
        if not factors and self.size == 1:
            yield
            return
        names = {id(q): name for name, q in named_parameters_in(self.model).items()}
        groups, rates = self.optimizer.param_groups, [group["lr"] for group in self.optimizer.param_groups]
        try:
            for group in groups:  # with factors, each group has one parameter
                group["lr"] *= self.size * (factors.get(names.get(id(group["params"][0]), ""), 1.0) if factors else 1.0)
            if factors:
                self.optimizer.param_groups = joined(groups)
            yield
        finally:
            self.optimizer.param_groups = groups
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        schedule = None if self.schedule is None else self.schedule.state_dict()
        kind = type(self.optimizer).__name__
        return {
            "kind": kind,
            "optimizer": self.optimizer.state_dict(),
            "schedule": schedule,
            "size": self.size,
            "good": self.good,
        }

    def load_state_dict(self, state: dict[str, Any], anew: bool = False, changed: bool = False) -> None:
        """Loads a state. anew: the optimizer or schedule has other settings, which stay; of the state they take moments
        of the same kind of optimizer, and the number of steps. changed: they may also have other parameters."""
        self.size, self.good = state["size"], state["good"]
        if anew:
            self.go_on_anew(state)
            return
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            if self.schedule is not None and state["schedule"] is not None:
                self.schedule.load_state_dict(state["schedule"])
        except (ValueError, KeyError) as error:
            if changed:
                self.go_on_anew(state)
                return
            raise UsageError(f"the state of the optimizer or schedule is of another one: {reason(error)}") from error

    def go_on_anew(self, state: dict[str, Any]) -> None:
        """Goes on from the state of an optimizer and a schedule with other settings."""
        if state["kind"] == type(self.optimizer).__name__:
            own = [{name: q for name, q in group.items() if name != "params"} for group in self.optimizer.param_groups]
            with suppress(ValueError):  # other groups of parameters begin without moments
                self.optimizer.load_state_dict(state["optimizer"])
            for group, settings in zip(self.optimizer.param_groups, own, strict=True):
                group.update(settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of steps of a schedule without steps of the optimizer
            for _ in range((state["schedule"] or {}).get("last_epoch", 0)):
                self.advance()


def joined(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns groups that differ in their rates and parameters alone as one for each rate. One call of a fused
    optimizer then moves many parameters."""
    found: dict[float, list[dict[str, Any]]] = {}
    for group in groups:
        found.setdefault(group["lr"], []).append(group)
    return [alike[0] | {"params": [q for group in alike for q in group["params"]]} for alike in found.values()]


def part_of(tensor: Tensor) -> str:
    """Returns how many values of a tensor are NaN and infinite, in words."""
    nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    return f"{nan} NaN and {infinite} infinite of {tensor.numel()} values"
