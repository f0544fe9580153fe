"""Spiking modules of other libraries. A library is imported only if a model has a module of it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from torch import nn

from ulr_snn.adapters.base import Step, StepNeuron
from ulr_snn.adapters.blackbox import BlackBox, copies_of_state, current_of, detached, replaced, with_current
from ulr_snn.errors import UsageError

LIBRARIES = ("snntorch", "norse", "spikingjelly")


def adapt(module: nn.Module, name: str) -> StepNeuron | None:
    """The module as a site needs it; None if it is none of another library's spiking modules.

    Raises UsageError for a spiking module that cannot be trained, with the reason.
    """
    for kind in type(module).__mro__:
        library = kind.__module__.partition(".")[0]
        if library in LIBRARIES:
            found = import_module(f"ulr_snn.adapters.{library}").adapt(module)
            reason = None if found is None else found if isinstance(found, str) else found.unsupported()
            if reason is not None:
                raise UsageError(f"{name} is a {library} {type(module).__name__}: {reason}")
            return found
    return None


@contextmanager
def fresh_memories(model: nn.Module) -> Iterator[None]:
    """SpikingJelly's modules with memories, those that do not fire (dropout, synapses) too: for a while they start
    anew, and then they are as they were."""
    modules = [module for module in model.modules() if "_memories_rv" in module.__dict__]
    kept = [dict(module._memories) for module in modules]
    try:
        for module in modules:
            module._memories.update(copy.deepcopy(module._memories_rv))
        yield
    finally:
        for module, memories in zip(modules, kept, strict=True):
            module._memories.update(memories)


__all__ = [
    "LIBRARIES",
    "BlackBox",
    "Step",
    "StepNeuron",
    "adapt",
    "copies_of_state",
    "current_of",
    "detached",
    "fresh_memories",
    "replaced",
    "with_current",
]
