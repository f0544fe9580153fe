"""Paths from one layer's spikes to another's input current: linear maps with learned weights.

Full    every neuron to every neuron: weight [N, N_target].
Shared  the same weights around every position, as in a convolution or a pooling: weight [C k_1 .. k_d, C_target].
Both act on rows [n, ...], one for each sample and time step. The weight is the solution of the regression
results ≈ inputs @ weight with matrices `inputs` [m, D] and `results` [m, M].
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ulr_snn.kernels import ranks
from ulr_snn.kernels.dispatch import turned
from ulr_snn.kernels.layout import channels_last, shown, stored
from ulr_snn.kernels.pool import blocks, by_blocks, fits

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Path:
    """A linear map from spikes to currents. source, target: their shapes for one sample in one time step."""

    source: Shape
    target: Shape

    @property
    def size(self) -> tuple[int, int]:
        """The shape (D, M) of the weight."""
        raise NotImplementedError

    @property
    def positions(self) -> int:
        """The number of regression rows per row of spikes."""
        raise NotImplementedError

    @property
    def products(self) -> int:
        """The number of multiply-adds per row of spikes."""
        return math.prod(self.size) * self.positions

    def unshared(self, entries: int) -> "Path":
        """Returns the path with a weight for every pair of neurons if it has at most `entries` weights, else itself."""
        full = Full(self.source, self.target)
        return full if math.prod(full.size) <= entries else self

    def inputs(self, spikes: Tensor) -> Tensor:
        """Returns the regression's inputs [n * positions, D] from spikes [n, *source]."""
        raise NotImplementedError

    def results(self, current: Tensor) -> Tensor:
        """Returns the regression's results [n * positions, M] from currents [n, *target]."""
        raise NotImplementedError

    def forward(self, weight: Tensor, spikes: Tensor) -> Tensor:
        """Maps spikes [n, *source] to their effect on the current [n, *target]."""
        raise NotImplementedError

    def backward(self, weight: Tensor, current: Tensor) -> Tensor:
        """Maps ∂L/∂current [n, *target] to ∂L/∂spikes [n, *source]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Full(Path):
    """A path with a weight for every pair of neurons."""

    @property
    def size(self) -> tuple[int, int]:
        return math.prod(self.source), math.prod(self.target)

    @property
    def positions(self) -> int:
        return 1

    def inputs(self, spikes: Tensor) -> Tensor:
        return spikes.flatten(1)

    def results(self, current: Tensor) -> Tensor:
        return current.flatten(1)

    def forward(self, weight: Tensor, spikes: Tensor) -> Tensor:
        return (spikes.flatten(1) @ weight).unflatten(1, self.target)

    def backward(self, weight: Tensor, current: Tensor) -> Tensor:
        return (current.flatten(1) @ weight.T).unflatten(1, self.source)


@dataclass(frozen=True)
class Shared(Path):
    """A path with the same weights around every position, from [C, S_1 .. S_d] to [C_target, S'_1 .. S'_d]. Along every
    axis, position j of the target depends on the `extent` positions of the source from stride * j + offset on."""

    stride: Shape
    offset: Shape
    extent: Shape

    @property
    def size(self) -> tuple[int, int]:
        return self.source[0] * math.prod(self.extent), self.target[0]

    @property
    def positions(self) -> int:
        return math.prod(self.target[1:])

    def inputs(self, spikes: Tensor) -> Tensor:
        windows = pad(spikes, self._margins())
        for axis, (extent, stride) in enumerate(zip(self.extent, self.stride, strict=True), 2):
            windows = windows.unfold(axis, extent, stride)
        return windows.movedim(1, len(self.target)).flatten(len(self.target)).flatten(0, -2)

    def results(self, current: Tensor) -> Tensor:
        return current.movedim(1, -1).flatten(0, -2)

    def forward(self, weight: Tensor, spikes: Tensor) -> Tensor:
        return self._convolve(pad(spikes, self._margins()), weight, transposed=False)

    def backward(self, weight: Tensor, current: Tensor) -> Tensor:
        size = math.prod(self.source)
        if current.ndim != 4 or not fits(current) or len(blocks(len(current), size)) < 2:
            return self._spread(weight, current)
        return by_blocks(lambda rows: self._spread(weight, rows), current, size)

    def _spread(self, weight: Tensor, current: Tensor) -> Tensor:
        spread = self._convolve(current, weight, transposed=True)
        margins = self._margins()
        if min(margins) < 0:
            return pad(spread, [-margin for margin in margins])
        axes = zip(self.source[1:], reversed(margins[::2]), strict=True)  # a view, because nothing has to be added
        spread = spread[(slice(None), slice(None), *(slice(before, before + width) for width, before in axes))]
        return turned(spread.permute(0, 2, 3, 1)) if spread.ndim == 4 else spread

    def _convolve(self, x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        none, one = [0] * len(self.stride), [1] * len(self.stride)
        kernel = weight.T.unflatten(1, (self.source[0], *self.extent))
        if x.ndim == 4:  # the order in memory for which the transposed convolution is fast
            kernel = kernel.contiguous(memory_format=torch.channels_last)
            if not channels_last(x):
                x = shown(turned(x.contiguous().flatten(2)[:, None]).view(stored(x).shape))
        return torch.convolution(x, kernel, None, self.stride, none, one, transposed, none, 1)

    def _margins(self) -> list[int]:
        """Returns the zeros to add around the source (negative: to cut off) as `pad` takes them: last axis first."""
        margins = []
        axes = zip(self.source[1:], self.target[1:], self.stride, self.offset, self.extent, strict=True)
        for width, places, stride, offset, extent in reversed(list(axes)):
            margins += [-offset, stride * (places - 1) + extent + offset - width]
        return margins


def window(x: Tensor, spikes: Tensor, source: Shape, target: Shape) -> Shared | None:
    """Returns the windows of the source [C, ...] that positions of the target [C', ...] depend on, or None.

    x [T, B, *target] is a function of spikes [T, B, *source]; or both are of one time step, [B, ...]. Its gradients at
    three neighbouring positions show which spikes it depends on. The result is None if x is not local or the window
    does not move evenly. Weights that are exactly zero in this pass do not count.
    """
    if len(source) != len(target) or len(source) < 2 or min(target[1:]) < 3:
        return None
    middle = [width // 2 for width in target[1:]]
    here = _seen(x, spikes, middle)
    stride, offset, extent = [], [], []
    for axis, (first, last) in enumerate(here):
        moves = set()
        for side in (-1, 1):
            place = [p + side * (a == axis) for a, p in enumerate(middle)]
            near = _seen(x, spikes, place)[axis]
            moves |= {side * (near[0] - first), side * (near[1] - last)}
        if len(moves) > 1 or min(moves) < 1 or last - first + 1 >= source[1 + axis]:
            return None
        stride.append(moves.pop())
        offset.append(first - stride[-1] * middle[axis])
        extent.append(last - first + 1)
    return Shared(source, target, tuple(stride), tuple(offset), tuple(extent))


def _seen(x: Tensor, spikes: Tensor, place: list[int]) -> list[tuple[int, int]]:
    """Returns the first and last position along each axis of the spikes that x at this place depends on."""
    probe = torch.zeros_like(x)
    # Batch statistics couple everything a little. Signs that alternate over the samples let most of that cancel, and
    # the threshold below removes the rest.
    rows = x.shape[-len(place) - 2]
    signs = 1 - 2 * (torch.arange(rows, device=x.device) % 2)
    last = probe if probe.ndim == len(place) + 2 else probe[-1]
    index: tuple[slice | int, ...] = (slice(None), slice(None), *place)
    last[index] = signs[:, None].to(x.dtype)
    (gradient,) = torch.autograd.grad(x, spikes, probe, retain_graph=True, allow_unused=True)
    if gradient is None:  # the spikes are of another time step
        gradient = torch.zeros_like(spikes)
    strength = ranks.greatest(gradient.abs().flatten(0, -len(place) - 1).amax(0))
    seen = (strength > 1e-2 * strength.max()).nonzero()
    if not len(seen):
        return [(0, width - 1) for width in strength.shape]
    return list(zip(seen.amin(0).tolist(), seen.amax(0).tolist(), strict=True))
