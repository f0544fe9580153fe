"""Stateless modules on many rows on a CPU, within a training step, where torch's own are slow.

Spikes are sparse: a linear layer that reads few of them costs in proportion to them (see sparse.py). And convolutions
go through a block of rows at a time: for all time steps of a batch at once torch's own takes several times the memory
of its input, which goes back to the system and comes again at every call. That can take longer than the convolution.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.kernels.pool import blocks, by_blocks, empty, in_step
from ulr_snn.kernels.sparse import few, linear, wanted

KINDS = ("forward", "forward_pre", "backward", "backward_pre")
OF_ALL = [getattr(nn.modules.module, f"_global_{kind}_hooks") for kind in KINDS]  # of all modules there are
PLAIN = (Tensor, nn.Parameter)
LEAST = 32  # outputs of a linear layer, below which it costs more to look for what is sparse


def run(module: nn.Module, x: Tensor) -> Any:
    """What a module gives for x; within a training step by what is in `OWN`, a Sequential's modules one after
    another."""
    if not in_step() or type(module) not in OWN or _changed(module):
        return module(x)
    found = OWN[type(module)](module, x)
    return module(x) if found is None else found


def _changed(module: nn.Module) -> bool:
    """Whether there is more to a call of a module than what its class does, or another precision."""
    own = vars(module)
    hooked = any(own[f"_{kind}_hooks"] for kind in KINDS) or any(hooks for hooks in OF_ALL)
    compiled = module._compiled_call_impl is not None
    return hooked or compiled or "forward" in own or torch.is_autocast_enabled("cpu")


def _usual(module: nn.Module, x: Tensor) -> bool:
    """Whether this is all in dense float32 on a CPU, and torch's own."""
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
    about = module.stride, module.padding, module.dilation, module.groups
    return _Convolution.apply(x, module.weight, module.bias, about)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, about: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.about = about
        return by_blocks(lambda rows: torch.conv2d(rows, weight, bias, *about), x, math.prod(x.shape[1:]))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (stride, padding, dilation, groups), which = ctx.about, wanted(ctx)

        def gradients(rows: slice) -> tuple[Tensor | None, ...]:
            about = [len(weight)], stride, padding, dilation, False, [0, 0], groups, which
            return torch.ops.aten.convolution_backward(g[rows], x[rows], weight, *about)

        if torch.is_grad_enabled():  # this is to be differentiated itself
            return *gradients(slice(None)), None
        d_x, sums = empty(*x.shape) if which[0] else None, [None, None]
        for rows in blocks(len(x), math.prod(x.shape[1:])):
            found = gradients(rows)
            if d_x is not None:
                d_x[rows] = found[0]
            sums = [new if old is None else old.add_(new) for old, new in zip(sums, found[1:], strict=True)]
        return d_x, *sums, None


OWN = {nn.Sequential: _sequential, nn.Linear: _linear, nn.Conv2d: _convolution}
