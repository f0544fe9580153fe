"""A linear layer and a convolution for sparse events, in float32 on a CPU. Their cost is proportional to the events.

The convolution scatters: for each event, it adds a patch of the kernel to the outputs around the event's place. All
patches of one convolution have the same size, with zeros where the stride skips a weight, so that the loop over a patch
does not branch. The outputs are part of a grid that is large enough for all patches.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ulr_snn.kernels import dispatch
from ulr_snn.kernels.layout import channels_last, layout_is_free, stored
from ulr_snn.kernels.limits import limits
from ulr_snn.kernels.pool import empty
from ulr_snn.kernels.team import shared, summed

WIDTH = 4  # vector width of the convolution's kernels, to a multiple of which channels are padded
COLUMNS = 64, 256  # least and most outputs in a block of a product
CACHE = 1 << 19  # bytes of the weights in such a block

Pair = tuple[int, int]


@dataclass
class Rows:
    """Events in rows [n, inputs]. Row r has the events starts[r] to starts[r + 1], at `places`, of size `values`."""

    starts: Tensor
    places: Tensor
    values: Tensor
    inputs: int

    @classmethod
    def of(cls, frames: Tensor, most: float = math.inf) -> "Rows | None":
        """Lists the events in frames [n, inputs] on a CPU. Returns None, before listing, for more than `most`."""
        frames = frames.detach().contiguous()
        frames = frames.view(torch.uint8) if frames.dtype == torch.bool else frames
        cpu = dispatch.cpu_kernels()
        starts = torch.zeros(len(frames) + 1, dtype=torch.int64)
        counts, rows = starts[1:].numpy(), frames.numpy()
        shared(len(rows), lambda first, end: cpu.count(first, end, rows, counts))
        starts = starts.cumsum(0)
        if starts[-1] > most:
            return None
        places, values = (torch.empty(int(starts[-1]), dtype=dtype) for dtype in (torch.int32, torch.float32))
        found = rows, starts.numpy(), places.numpy(), values.numpy()
        shared(len(rows), lambda first, end: cpu.collect(first, end, *found))
        return cls(starts, places, values, frames.shape[1])

    def product(self, g: Tensor) -> Tensor:
        """Returns g^T x [outputs, inputs] for g [n, outputs] and these events x."""
        out = empty(g.shape[1], self.inputs)
        cpu, given = dispatch.cpu_kernels(), (*self.arrays, g.detach().contiguous().numpy(), self.inputs)
        flat, blocks = out.flatten().numpy(), -(-g.shape[1] // cpu.BLOCK)
        shared(blocks, lambda first, end: cpu.scatter(first, end, *given, flat))
        return out

    @property
    def arrays(self) -> tuple[Any, ...]:
        return self.starts.numpy(), self.places.numpy(), self.values.numpy()


def few(x: Tensor) -> Rows | None:
    """Returns the events of x [n, inputs]; None if no kernel applies, or if there are too many events to be faster."""
    if x.numel() < limits.fewest or dispatch.kernels(x) is None:
        return None
    return Rows.of(x, limits.density * x.numel())


def product(g: Tensor, x: Tensor) -> Tensor:
    """Returns g^T x [outputs, inputs] for g [n, outputs] and x [n, inputs]. If x is sparse and a kernel applies, the
    cost is proportional to the events."""
    rows = few(x) if x.dtype == g.dtype else None
    return g.T @ x if rows is None else rows.product(g)


def gathered(rows: Rows, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns x W^T + b [n, outputs] for events x in rows [n, inputs]."""
    out = empty(len(rows.starts) - 1, len(weight))
    start = torch.zeros(len(weight), dtype=torch.float32) if bias is None else bias.detach()
    cpu, (least, most) = dispatch.cpu_kernels(), COLUMNS
    together = min(max(CACHE // (4 * max(1, rows.inputs)), least), most)
    blocks = max(1, -(-len(weight) // together))
    width = max(1, -(-len(weight) // (cpu.LINE * blocks))) * cpu.LINE
    columns = dispatch.in_columns(weight, width).numpy()
    given = *rows.arrays, columns, rows.inputs, start.contiguous().numpy(), out.numpy(), width
    shared(len(out), lambda first, end: cpu.gather(first, end, *given))
    return out


def asked_for(node: Any) -> bool:
    """Returns whether the current backward pass needs the gradient that goes on to a node. `needs_input_grad` tells
    only whether a gradient exists."""
    asks = getattr(torch._C, "_will_engine_execute_node", None)  # torch has no public function for this question
    leaf = hasattr(node, "variable")  # torch does not answer for leaves
    return asks is None or leaf or asks(node)


def wanted(ctx: Any) -> list[bool]:
    """Returns which gradients of input, weight and bias a backward pass has to compute."""
    found = list(ctx.needs_input_grad[:3])
    found[0] = found[0] and asked_for(ctx.next_functions[0][0])
    return found


class _Linear(torch.autograd.Function):
    """x W^T + b for events in rows. x: the events as a tensor, or None."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, rows: Any) -> Tensor:
        ctx.save_for_backward(x, None if x is None else weight)  # a weight that is not saved may change in place
        ctx.rows = rows
        return gathered(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Any) -> tuple[Any, ...]:
        (x, weight), (of_x, of_weight, of_bias) = ctx.saved_tensors, wanted(ctx)
        again = torch.is_grad_enabled() and x is not None  # the gradient has to be differentiable
        d_weight = None if not of_weight else g.T @ x if again else ctx.rows.product(g)
        return g @ weight if of_x else None, d_weight, g.sum(0) if of_bias else None, None


def linear(rows: Rows, weight: Tensor, bias: Tensor | None, x: Tensor | None = None) -> Tensor:
    """Returns x W^T + b [n, outputs] for events in rows [n, inputs]. x: the events as a tensor, if it may need a
    gradient."""
    return _Linear.apply(x, weight, bias, rows)


# -- convolution -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """One axis of a convolution. The grid has `grid` places, and the outputs begin at place `lead`. Input i adds patch
    phase[i], of length `reach`, to the grid at first[i]. Weight k is in patch at[k] at place[k]."""

    outputs: int
    reach: int
    lead: int
    grid: int
    first: Tensor
    phase: Tensor
    at: Tensor
    place: Tensor

    @classmethod
    def of(cls, inputs: int, kernel: int, stride: int, padding: int, dilation: int) -> "Axis":
        """Makes the axis. Weight k connects input i to output (i + padding - k dilation) / stride if it is whole."""
        outputs = (inputs + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        reach = dilation * (kernel - 1) // stride + 1
        lead = max(0, reach - 1 - padding // stride)
        arriving = torch.arange(inputs) + padding
        last, phase = arriving.div(stride, rounding_mode="floor"), arriving % stride
        grid = lead + max(outputs, int(last[-1]) + 1)
        offsets = dilation * torch.arange(kernel)
        place = reach - 1 - offsets.div(stride, rounding_mode="floor")
        return cls(outputs, reach, lead, grid, last - (reach - 1) + lead, phase, offsets % stride, place)


@dataclass(frozen=True)
class Patches:
    """The layout of a convolution's patches [C, phases, phases, reach, reach, wide]. Input j [C * H * W] adds the patch
    at flat index which[j] to the grid at flat index to[j]."""

    high: Axis
    across: Axis
    strides: Pair
    channels: int
    wide: int
    which: Tensor
    to: Tensor

    @classmethod
    def of(cls, frame: torch.Size, outputs: int, kernel: Pair, stride: Pair, *geometry: Pair) -> "Patches":
        """Makes the layout. frame: [C, H, W]; geometry: padding and dilation."""
        each = zip(frame[1:], kernel, stride, *geometry, strict=True)
        high, across = (Axis.of(*arguments) for arguments in each)
        wide = -(-outputs // WIDTH) * WIDTH
        channel = torch.arange(frame[0])[:, None, None] * math.prod(stride)
        which = channel + high.phase[:, None] * stride[1] + across.phase
        to = (high.first[:, None] * across.grid + across.first).expand(frame)
        which, to = which * (high.reach * across.reach * wide), to * wide
        return cls(high, across, stride, frame[0], wide, which.flatten().int(), to.flatten().int())

    @property
    def fits(self) -> bool:
        """True if the convolution has an output."""
        return self.high.outputs > 0 and self.across.outputs > 0

    @property
    def size(self) -> tuple[int, ...]:
        return self.channels, *self.strides, self.high.reach, self.across.reach, self.wide

    @property
    def weights(self) -> tuple[Any, ...]:
        """Index of the weights [C, kernel, kernel] in the patches."""
        high, across = self.high, self.across
        return slice(None), high.at[:, None], across.at, high.place[:, None], across.place

    @property
    def steps(self) -> tuple[int, ...]:
        """Number of lines in a patch, length of a line, step between lines in the grid, and start of the outputs in the
        grid."""
        high, across, wide = self.high, self.across, self.wide
        step = across.grid * wide
        return high.reach, across.reach * wide, step, high.lead * step + across.lead * wide

    def made(self, weight: Tensor) -> Tensor:
        """Returns the patches of a weight [outputs, C, kernel, kernel]."""
        patches = torch.zeros(self.size, dtype=torch.float32)
        patches[(*self.weights, slice(len(weight)))] = weight.detach().permute(1, 2, 3, 0)
        return patches

    def taken(self, patches: Tensor, outputs: int) -> Tensor:
        """Returns the weight [outputs, C, kernel, kernel] of flat patches."""
        return patches.view(self.size)[(*self.weights, slice(outputs))].permute(3, 0, 1, 2).contiguous()


class _Convolution(torch.autograd.Function):
    """Convolution of events, [n, outputs, ...], with a gradient only for weight and bias."""

    @staticmethod
    def forward(ctx: Any, weight: Any, bias: Any, rows: Any, patches: Any) -> Tensor:
        ctx.rows, ctx.patches = rows, patches
        n, outputs, (high, across) = len(rows.starts) - 1, len(weight), (patches.high, patches.across)
        shape, last = (n, outputs, high.outputs, across.outputs), layout_is_free()
        out = empty(*shape, last=last)
        start = torch.zeros(patches.wide, dtype=torch.float32)
        if bias is not None:
            start[:outputs] = bias.detach()
        blank = start.repeat(high.grid * across.grid)
        cpu, places = dispatch.cpu_kernels(), (patches.to.numpy(), patches.which.numpy())
        given = *rows.arrays, *places, patches.made(weight).flatten().numpy(), blank.numpy()
        arguments = patches.steps, patches.wide, shape, last, stored(out, last).flatten().numpy()
        shared(n, lambda first, end: cpu.spread(first, end, *given, *arguments))
        return out

    @staticmethod
    def backward(ctx: Any, g: Any) -> tuple[Any, ...]:
        rows, patches = ctx.rows, ctx.patches
        d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            last = channels_last(g)
            cpu, given = dispatch.cpu_kernels(), (*rows.arrays, patches.to.numpy(), patches.which.numpy())
            arguments = patches.steps, patches.wide, patches.high.grid * patches.across.grid, tuple(g.shape), last
            flat = stored(g.detach(), last).contiguous().flatten().numpy()
            add = lambda first, end, out: cpu.spread_weight(first, end, *given, out, *arguments, flat)  # noqa: E731
            d_weight = patches.taken(summed(len(g), patches.size, add), g.shape[1])
        if ctx.needs_input_grad[1]:
            d_bias = g.sum((0, 2, 3))
        return d_weight, d_bias, None, None


def pair(value: Any) -> Pair | None:
    """Returns an option of a convolution as (high, across); None for any other value."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    if len(values) not in (1, 2) or not all(isinstance(item, int) for item in values):
        return None
    return values[0], values[-1]


@lru_cache(maxsize=64)
def patches_of(frame: torch.Size, weight: torch.Size, *geometry: Pair) -> Patches | None:
    """Returns the patches for events [C, H, W] and a weight [outputs, C, kernel, kernel]; None if the convolution is
    impossible. geometry: stride, padding and dilation."""
    possible = weight[1] == frame[0] and 0 not in (*frame, *weight)
    stride, padding, dilation = geometry
    if not possible or min(*stride, *dilation) < 1 or min(padding) < 0:
        return None
    patches = Patches.of(frame, weight[0], (weight[2], weight[3]), *geometry)
    return patches if patches.fits else None


def geometry(
    kernel: torch.Size, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> tuple[Pair, Pair, Pair] | None:
    """Returns stride, padding and dilation of a convolution in pairs; None if it has groups or unequal padding."""
    stride, dilation = pair(stride), pair(dilation)
    if padding == "valid":
        padding = 0
    if padding == "same" and dilation:
        total = [d * (size - 1) for d, size in zip(dilation, kernel, strict=True)]
        padding = None if any(size % 2 for size in total) else [size // 2 for size in total]
    padding = pair(padding)
    return None if groups != 1 or None in (stride, padding, dilation) else (stride, padding, dilation)


def convolution(
    frame: torch.Size, rows: Rows, weight: Tensor, bias: Tensor | None, *options: Any, **named: Any
) -> Tensor | None:
    """Returns the convolution [n, outputs, ...] of events in rows of frames [C, H, W]; None if it is not supported, or
    if a dense one is faster. options: as for torch.conv2d."""
    arguments = geometry(weight.shape[2:], *options, **named)
    patches = None if arguments is None else patches_of(frame, weight.shape, *arguments)
    if patches is None:
        return None
    density = len(rows.places) / max(1, (len(rows.starts) - 1) * rows.inputs)
    numbers = math.prod(patches.size[1:5])  # numbers of a patch in all its phases; a dense kernel has its own size
    if density * numbers > limits.share * math.prod(weight.shape[2:]):
        return None
    return _Convolution.apply(weight, bias, rows, patches)
