"""The adapter of unknown modules, which are trained by noise on their input current."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ulr_snn.adapters.base import StepNeuron, put_back
from ulr_snn.noise.kinds import CurrentNoise

MODULES_OWN = frozenset(nn.Module().__dict__)  # attributes of every module; none of them is state
SHARED = (nn.Module, nn.Parameter, type, FunctionType, MethodType, BuiltinFunctionType, partial, torch.Generator)


class BlackBox(StepNeuron):
    """An unknown module. Its first floating-point tensor argument is the current, its first output tensor the spikes.

    whole: whether the module runs all time steps in one call. elementwise: whether each output depends only on the
    input at its own place. The module's code runs on detached tensors and without a graph, so that it may leave
    PyTorch. While the module is bound, its attributes are copies where they can be copied, so that every pass starts
    from the same state.
    """

    slot = "current_site"

    def __init__(self, module: nn.Module, noise: CurrentNoise, whole: bool, elementwise: bool = True) -> None:
        super().__init__(module)
        self.noise, self.whole, self.elementwise = noise, whole, elementwise

    @property
    def threshold(self) -> Tensor:
        return torch.ones(())

    def patches(self, site: Any) -> dict[str, Any]:
        own = self.module.forward

        def forward(*arguments: Any, **named: Any) -> Any:
            current = current_of(arguments, named)
            if current is None:
                return own(*arguments, **named)
            arguments, named = with_current(site.disturb(current), arguments, named)
            with torch.no_grad():
                result = own(*map(detached, arguments), **{name: detached(item) for name, item in named.items()})
            return replaced(result, site.release)[0]

        return {"forward": forward}

    @contextmanager
    def bound(self, site: Any) -> Iterator[None]:
        with copies_of_state(self.module, list(self.module.modules())), super().bound(site):
            yield


@contextmanager
def copies_of_state(root: nn.Module, modules: list[nn.Module]) -> Iterator[None]:
    """Within this context, the state of these modules of a root module is a copy. Parameters, modules, functions and
    objects that cannot be copied stay the same, and so does batch norm. What several attributes share, their copies
    share too."""
    modules = [module for module in modules if not isinstance(module, _BatchNorm)]
    kept = [(module, dict(module.__dict__), dict(module._buffers)) for module in modules]
    memo = same(root)
    try:
        for module, attributes, buffers in kept:
            own = {name: copied(value, memo) for name, value in attributes.items() if name not in MODULES_OWN}
            module.__dict__.update(own)
            module._buffers.update({name: None if b is None else b.detach().clone() for name, b in buffers.items()})
        yield
    finally:
        for module, attributes, buffers in kept:
            put_back(module.__dict__, attributes)
            put_back(module._buffers, buffers)


def same(root: nn.Module) -> dict[int, Any]:
    """Returns a memo for `copy.deepcopy` with which modules and parameters stay what they are."""
    return {id(item): item for module in root.modules() for item in (module, *module._parameters.values())}


def copied(value: Any, memo: dict[int, Any]) -> Any:
    """Returns a copy of a module's state, with the same modules, parameters and functions in it."""
    if isinstance(value, SHARED):
        return value
    if isinstance(value, Tensor):
        if id(value) not in memo:
            memo[id(value)] = value.detach().clone()
        return memo[id(value)]
    if isinstance(value, numpy.ndarray):
        return value.copy()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(copied(item, memo) for item in value))
    if type(value) in (list, tuple, set):
        return type(value)(copied(item, memo) for item in value)
    if type(value) is dict:
        return {key: copied(item, memo) for key, item in value.items()}
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # handles and locks cannot be copied; they are shared
        return value


class State:
    """A copy of the state of a module and of the modules in it, as it is now."""

    def __init__(self, module: nn.Module) -> None:
        memo = same(module)
        self.modules = [inner for inner in module.modules() if not isinstance(inner, _BatchNorm)]
        self.attributes = [copied(self._own(inner), memo) for inner in self.modules]

    @staticmethod
    def _own(module: nn.Module) -> dict[str, Any]:
        return {name: value for name, value in module.__dict__.items() if name not in MODULES_OWN | {"forward"}}

    def restore(self) -> None:
        """Gives the modules a copy of this state."""
        memo: dict[int, Any] = {}
        for module, attributes in zip(self.modules, self.attributes, strict=True):
            module.__dict__.update(copied(attributes, memo))


def current_of(arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
    """Returns the first floating-point tensor among the arguments of a call."""
    return next((a for a in (*arguments, *named.values()) if isinstance(a, Tensor) and a.is_floating_point()), None)


def with_current(
    current: Tensor, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a call with another current."""
    before = current_of(arguments, named)
    swap = lambda item: current if item is before else item  # noqa: E731
    return tuple(map(swap, arguments)), {name: swap(item) for name, item in named.items()}


def detached(item: Any) -> Any:
    """Returns a tensor without its graph, and anything else as it is."""
    return item.detach() if isinstance(item, Tensor) else item


def replaced(result: Any, release: Callable[[Tensor], Tensor]) -> tuple[Any, bool]:
    """Returns the result of a call with `release` applied to its first tensor, and whether it contains a tensor."""
    if isinstance(result, Tensor):
        return release(result), True
    items = list(result.values() if isinstance(result, dict) else result if isinstance(result, tuple | list) else [])
    for index, item in enumerate(items):
        items[index], found = replaced(item, release)
        if found:
            if isinstance(result, dict):
                return dict(zip(result, items, strict=True)), True
            return (type(result)(*items) if hasattr(result, "_fields") else type(result)(items)), True
    return result, False
