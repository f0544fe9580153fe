"""Spiking modules of other libraries. A library is imported only if a model has a module of it."""

from importlib import import_module

from torch import nn

from ulr_snn.adapters.base import Step, StepNeuron
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


__all__ = ["LIBRARIES", "Step", "StepNeuron", "adapt"]
