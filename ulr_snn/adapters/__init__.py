"""Spiking modules of other libraries. Each file here but two is the adapter of the library whose name it has;
`register` adds one from outside. A library is imported only if a model has a module of it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from torch import nn

from ulr_snn.adapters.base import Adapter, Step, StepNeuron
from ulr_snn.adapters.blackbox import BlackBox, copies_of_state, current_of, detached, replaced, with_current
from ulr_snn.errors import UsageError

_OWN = ("base", "blackbox")  # files that are no adapters
_adapters: dict[str, Adapter | None] = {m.name: None for m in iter_modules(__path__) if m.name not in _OWN}


def libraries() -> tuple[str, ...]:
    """The names of all libraries with an adapter."""
    return tuple(_adapters)


def register(library: str, adapter: Adapter) -> None:
    """Adds the adapter of a library, by the name of its top package."""
    _adapters[library] = adapter
    library_of.cache_clear()


@cache
def library_of(kind: type) -> str | None:
    """The library with an adapter that a class, or the first of its bases, is of."""
    names = (base.__module__.partition(".")[0] for base in kind.__mro__)
    return next((name for name in names if name in _adapters), None)


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter for a module of another library; None where there is none."""
    library = library_of(type(module))
    if library is None:
        return None
    if _adapters[library] is None:
        _adapters[library] = import_module(f"{__name__}.{library}").ADAPTER
    return _adapters[library]


def adapt(module: nn.Module, name: str) -> StepNeuron | None:
    """The module as a site needs it; None if it is none of another library's spiking modules.

    Raises UsageError for a spiking module that cannot be trained, with the reason.
    """
    adapter = adapter_of(module)
    found = None if adapter is None else adapter.adapt(module)
    if found is None:
        return None
    reason = found if isinstance(found, str) else found.unsupported()
    if reason is not None:
        raise UsageError(f"{name} is a {library_of(type(module))} {type(module).__name__}: {reason}")
    return None if isinstance(found, str) else found


def couples(module: nn.Module) -> bool:
    """Whether a module of another library couples the rows of a batch or draws noise of its own in training mode."""
    adapter = adapter_of(module)
    return adapter is not None and adapter.couples(module)


@contextmanager
def fresh_state(model: nn.Module) -> Iterator[None]:
    """For a while, a model starts from its initial state, as the adapters of its modules know it."""
    found = {id(adapter): adapter for module in model.modules() if (adapter := adapter_of(module)) is not None}
    with ExitStack() as stack:
        for adapter in found.values():
            stack.enter_context(adapter.fresh_state(model))
        yield


__all__ = [
    "Adapter",
    "BlackBox",
    "Step",
    "StepNeuron",
    "adapt",
    "adapter_of",
    "copies_of_state",
    "couples",
    "current_of",
    "detached",
    "fresh_state",
    "libraries",
    "register",
    "replaced",
    "with_current",
]
