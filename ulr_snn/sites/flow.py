"""The flow of a model: which of its parts learn how, as in `ULR(flow={name: "ulr" | "backprop" | "frozen"})`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.errors import UsageError
from ulr_snn.kernels.walk import parameters_in
from ulr_snn.noise.kinds import WeightNoise
from ulr_snn.sites.binding import Layers, inside, spiking_layers, turn
from ulr_snn.sites.weights import named

HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")  # attributes of a tensor with its hooks, by number
FLOWS = ("ulr", "backprop", "frozen")


def check_flow(model: nn.Module, flow: Mapping[str, str], layers: Layers | None = None) -> None:
    """Raises UsageError for a name that the model does not have, or for a part marked "backprop" in which a layer
    fires, or if everything is frozen."""
    known = {name for name, _ in (*model.named_modules(), *model.named_parameters()) if name}
    layers = spiking_layers(model) if layers is None else layers
    for name, kind in flow.items():
        if name not in known:
            raise UsageError(f"ULR got a flow for {name!r}, which is no module or parameter of the model")
        firing = [site for site, _ in layers if inside(site, name)]
        if kind == "backprop" and firing:
            raise UsageError(
                f"ULR got flow='backprop' for {name!r}, in which {firing[0]} fires or cuts the graph, and no "
                "derivative passes a spike; mark its differentiable parts alone"
            )
    held = [name for name, kind in flow.items() if kind == "frozen"]
    learning = [name for name, q in model.named_parameters() if q.requires_grad] if held else []
    if learning and all(named(name, held) for name in learning):
        raise UsageError("ULR got a flow that freezes every trainable parameter of the model; leave some out")


def with_flow(model: nn.Module, flow: Mapping[str, str], noise: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `noise` with the additions of the flow: weight noise on parts marked "ulr" in which nothing fires, and no
    noise on parts marked "backprop"."""
    sites = [name for name, _ in spiking_layers(model)]
    trainable = [name for name, q in model.named_parameters() if q.requires_grad]
    found = dict(noise)
    for name, kind in flow.items():
        if not any(inside(q, name) for q in trainable):
            continue
        if kind == "backprop":
            found.setdefault(name, None)
        if kind == "ulr" and not any(inside(site, name) for site in sites):
            found.setdefault(name, WeightNoise())
    return found


@contextmanager
def frozen(model: nn.Module, flow: Mapping[str, str]) -> Iterator[None]:
    """Within this context, parameters of parts marked "frozen" require no gradient, and their modules are in evaluation
    mode. Other threads wait for the model."""
    with turn(model):
        names = [name for name, kind in flow.items() if kind == "frozen"]
        parts = (model.named_parameters(), model.named_modules()) if names else ((), ())
        held = [q for key, q in parts[0] if q.requires_grad and named(key, names)]
        still = [module for key, module in parts[1] if module.training and named(key, names)]
        try:
            for q in held:
                q.requires_grad_(False)
            for module in still:
                module.training = False
            yield
        finally:
            for q in held:
                q.requires_grad_(True)
            for module in still:
                module.training = True


@contextmanager
def hooks_once(model: nn.Module) -> Iterator[None]:
    """Within this context, hooks of parameters do not run. At its end they run once, with the gradient that a step has
    added in several backward passes or without one, as after the backward pass of a loss. A hook may change it, or
    make an optimizer step."""
    # Torch has no public way to hold hooks back. It looks into these dictionaries before each call of a hook.
    kept = []
    for q in parameters_in(model):
        hooks = [found for name in HOOKS if q.requires_grad and (found := getattr(q, name, None))]
        kept += [(q, q.grad, [(found, dict(found)) for found in hooks])] if hooks else []
    added: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for q, _, hooks in kept:
            q.grad = None
            for found, _ in hooks:
                found.clear()
        yield
        added = [(q, q.grad) for q, *_ in kept if q.grad is not None]
    finally:
        for q, before, hooks in kept:
            q.grad = before
            for found, own in hooks:
                found.update(own)
    if added:
        torch.autograd.backward([q for q, _ in added], [gradient for _, gradient in added])
