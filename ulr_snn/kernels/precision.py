"""Mixed precision. Autocast applies to a model's own layers, not to the computations of this package."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from ulr_snn.errors import UsageError

REDUCED = (torch.bfloat16, torch.float16)


def widened(tensor: Tensor) -> Tensor:
    """Returns the tensor in at least single precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def full_precision() -> Iterator[None]:
    """Within this context (or in a function that it decorates) autocast is off on all devices."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def reduced_precision(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Within this context the model's own layers run in this type (torch.autocast); None: in their own type. Raises
    UsageError for a type that is not in REDUCED."""
    if dtype is None:
        yield
        return
    if dtype not in REDUCED:
        raise UsageError(f"autocast={dtype} is no reduced precision; use torch.bfloat16, torch.float16 or None")
    with torch.autocast(device.type, dtype):
        yield
