"""Errors of torch's own modules, told with the module's name and with what an input has to look like."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from ulr_snn.errors import UsageError

CONTAINERS = "torch.nn.modules.container"


@contextmanager
def explained(model: nn.Module, events: Tensor) -> Iterator[None]:
    """Raises UsageError in place of what a module of torch's raises about its input, where events [T, B, ...] are the
    model's; other errors stay as they are."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        module, x = refused(error.__traceback__)
        if module is None or not isinstance(x, Tensor) or "alloc" in str(error):
            raise
        name = next((name for name, other in model.named_modules() if other is module), "") or "the model"
        advice = "let what comes before it give what it takes"
        if x.shape[:2] == events.shape[:2]:
            advice = (
                "it sees [T, B, ...]: flatten by nn.Flatten(2), or wrap it as Fold(nn.Conv2d(...))"
            )
        raise UsageError(
            f"{name} ({type(module).__name__}) got an input of shape {tuple(x.shape)} and says {first_line(error)!r}; "
            f"{advice}"
        ) from error


def first_line(error: Exception) -> str:
    """Of its message, without the full stop."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def refused(traceback: TracebackType | None) -> tuple[nn.Module | None, Any]:
    """The module of torch's that the error came from, and its input; None where it came from elsewhere."""
    module = x = None
    while traceback is not None:
        frame = traceback.tb_frame
        owner = frame.f_locals.get("self")
        where = frame.f_globals.get("__name__", "")
        if isinstance(owner, nn.Module) and where.startswith("torch.nn.modules") and where != CONTAINERS:
            if type(owner).__module__.startswith("torch.nn.modules") and type(owner).__module__ != CONTAINERS:
                module, x = owner, frame.f_locals.get("input", x if owner is module else None)
        elif not where.startswith("torch"):
            module = x = None
        traceback = traceback.tb_next
    return module, x
