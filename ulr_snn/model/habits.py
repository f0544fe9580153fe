"""What a model's forward does besides its outputs. A chain in its place would not do it."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from ulr_snn.model.trees import tensors
from ulr_snn.sites.binding import user_modules

PLAIN = bool, int, float, str, type(None)  # kinds of attributes that choose what a forward does
Attribute = tuple[int, str]  # the id of a module, and a name


def options(model: nn.Module, without: Collection[Attribute] = ()) -> dict[Attribute, Any]:
    """Returns the plain attributes of modules of the user's own classes."""
    found = {
        (id(module), name): value
        for module in user_modules(model)
        for name, value in vars(module).items()
        if type(value) in PLAIN and name != "training"
    }
    return {key: value for key, value in found.items() if key not in without}


def own_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Returns copies of the buffers of modules of the user's own classes, norms apart."""
    names = {id(module): name for name, module in model.named_modules()}
    return {
        f"{names[id(module)]}.{name}".lstrip("."): buffer.detach().clone()
        for module in user_modules(model)
        if not isinstance(module, _BatchNorm)
        for name, buffer in module.named_buffers(recurse=False)
    }


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> str | None:
    """Returns the name of a tensor that has changed; None if there is none."""
    same = {name for name, value in after.items() if name in before and torch.equal(before[name], value)}
    return next(iter(sorted({*before, *after} - same)), None)


def holds_nan(model: nn.Module) -> bool:
    """Returns whether a parameter, a buffer, or state of a module of the user's own class has NaN."""
    held = [list(vars(module).values()) for module in user_modules(model)]
    numbers = (value for values in held for value in values if isinstance(value, float))
    states = (*model.parameters(), *model.buffers(), *tensors(held), *numbers)
    listed = (item for values in held for value in values if isinstance(value, list) for item in value)
    found = (*states, *(item for item in listed if isinstance(item, float)))
    return any(bool(torch.as_tensor(value).isnan().any()) for value in found)


class Watched(TorchDispatchMode):
    """While it is entered, notes what happens where `counts` returns True. reads: single numbers are read from tensors,
    as branches on values do. writes: parameters or buffers are changed in place."""

    def __init__(self, model: nn.Module, counts: Callable[[], bool]) -> None:
        super().__init__()
        self.counts, self.reads, self.writes = counts, False, False
        self._held = {q.untyped_storage().data_ptr() for q in (*model.parameters(), *model.buffers()) if q.numel()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.counts():
            self.reads |= func is torch.ops.aten._local_scalar_dense.default
            self.writes |= func._schema.is_mutable and args[0].untyped_storage().data_ptr() in self._held
        return func(*args, **kwargs or {})
