"""Stateless modules on many rows on a CPU, faster than torch's within a training step.

Spikes are sparse, and the cost of a linear layer here is proportional to the number of spikes (see sparse.py).
Convolutions process a block of rows at a time. For all time steps of a batch at once, torch's convolution needs several
times the memory of its input and requests it from the system at every call, which can take longer than the convolution.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.kernels.pool import blocks, by_blocks, empty, in_step
from ulr_snn.kernels.sparse import few, linear, wanted

KINDS = ("forward", "forward_pre", "backward", "backward_pre")
OF_ALL = [getattr(nn.modules.module, f"_global_{kind}_hooks") for kind in KINDS]  # hooks of all modules
PLAIN = (Tensor, nn.Parameter)
LEAST = 32  # least outputs of a linear layer for which the search for non-zero inputs pays


def run(module: nn.Module, x: Tensor) -> Any:
    """Returns module(x). Within a training step, functions in `OWN` replace torch's code, also in a Sequential."""
    if not in_step() or type(module) not in OWN or _changed(module):
        return module(x)
    found = OWN[type(module)](module, x)
    return module(x) if found is None else found


def _changed(module: nn.Module) -> bool:
    """Returns whether a call of a module runs more than its class's forward, or in reduced precision."""
    own = vars(module)
    hooked = any(own[f"_{kind}_hooks"] for kind in KINDS) or any(hooks for hooks in OF_ALL)
    compiled = module._compiled_call_impl is not None
    return hooked or compiled or "forward" in own or torch.is_autocast_enabled("cpu")


def _usual(module: nn.Linear | nn.Conv2d, x: Tensor) -> bool:
    """Returns whether input and parameters are plain dense float32 tensors on a CPU."""
    tensors = x, module.weight, module.bias
    return not torch._C._are_functorch_transforms_active() and all(
        q is None or (type(q) in PLAIN and q.dtype == torch.float32 and q.layout == torch.strided and q.is_cpu)
        for q in tensors
    )


def _sequential(module: nn.Sequential, x: Tensor) -> Any:
    for part in module:
        x = run(part, x)
    return x


# -- linear ------------------------------------------------------------------------------------------------


def _linear(module: nn.Linear, x: Tensor) -> Tensor | None:
    if not _usual(module, x) or x.shape[-1:] != module.weight.shape[1:] or len(module.weight) < LEAST:
        return None
    flat = x.reshape(-1, x.shape[-1])
    rows = few(flat)
    if rows is None:
        return None
    return linear(rows, module.weight, module.bias, flat).view(*x.shape[:-1], len(module.weight))


# -- convolution -------------------------------------------------------------------------------------------


def _convolution(module: nn.Conv2d, x: Tensor) -> Tensor | None:
    padded = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if not _usual(module, x) or x.ndim != 4 or not padded or len(blocks(len(x), math.prod(x.shape[1:]))) < 2:
        return None
    options = module.stride, module.padding, module.dilation, module.groups
    return _Convolution.apply(x, module.weight, module.bias, options)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = options
        return by_blocks(lambda rows: torch.conv2d(rows, weight, bias, *options), x, math.prod(x.shape[1:]))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (stride, padding, dilation, groups), which = ctx.options, wanted(ctx)

        def gradients(rows: slice) -> tuple[Any, ...]:
            options = [len(weight)], stride, padding, dilation, False, [0, 0], groups, which
            return torch.ops.aten.convolution_backward(g[rows], x[rows], weight, *options)

        if torch.is_grad_enabled():  # the gradient has to be differentiable
            return *gradients(slice(None)), None
        d_x = empty(*x.shape) if which[0] else None
        sums: list[Tensor | None] = [None, None]
        for rows in blocks(len(x), math.prod(x.shape[1:])):
            found = gradients(rows)
            if d_x is not None:
                d_x[rows] = found[0]
            sums = [new if old is None else old.add_(new) for old, new in zip(sums, found[1:], strict=True)]
        return d_x, *sums, None


OWN: dict[type, Callable[..., Any]] = {nn.Sequential: _sequential, nn.Linear: _linear, nn.Conv2d: _convolution}
