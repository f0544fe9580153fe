"""Side effects of a model's forward, and branches in it. A chain in its place would leave them out."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode  # torch has no public way to see all operations

from ulr_snn.model.trees import tensors
from ulr_snn.sites.binding import user_modules

PLAIN = bool, int, float, str, type(None)  # kinds of attributes that choose what a forward does
READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__)  # they read numbers without an operation


def options(model: nn.Module) -> dict[tuple[int, str], Any]:
    """Returns the plain attributes of modules of the user's own classes, also those in dictionaries and tuples."""
    found: dict[tuple[int, str], Any] = {}

    def note(module: nn.Module, name: str, value: Any) -> None:
        if type(value) in PLAIN or isinstance(value, Enum):
            found[id(module), name] = value
        elif type(value) in (dict, tuple):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                note(module, f"{name}[{key!r}]", item)

    for module in user_modules(model):
        for name, value in vars(module).items():
            if name != "training" and not name.startswith("_"):
                note(module, name, value)
    return found


def changed_option(before: dict[tuple[int, str], Any], after: dict[tuple[int, str], Any]) -> str | None:
    """Returns the name of an attribute that has changed from one plain value to another; None if there is none."""
    return next((key[1] for key, value in after.items() if key in before and before[key] != value), None)


def own_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Returns copies of the buffers of modules of the user's own classes, norms apart."""
    names = {id(module): name for name, module in model.named_modules()}
    return {
        f"{names[id(module)]}.{name}".lstrip("."): buffer.detach().clone()
        for module in user_modules(model)
        if not isinstance(module, _BatchNorm)
        for name, buffer in module.named_buffers(recurse=False)
    }


def changed_buffer(before: dict[str, Tensor], after: dict[str, Tensor]) -> str | None:
    """Returns the name of a buffer that has changed; None if there is none."""
    same = {name for name, value in after.items() if name in before and torch.equal(before[name], value)}
    return next(iter(sorted({*before, *after} - same)), None)


def holds_nan(model: nn.Module) -> bool:
    """Returns whether parameters, buffers, or attributes of modules of the user's own classes hold NaN. It looks into
    lists, tuples, sets, dictionaries and arrays."""
    own = [value for module in user_modules(model) for value in vars(module).values()]
    return any(has_nan(number) for number in numbers_in([*model.parameters(), *model.buffers(), *own]))


def numbers_in(value: Any) -> Iterator[Any]:
    """Yields all tensors, and arrays and numbers of floating point, in nested containers."""
    if isinstance(value, Tensor | float) or (isinstance(value, np.ndarray) and value.dtype.kind == "f"):
        yield value
    elif isinstance(value, Mapping):
        yield from numbers_in(list(value.values()))
    elif isinstance(value, list | tuple | set | deque):
        for item in value:
            yield from numbers_in(item)


def has_nan(number: Any) -> bool:
    """Returns whether a tensor, an array or a number has NaN."""
    if isinstance(number, Tensor):
        return number.is_floating_point() and not number.is_meta and bool(number.detach().isnan().any())
    return bool(np.isnan(number).any())


class Watched(ExitStack):
    """While it is entered, notes what happens where `counts` returns True. reads: numbers are read from tensors, as
    branches on values do. writes: parameters or buffers are changed in place."""

    def __init__(self, model: nn.Module, counts: Callable[[], bool]) -> None:
        super().__init__()
        self.counts, self.reads, self.writes = counts, False, False
        self.held = {q.untyped_storage().data_ptr() for q in (*model.parameters(), *model.buffers()) if q.numel()}

    def __enter__(self) -> "Watched":
        self.enter_context(_Functions(self))
        self.enter_context(_Operations(self))
        return self

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Notes one operation of torch."""
        if not self.counts():
            return
        self.reads |= func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = kwargs.get(argument.name, args[i] if i < len(args) else None)
                strided = [t for t in tensors(given) if t.layout is torch.strided]
                self.writes |= any(t.untyped_storage().data_ptr() in self.held for t in strided)


class _Functions(TorchFunctionMode):
    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self.watched = watched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.watched.reads |= func in READS and self.watched.counts()
        return func(*args, **kwargs or {})


class _Operations(TorchDispatchMode):
    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self.watched = watched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.watched.operation(func, args, kwargs or {})
        return func(*args, **kwargs or {})
