"""What a training was started with, in words that a checkpoint holds and a resumed run is compared by."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ulr_snn.errors import UsageError
from ulr_snn.kernels import ranks
from ulr_snn.runs.optim import loader_length

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
# Arguments of `train` besides those that the optimizer shows. A run may go on for longer than it was meant to.
COMPARED = ("estimator", "loss", "scheduler", "seed", "accumulate", "clip", "autocast", "layout", "output")


def described(
    model: nn.Module, loader: Iterable[Any], optimizer: Optimizer, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the settings of a training by name. arguments: of `train`."""
    groups = [{name: q for name, q in group.items() if name != "params"} for group in optimizer.param_groups]
    return {
        "model": in_words(model),
        "frozen parameters": in_words([name for name, q in model.named_parameters() if not q.requires_grad]),
        "batches an epoch": loader_length(loader),
        "batch size": getattr(loader, "batch_size", None),
        "processes": ranks.count(),
        "optimizer": f"{type(optimizer).__name__} {' '.join(sorted({in_words(group) for group in groups}))}",
        **{name: in_words(arguments[name]) for name in COMPARED},
    }


def settings_of(callback: Any) -> str:
    """Returns the class of a callback, and the arguments that it was made with as far as they are known."""
    given = [field.name for field in fields(callback) if field.init] if is_dataclass(callback) else []
    return f"{type(callback).__qualname__} {in_words({name: getattr(callback, name) for name in given})}"


def in_words(value: Any) -> Any:
    """Returns plain values as they are, and others as text that is the same in every process."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return " ".join(f"{name}={in_words(item)}" for name, item in value.items())
    if isinstance(value, tuple | list):
        return f"({', '.join(str(in_words(item)) for item in value)})"
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return _ADDRESS.sub("", repr(value))


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], place: object) -> None:
    """Raises UsageError if a run was started with other settings than those of its continuation."""
    for name, value in before.items():
        if name in now and now[name] != value:
            first, second = parts_that_differ(str(value), str(now[name]))
            raise UsageError(
                f"the run in '{place}' was started with {name} {first}, not {second}; repeat its settings, give "
                "another run_dir, or take the new ones by resume='changed'"
            )


def parts_that_differ(first: str, second: str, most: int = 60) -> tuple[str, str]:
    """Returns two texts in short, from where they begin to differ."""
    if max(len(first), len(second)) <= most:
        return first, second
    at = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
    start = max(0, at - most // 3)
    return tuple(f"...{' '.join(text[start : start + most].split())}..." for text in (first, second))  # type: ignore[return-value]
