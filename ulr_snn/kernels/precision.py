"""Mixed precision. Autocast applies to a model's own layers, not to the computations of this package."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated

import torch
from torch import Tensor

from ulr_snn.errors.arguments import where

REDUCED = (torch.bfloat16, torch.float16)
Autocast = Annotated[torch.dtype, where("torch.bfloat16 or torch.float16", lambda value: value in REDUCED)]


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
    """Within this context the model's own layers run in this type (torch.autocast); None: in their own type."""
    if dtype is None:
        yield
        return
    with torch.autocast(device.type, dtype):
        yield
