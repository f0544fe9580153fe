"""The adapter of Rockpool. Its layers fire by functions of autograd, which `model.place_search` finds, so that only
their states are left: they stay in buffers from call to call."""

from collections.abc import Iterator
from contextlib import contextmanager

from rockpool.nn.modules import TorchModule
from torch import Tensor, nn

from ulr_snn.adapters.base import Adapter


@contextmanager
def initial_states(model: nn.Module) -> Iterator[None]:
    """Within this context, all modules start from their initial states. Afterwards they have those of before."""
    modules = [module for module in nn.Module.modules(model) if isinstance(module, TorchModule)]
    kept = [(module, module.state()) for module in modules]
    try:
        for module in modules:
            module.reset_state()
        yield
    finally:
        for module, states in kept:
            for name, state in states.items():
                if isinstance(state, Tensor):  # others are states of inner modules
                    setattr(module, name, state)


def drops(module: nn.Module) -> bool:
    """Returns whether a module is dropout. Rockpool's classes are no subclasses of torch's."""
    return "Dropout" in type(module).__name__


ADAPTER = Adapter(lambda _: None, fresh_state=initial_states, couples=drops)
