"""The adapter of sinabs. Its layers fire by functions of autograd, which `model.place_search` finds, so that only their
states are left: they stay in buffers from call to call."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from sinabs.layers import SqueezeMixin, StatefulLayer
from torch import nn

from ulr_snn.adapters.base import Adapter, put_back


@contextmanager
def no_states(model: nn.Module) -> Iterator[None]:
    """Within this context, all layers start without a state, as new ones do. Afterwards they are as before."""
    layers = [module for module in model.modules() if isinstance(module, StatefulLayer)]
    kept = [(dict(layer.__dict__), dict(layer._buffers)) for layer in layers]
    try:
        for layer in layers:
            layer._buffers.update({name: torch.zeros(0, device=b.device) for name, b in layer._buffers.items()})
        yield
    finally:
        for layer, (attributes, buffers) in zip(layers, kept, strict=True):
            put_back(layer.__dict__, attributes)
            put_back(layer._buffers, buffers)


def adapt(module: nn.Module) -> str | None:
    """Returns why a layer cannot be trained, or None: places in its code are found by themselves."""
    if isinstance(module, SqueezeMixin) and module.num_timesteps < 0:
        return f"it has batch_size={module.batch_size}, and some passes run few samples; give it num_timesteps instead"
    return None


ADAPTER = Adapter(adapt, fresh_state=no_states)
