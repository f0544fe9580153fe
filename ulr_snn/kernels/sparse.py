"""Layers that read sparse events, in float32 on a CPU: a linear one and a convolution, whose cost goes with the events.

A convolution scatters: around the place that an event reaches, it adds a patch of the kernel to the outputs. Patches
of one convolution are all of one size, zeros in them where the stride leaves a weight out, so that the loop over them
does not branch; and the outputs are a grid with room for all of them, of which the edges are left away.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ulr_snn.kernels import dispatch
from ulr_snn.kernels.pool import empty

WIDTH = 4  # of the vectors that the kernels of a convolution work with: channels are filled up to a multiple
COLUMNS = 64, 256  # outputs of a product that are gone through at once: between these,
CACHE = 1 << 19  # and as many as have weights of so many bytes
DENSITY = 0.1  # of inputs that are not zero, beyond which a dense product is the faster one
FEWEST = 1 << 16  # inputs, below which it hardly matters
SHARE = 0.1  # of a dense convolution's multiply-adds: with more than that (measured: 0.08 to above 0.2) it is faster

Pair = tuple[int, int]


@dataclass
class Rows:
    """Events in rows [n, inputs]: row r has those from starts[r] to starts[r + 1], at `places`, of size `values`."""

    starts: Tensor
    places: Tensor
    values: Tensor
    inputs: int

    @classmethod
    def of(cls, frames: Tensor, most: float = math.inf) -> "Rows | None":
        """Those in frames [n, inputs] on a CPU; None where there are more than `most`, which is seen before they are
        listed."""
        frames = frames.detach().contiguous()
        frames = frames.view(torch.uint8) if frames.dtype == torch.bool else frames
        cpu = dispatch.kernels(torch.empty(0, dtype=torch.float32))
        starts = torch.zeros(len(frames) + 1, dtype=torch.int64)
        counts, rows = starts[1:].numpy(), frames.numpy()
        dispatch.shared(len(rows), lambda first, end: cpu.count(first, end, rows, counts))
        starts = starts.cumsum(0)
        if starts[-1] > most:
            return None
        places, values = (
            torch.empty(int(starts[-1]), dtype=torch.int32),
            torch.empty(int(starts[-1]), dtype=torch.float32),
        )
        found = rows, starts.numpy(), places.numpy(), values.numpy()
        dispatch.shared(len(rows), lambda first, end: cpu.collect(first, end, *found))
        return cls(starts, places, values, frames.shape[1])

    def product(self, g: Tensor) -> Tensor:
        """g^T x [outputs, inputs] of g [n, outputs] and these events x."""
        out = empty(g.shape[1], self.inputs)
        cpu, given = dispatch.kernels(g), (*self.arrays, g.detach().contiguous().numpy(), self.inputs)
        flat, blocks = out.flatten().numpy(), -(-g.shape[1] // cpu.BLOCK)
        dispatch.shared(blocks, lambda first, end: cpu.scatter(first, end, *given, flat))
        return out

    @property
    def arrays(self) -> tuple[Any, ...]:
        return self.starts.numpy(), self.places.numpy(), self.values.numpy()


def few(x: Tensor) -> Rows | None:
    """The events of x [n, inputs], where there is a kernel and they are few enough for it to pay."""
    if x.numel() < FEWEST or dispatch.kernels(x) is None:
        return None
    return Rows.of(x, DENSITY * x.numel())


def product(g: Tensor, x: Tensor) -> Tensor:
    """g^T x [outputs, inputs] of g [n, outputs] and x [n, inputs]; the cost goes with the events where x is sparse and
    there is a kernel."""
    rows = few(x) if x.dtype == g.dtype else None
    return g.T @ x if rows is None else rows.product(g)


def gathered(rows: Rows, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b [n, outputs] of events x in rows [n, inputs]."""
    out = empty(len(rows.starts) - 1, len(weight))
    start = torch.zeros(len(weight), dtype=torch.float32) if bias is None else bias.detach()
    cpu, (least, most) = dispatch.kernels(out), COLUMNS
    together = min(max(CACHE // (4 * max(1, rows.inputs)), least), most)
    blocks = max(1, -(-len(weight) // together))
    width = max(1, -(-len(weight) // (cpu.LINE * blocks))) * cpu.LINE
    columns = dispatch.in_columns(weight, width).numpy()
    given = *rows.arrays, columns, rows.inputs, start.contiguous().numpy(), out.numpy(), width
    dispatch.shared(len(out), lambda first, end: cpu.gather(first, end, *given))
    return out


def asked_for(node: Any) -> bool:
    """Whether what goes on to a node is asked for; `needs_input_grad` tells only what could be."""
    asks = getattr(torch._C, "_will_engine_execute_node", None)
    leaf = hasattr(node, "variable")  # of which torch does not tell
    return asks is None or leaf or asks(node)


def wanted(ctx: Any) -> list[bool]:
    """Which of the gradients of input, weight and bias a backward has to make."""
    found = list(ctx.needs_input_grad[:3])
    found[0] = found[0] and asked_for(ctx.next_functions[0][0])
    return found


class _Linear(torch.autograd.Function):
    """x W^T + b of events in rows; x: the same as a tensor, where there is one."""

    @staticmethod
    def forward(ctx, x, weight, bias, rows):
        ctx.save_for_backward(x, None if x is None else weight)  # which may change where there is no gradient of x
        ctx.rows = rows
        return gathered(rows, weight, bias)

    @staticmethod
    def backward(ctx, g):
        (x, weight), (of_x, of_weight, of_bias) = ctx.saved_tensors, wanted(ctx)
        again = torch.is_grad_enabled() and x is not None  # this is to be differentiated itself
        d_weight = None if not of_weight else g.T @ x if again else ctx.rows.product(g)
        return g @ weight if of_x else None, d_weight, g.sum(0) if of_bias else None, None


def linear(rows: Rows, weight: Tensor, bias: Tensor | None, x: Tensor | None = None) -> Tensor:
    """[n, outputs] of events in rows [n, inputs]. x: the tensor that they are of, if its gradient may be asked for."""
    return _Linear.apply(x, weight, bias, rows)


# -- convolution -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """One axis of a convolution. Input i reaches the outputs from first[i] on, in a grid that begins `lead` before them
    and is `grid` long; patch phase[i] has `reach` of them, and weight k is in patch at[k] at place[k]."""

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
        """Weight k takes input i to output (i + padding - k dilation) / stride, where that is a whole number."""
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
    """A convolution's patches [C, phases, phases, reach, reach, wide], and where that of input j [C * H * W] begins, in
    flat numbers: at which[j] among the patches, and at to[j] in the grid."""

    high: Axis
    across: Axis
    strides: Pair
    channels: int
    wide: int
    which: Tensor
    to: Tensor

    @classmethod
    def of(cls, frame: torch.Size, outputs: int, kernel: Pair, stride: Pair, *geometry: Pair) -> "Patches":
        """frame: [C, H, W]; geometry: padding and dilation."""
        each = zip(frame[1:], kernel, stride, *geometry, strict=True)
        high, across = (Axis.of(*about) for about in each)
        wide = -(-outputs // WIDTH) * WIDTH
        channel = torch.arange(frame[0])[:, None, None] * math.prod(stride)
        which = channel + high.phase[:, None] * stride[1] + across.phase
        to = (high.first[:, None] * across.grid + across.first).expand(frame)
        which, to = which * (high.reach * across.reach * wide), to * wide
        return cls(high, across, stride, frame[0], wide, which.flatten().int(), to.flatten().int())

    @property
    def fits(self) -> bool:
        """Whether there is an output at all."""
        return self.high.outputs > 0 and self.across.outputs > 0

    @property
    def size(self) -> tuple[int, ...]:
        return self.channels, *self.strides, self.high.reach, self.across.reach, self.wide

    @property
    def weights(self) -> tuple[Any, ...]:
        """Where in the patches the weights [C, kernel, kernel, outputs] are."""
        high, across = self.high, self.across
        return slice(None), high.at[:, None], across.at, high.place[:, None], across.place

    @property
    def steps(self) -> tuple[int, ...]:
        """Of a patch, its lines, the length of one, and from one to the next in the grid; and where in that the outputs
        begin."""
        high, across, wide = self.high, self.across, self.wide
        step = across.grid * wide
        return high.reach, across.reach * wide, step, high.lead * step + across.lead * wide

    def made(self, weight: Tensor) -> Tensor:
        """Patches of a weight [outputs, C, kernel, kernel]."""
        patches = torch.zeros(self.size, dtype=torch.float32)
        patches[(*self.weights, slice(len(weight)))] = weight.detach().permute(1, 2, 3, 0)
        return patches

    def taken(self, patches: Tensor, outputs: int) -> Tensor:
        """The weight [outputs, C, kernel, kernel] of flat patches."""
        return patches.view(self.size)[(*self.weights, slice(outputs))].permute(3, 0, 1, 2).contiguous()


class _Convolution(torch.autograd.Function):
    """Convolution of events, [n, outputs, ...]; gradient for weight and bias alone."""

    @staticmethod
    def forward(ctx, weight, bias, rows, patches):
        ctx.rows, ctx.patches = rows, patches
        n, outputs, (high, across) = len(rows.starts) - 1, len(weight), (patches.high, patches.across)
        out = empty(n, outputs, high.outputs, across.outputs)
        start = torch.zeros(patches.wide, dtype=torch.float32)
        if bias is not None:
            start[:outputs] = bias.detach()
        blank = start.repeat(high.grid * across.grid)
        cpu, places = dispatch.kernels(out), (patches.to.numpy(), patches.which.numpy())
        given = *rows.arrays, *places, patches.made(weight).flatten().numpy(), blank.numpy()
        about = patches.steps, patches.wide, tuple(out.shape), out.flatten().numpy()
        dispatch.shared(n, lambda first, end: cpu.spread(first, end, *given, *about))
        return out

    @staticmethod
    def backward(ctx, g):
        rows, patches = ctx.rows, ctx.patches
        d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            g = g.contiguous()
            cpu, given = dispatch.kernels(g), (*rows.arrays, patches.to.numpy(), patches.which.numpy())
            about = patches.steps, patches.wide, patches.high.grid * patches.across.grid, tuple(g.shape)
            flat, sums = g.detach().flatten().numpy(), []  # one of each thread

            def work(first: int, end: int) -> None:
                sums.append(torch.zeros(math.prod(patches.size), dtype=torch.float32))
                cpu.spread_weight(first, end, *given, sums[-1].numpy(), *about, flat)

            dispatch.shared(len(g), work)
            d_weight = patches.taken(sum(sums), g.shape[1])
        if ctx.needs_input_grad[1]:
            d_bias = g.sum((0, 2, 3))
        return d_weight, d_bias, None, None


def pair(value: Any) -> Pair | None:
    """(high, across) of what a convolution takes for both; None of what is none."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    if len(values) not in (1, 2) or not all(isinstance(item, int) for item in values):
        return None
    return values[0], values[-1]


@lru_cache(maxsize=64)
def patches_of(frame: torch.Size, weight: torch.Size, *geometry: Pair) -> Patches | None:
    """The patches of events [C, H, W] and a weight [outputs, C, kernel, kernel], whose geometry is stride, padding and
    dilation; None where the convolution is not possible."""
    possible = weight[1] == frame[0] and 0 not in (*frame, *weight)
    stride, padding, dilation = geometry
    if not possible or min(*stride, *dilation) < 1 or min(padding) < 0:
        return None
    patches = Patches.of(frame, weight[0], (weight[2], weight[3]), *geometry)
    return patches if patches.fits else None


def geometry(
    kernel: torch.Size, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> tuple[Pair, Pair, Pair] | None:
    """Stride, padding and dilation of a convolution in pairs; None where it has groups, or pads its sides unlike."""
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
    """[n, outputs, ...] of events in rows of frames [C, H, W]; None where a dense one has to do it, or is faster.
    options: as of torch's own."""
    about = geometry(weight.shape[2:], *options, **named)
    patches = None if about is None else patches_of(frame, weight.shape, *about)
    if patches is None:
        return None
    density = len(rows.places) / max(1, (len(rows.starts) - 1) * rows.inputs)
    numbers = math.prod(patches.size[1:5])  # of a patch in all its phases, where a dense one has those of the kernel
    if density * numbers > SHARE * math.prod(weight.shape[2:]):
        return None
    return _Convolution.apply(weight, bias, rows, patches)
