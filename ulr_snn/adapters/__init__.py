"""Adapters of the spiking modules of other libraries.

Each file here except those in `_OWN` is the adapter of the library that it is named after. `register` adds
an adapter from outside. A library is imported only if a model contains a module of it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from weakref import WeakSet

from torch import Tensor, nn

from ulr_snn.adapters.base import Adapter, Step, StepNeuron
from ulr_snn.adapters.blackbox import BlackBox, State, copies_of_state, current_of, detached, replaced, with_current
from ulr_snn.errors import UsageError
from ulr_snn.kernels.walk import modules_in

# Files that hold no adapter.
_OWN = ("base", "blackbox", "comparisons", "intercept", "memories", "nir", "places", "stairs")
_with_tensors: WeakSet[type[StepNeuron]] = WeakSet()  # classes whose thresholds are tensors, which takes long to ask
_adapters: dict[str, Adapter | None] = {m.name: None for m in iter_modules(__path__) if m.name not in _OWN}


def libraries() -> tuple[str, ...]:
    """Returns the names of all libraries with an adapter."""
    return tuple(_adapters)


def register(library: str, adapter: Adapter) -> None:
    """Adds the adapter of a library, and replaces one that was there. library: the name of its top package."""
    if not isinstance(adapter, Adapter) or "." in library:
        raise UsageError(
            f"adapters.register got {adapter!r} for {library!r}; give an Adapter, and the name of the top package"
        )
    _adapters[library] = adapter
    library_of.cache_clear()


@cache
def library_of(kind: type) -> str | None:
    """Returns the library with an adapter that a class comes from, or the first of its bases that has one."""
    names = (base.__module__.partition(".")[0] for base in kind.__mro__)
    return next((name for name in names if name in _adapters), None)


def adapter_of(module: nn.Module) -> Adapter | None:
    """Returns the adapter for a module of another library; None if there is none."""
    kind: type = type(module)
    library = library_of(kind)
    if library is None:
        return None
    if _adapters[library] is None:
        _adapters[library] = import_module(f"{__name__}.{library}").ADAPTER
    return _adapters[library]


def adapt(module: nn.Module, name: str) -> StepNeuron | None:
    """Returns the module as a site needs it; None if it is no spiking module of another library, or `derived`.

    Raises UsageError, with the reason, for a spiking module that cannot be trained, and for a threshold that is no
    tensor.
    """
    found = adapted(module)
    kind: type = type(module)
    if isinstance(found, str):
        if of_users(kind):
            return None
        raise UsageError(f"{name} is a {library_of(kind)} {kind.__name__}: {found}")
    if found is not None and type(found) not in _with_tensors and not isinstance(found.threshold, Tensor):
        raise UsageError(
            f"the adapter of {library_of(kind)} gives {name} a {type(found.threshold).__name__} as threshold; "
            "it must be a tensor, as from torch.as_tensor"
        )
    if found is not None:
        _with_tensors.add(type(found))
    return found


def adapted(module: nn.Module) -> StepNeuron | str | None:
    """Returns the module as a neuron, the reason why it cannot be trained as one, or None if it does not spike."""
    adapter = adapter_of(module)
    found = None if adapter is None else adapter.adapt(module)
    return found.unsupported() or found if isinstance(found, StepNeuron) else found


def of_users(kind: type) -> bool:
    """Returns whether a class is a user's own, though it may derive from a library's."""
    return kind.__module__.partition(".")[0] not in _adapters


def derived(module: nn.Module) -> bool:
    """Returns whether a module is a neuron of a user's own class that derives from a library's neuron, in a way that
    its adapter does not know. Such a neuron is a black box, whose surrogate gradient is not asked for."""
    return of_users(type(module)) and isinstance(adapted(module), str)


def couples(module: nn.Module) -> bool:
    """Returns whether a module of another library, in training mode, couples the rows of a batch or draws noise."""
    adapter = adapter_of(module)
    return adapter is not None and adapter.couples(module)


@contextmanager
def fresh_state(model: nn.Module) -> Iterator[None]:
    """Within this context, the model starts from its initial state, which the adapters of its modules restore."""
    found = {id(adapter): adapter for module in modules_in(model) if (adapter := adapter_of(module)) is not None}
    with ExitStack() as stack:
        for adapter in found.values():
            stack.enter_context(adapter.fresh_state(model))
        yield


__all__ = [
    "Adapter",
    "BlackBox",
    "State",
    "Step",
    "StepNeuron",
    "adapt",
    "adapted",
    "adapter_of",
    "copies_of_state",
    "couples",
    "current_of",
    "derived",
    "detached",
    "fresh_state",
    "libraries",
    "register",
    "replaced",
    "with_current",
]
