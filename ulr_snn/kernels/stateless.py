"""Stateless modules on many rows on a CPU, faster than torch's within a training step.

Spikes are sparse, and the cost of a linear layer here is proportional to the number of spikes (see sparse.py).
Convolutions process a block of rows at a time. For all time steps of a batch at once, torch's convolution needs several
times the memory of its input and requests it from the system at every call, which can take longer than the convolution.
Their outputs have channels last where the layout is free. Then torch's convolutions, norms and averages take less time,
some a third.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.kernels.layout import laid, layout_is_free
from ulr_snn.kernels.limits import limits
from ulr_snn.kernels.pool import blocks, by_blocks, empty_like, in_step
from ulr_snn.kernels.sparse import few, linear, wanted
from ulr_snn.kernels.walk import modules_in

KINDS = ("forward", "forward_pre", "backward", "backward_pre")
OF_ALL = [getattr(nn.modules.module, f"_global_{kind}_hooks") for kind in KINDS]  # hooks of all modules
PLAIN = (Tensor, nn.Parameter)
USUAL = nn.Conv2d._conv_forward
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


def _usual(*tensors: Tensor | None) -> bool:
    """Returns whether input and parameters are plain dense float32 tensors on a CPU."""
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
    weight = module.weight
    if not _usual(x, weight, module.bias) or x.shape[-1:] != weight.shape[1:] or len(weight) < LEAST:
        return None
    flat = x.reshape(-1, x.shape[-1])
    rows = few(flat)
    if rows is None:
        return None
    return linear(rows, weight, module.bias, flat).view(*x.shape[:-1], len(weight))


# -- convolution -------------------------------------------------------------------------------------------


@contextmanager
def quick_convolutions(model: nn.Module) -> Iterator[None]:
    """Within this context, `convolution` runs in all convolutions of a model that compute as torch's do."""
    modules = [m for m in modules_in(model) if isinstance(m, nn.Conv2d) and m._conv_forward == MethodType(USUAL, m)]
    for module in modules:
        vars(module)["_conv_forward"] = partial(convolution, module)
    try:
        yield
    finally:
        for module in modules:
            vars(module).pop("_conv_forward", None)


def convolution(module: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes `Conv2d._conv_forward`, in a training step in blocks of rows, and with channels last where it may."""
    if not in_step() or torch.is_autocast_enabled("cpu") or x.ndim != 4 or not _usual(x, weight, bias):
        return USUAL(module, x, weight, bias)
    last = layout_is_free() and x.shape[3] // module.stride[1] > limits.narrow
    if last and x.shape[1] == 1 and not x.requires_grad:  # whose layout only the strides tell
        x = x.contiguous().as_strided(x.shape, (x.shape[2] * x.shape[3], 1, x.shape[3], 1))
    elif layout_is_free():
        x = laid(x, last)
    padded = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if not padded or len(blocks(len(x), math.prod(x.shape[1:]))) < 2:
        return USUAL(module, x, weight, bias)
    options = module.stride, module.padding, module.dilation, module.groups
    return _Convolution.apply(x, weight, bias, options)


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
        d_x = empty_like(x) if which[0] else None
        sums: list[Tensor | None] = [None, None]
        for rows in blocks(len(x), math.prod(x.shape[1:])):
            found = gradients(rows)
            if d_x is not None:
                d_x[rows] = found[0]
            sums = [new if old is None else old.add_(new) for old, new in zip(sums, found[1:], strict=True)]
        return d_x, *sums, None


OWN: dict[type, Callable[..., Any]] = {nn.Sequential: _sequential, nn.Linear: _linear}
