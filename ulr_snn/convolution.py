"""Convolutions of many rows on a CPU, a block of them at a time.

For all time steps of a batch at once torch's own takes several times the memory of its input, which goes back to the
system and comes from it again at every call: that can take longer than the convolution.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ulr_snn.scan.memory import blocks, empty, in_step


def applied(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """What modules give for rows x [n, ...], one after another."""
    for module in modules:
        x = in_blocks(module, x) if type(module) is nn.Conv2d and _fits(module, x) else module(x)
    return x


def in_blocks(module: nn.Conv2d, x: Tensor) -> Tensor:
    about = module.stride, module.padding, module.dilation, module.groups
    return _Convolution.apply(x, module.weight, module.bias, about)


def _fits(module: nn.Conv2d, x: Tensor) -> bool:
    """Whether rows are many, in a training step, and nothing but torch's convolution itself is asked for."""
    plain = type(x) is Tensor and x.ndim == 4 and x.shape[1] == module.in_channels and x.dtype == torch.float32
    if not plain or not in_step() or x.device.type != "cpu" or len(blocks(len(x), math.prod(x.shape[1:]))) < 2:
        return False
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    known = "forward" not in vars(module) and not any(hooks) and module.weight.dtype == torch.float32
    padded = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return known and padded and not torch.is_autocast_enabled("cpu") and torch.is_tensor(module.weight)


def _asked_for(node: Any) -> bool:
    """Whether what goes on to a node is asked for; `needs_input_grad` tells only what could be."""
    asks = getattr(torch._C, "_will_engine_execute_node", None)
    leaf = hasattr(node, "variable")  # of which torch does not tell
    return asks is None or leaf or asks(node)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, about: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.about, out = about, None
        for rows in blocks(len(x), math.prod(x.shape[1:])):
            block = torch.conv2d(x[rows], weight, bias, *about)
            out = empty(len(x), *block.shape[1:]) if out is None else out
            out[rows] = block
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (stride, padding, dilation, groups), wanted = ctx.about, list(ctx.needs_input_grad[:3])
        wanted[0] = wanted[0] and _asked_for(ctx.next_functions[0][0])
        d_x, sums = empty(*x.shape) if wanted[0] else None, [None, None]
        for rows in blocks(len(x), math.prod(x.shape[1:])):
            found = torch.ops.aten.convolution_backward(
                g[rows], x[rows], weight, [len(weight)], stride, padding, dilation, False, [0, 0], groups, wanted
            )
            if d_x is not None:
                d_x[rows] = found[0]
            sums = [new if old is None else old.add_(new) for old, new in zip(sums, found[1:], strict=True)]
        return d_x, *sums, None
