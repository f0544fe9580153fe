"""The choice between fused kernels and the reference. `reference.py` defines the results of the time scans.

`choice` selects the kernels by the dtype and device of a tensor. A function here returns None if no kernel applies, and
the caller then runs the reference. An error in a kernel is raised; nothing falls back after an error.
"""

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ulr_snn.errors import UsageError
from ulr_snn.kernels.layout import channels_last, laid, rest, shown, stored
from ulr_snn.kernels.limits import limits
from ulr_snn.kernels.pool import empty, lean, traced
from ulr_snn.kernels.state import RESETS, Draw, State
from ulr_snn.kernels.team import shared, summed
from ulr_snn.kernels.weight_cache import once

Pair = tuple[int, int]

SMALL = 1 << 14  # up to so many numbers, one thread is faster than several
LAWS = {"logistic": 0, "gaussian": None}  # the constants of cpu.py
TOGETHER = 1 << 10  # numbers of some narrow rows that kernels process as one vector
NOTHING = np.empty(0, np.float32)  # the state of rows that begin at rest


@lru_cache
def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def choice(like: Tensor) -> tuple[str, str]:
    """Returns the code that scans tensors like this one, "cpu" (numba), "gpu" (Triton) or "reference", and why."""
    if traced():
        return "reference", "a model that is exported, traced or compiled runs in plain torch"
    if like.dtype != torch.float32:
        return "reference", f"no kernel for {str(like.dtype).removeprefix('torch.')}"
    if like.device.type == "cpu":
        return ("cpu", "float32 on a CPU") if _installed("numba") else ("reference", "numba is not installed")
    if like.device.type == "cuda":
        return ("gpu", "float32 on a GPU") if _installed("triton") else ("reference", "triton is not installed")
    return "reference", f"no kernel for {like.device.type}"


def kernels(like: Tensor) -> ModuleType | None:
    """Returns the module of CPU kernels if they apply to tensors like this one; otherwise None."""
    return cpu_kernels() if choice(like)[0] == "cpu" else None


@lru_cache
def cpu_kernels() -> ModuleType:
    """Imports and returns the module of CPU kernels."""
    from ulr_snn.kernels import cpu

    return cpu


def _gpu(like: Tensor) -> ModuleType | None:
    """Returns the module of GPU kernels if they apply to tensors like this one; otherwise None."""
    if choice(like)[0] != "gpu":
        return None
    from ulr_snn.kernels import gpu

    return gpu


def in_one_kernel(weight: Tensor | None) -> bool:
    """Returns whether a GPU runs a layer with these recurrent weights [N, N], if it has any, by one kernel."""
    return weight is None or len(weight) <= limits.recurrent


def scan(
    current: Tensor,
    weight: Tensor | None,
    beta: Tensor,
    threshold: Tensor,
    reset: str,
    draw: Draw | None,
    lengths: Tensor | None,
    state: State | None = None,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Returns spikes, standardised drives x (drives, if nothing is drawn) and recurrent current, [T, B, ...]. weight:
    recurrent [N, N]; lengths [B]: number of steps of each row, without padding; known: given spikes, which are not
    drawn. Raises UsageError for shapes that do not fit, since kernels check no bounds."""
    check_fit(current, weight, draw, lengths)
    gpu, cpu = _gpu(current), kernels(current)
    if gpu is not None and known is None and in_one_kernel(weight):
        return gpu.scan(current, weight, beta, threshold, reset, draw, lengths, state)
    if cpu is None or (weight is not None and weight.dtype != current.dtype):
        return None
    last, features, (steps, rows) = channels_last(current, 2), current.shape[2:], current.shape[:2]
    scale = torch.ones((), dtype=torch.float32) if draw is None else draw.scale
    group = 1 if weight is not None else _together(rows, features, lengths)
    per_neuron = [_per_neuron(value, features, last, group) for value in (beta, threshold, scale)]
    spikes, x = (
        empty(*current.shape, last=last) if known is None else laid(known, last),
        empty(*current.shape, last=last),
    )
    fed_back = empty(*(current.shape if weight is not None else (0, 0, 0)))
    sources = None if weight is None else once(weight, "transposed", transposed).view(-1).numpy()
    words = None if draw is None else draw.words
    row1, row2 = (torch.zeros(steps, rows, dtype=torch.int32),) * 2 if words is None else words
    mirrored = _all(rows, False) if draw is None or draw.mirrored is None else draw.mirrored.numpy()
    law = cpu.KNOWN if known is not None else cpu.DETERMINISTIC if draw is None else LAWS[draw.law]
    states = (
        (state.membrane, state.spikes) if state is not None else (empty(*current.shape[1:], last=last) for _ in "us")
    )
    with _rows(last, *states) as arrays:
        given = (
            (steps, rows, features.numel()), _flat(current, last), sources, *per_neuron, RESETS.index(reset),
            law, row1.numpy().view(np.uint32), row2.numpy().view(np.uint32),
            mirrored, _counters(features, last), _own(lengths, steps, rows),
            state is None, *arrays, _flat(spikes, last), _flat(x, last), _flat(fed_back, False),
        )  # fmt: skip
        shared(rows, lambda first, end: cpu.scan(first, end, *given))
    return spikes, x, None if weight is None else fed_back


def check_fit(current: Tensor, weight: Tensor | None, draw: Draw | None, lengths: Tensor | None) -> None:
    """Raises UsageError unless recurrent weights, noise and lengths fit a current [T, B, ...]."""
    if traced():  # a size is no number
        return
    features, (steps, rows) = tuple(current.shape[2:]), current.shape[:2]
    if weight is not None and (len(features) != 1 or tuple(weight.shape) != features * 2):
        raise UsageError(
            f"recurrent weights {tuple(weight.shape)} got a current of features {features}; give RecurrentLIF as many "
            "features as its current has"
        )
    drawn = (steps, rows) if draw is None or draw.words is None else tuple(draw.words[0].shape)
    own = drawn[1] if lengths is None else len(lengths)
    if drawn != (steps, rows) or own != rows:
        raise UsageError(
            f"a spiking layer got a current of {steps} time steps and {rows} rows in a pass of {own} samples; keep "
            "time and samples the first two axes [T, B, ...] of every layer, and give patches or views an axis behind "
            "them ([T, B, P, ...])"
        )


def words(key: int, rows: tuple[Any, Any], first: int, steps: int) -> tuple[Tensor, Tensor]:
    """Returns `Noise.words` of a site with this key. rows: samples and streams, as arrays [B] uint32."""
    found = np.empty((2, steps, len(rows[0])), np.uint32)
    low, high = np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32)
    cpu_kernels().words(*rows, low, high, np.uint32(first), found[0], found[1])
    one, two = torch.from_numpy(found.view(np.int32)).unbind()
    return one, two


def row_words(sample: Tensor, stream: Tensor) -> tuple[Any, Any] | None:
    """Returns samples and streams as `words` takes them; None if no kernel applies."""
    if sample.device.type != "cpu" or not _installed("numba"):
        return None
    one, two = (tensor.contiguous().numpy().view(np.uint32) for tensor in (sample, stream))
    return one, two


class StepDraw:
    """Draws the spikes of a layer on a CPU whose drives arrive by time steps, one or all at once. like: drives [B, ...]
    of one step. lengths, over: as in `credit`. slope: the slope for credit per unit of membrane [T, B, ...], valid up
    to the last step drawn."""

    def __init__(self, draw: Draw, like: Tensor, lengths: Tensor | None, over: Tensor | None) -> None:
        if draw.words is None:
            raise UsageError("a draw step by step needs the words of the noise")
        steps, rows = draw.words[0].shape
        self._last = last = channels_last(like)
        self.slope = empty(steps, *like.shape, last=last)
        self._farthest = np.full((rows, 2), -(2**31), np.int32)
        mirrored = _all(rows, False) if draw.mirrored is None else draw.mirrored.numpy()
        words = [word.numpy().view(np.uint32) for word in draw.words]
        features = like.shape[1:]
        self._given = (
            _per_neuron(draw.scale, features, last, _together(rows, features, lengths)), LAWS[draw.law], *words,
            mirrored, _counters(features, last), _own(lengths, steps, rows), _distances(over),
            _flat(self.slope, last), self._farthest,
        )  # fmt: skip
        self._fire, self._shape = cpu_kernels().fire, (steps, rows, features.numel())
        self._steps: tuple[Tensor, ...] = ()  # the slope by time step

    @property
    def farthest(self) -> Tensor:
        """Largest -drive / scale and largest drive / scale so far, [2]."""
        bits = self._farthest.max(0)
        return torch.from_numpy((bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(np.float32))  # see `cpu._ordered`

    def __call__(self, t: int, drive: Tensor) -> Tensor:
        """Draws and returns the spikes [B, ...] of time step t, or [T, B, ...] of all steps, without a graph."""
        drive = drive.detach()
        drive = laid(drive, True) if self._last else drive.contiguous()
        return self._drawn(t, drive, torch.empty_like(drive))

    def linked(self, t: int, drive: Tensor) -> Tensor:
        """Draws and returns the spikes of time step t. In the graph they are `slope` times the drive."""
        drive = laid(drive, True) if self._last else drive.contiguous()
        if not self._steps:
            self._steps = self.slope.unbind()
        spikes = drive * self._steps[t]  # keeps the memory of the slope; both get their values below
        self._drawn(t, drive.detach(), spikes.detach())
        return spikes

    def _drawn(self, t: int, drive: Tensor, spikes: Tensor) -> Tensor:
        """Overwrites the spikes, and the slopes of these steps."""
        rows, of_drive, of_spikes = self._shape[1], drive, spikes
        if self._last:
            of_drive, of_spikes = stored(drive, True), stored(spikes, True)
        given = self._shape, of_drive.view(-1).numpy(), t, *self._given, of_spikes.view(-1).numpy()
        if drive.numel() <= SMALL:
            self._fire(0, rows, *given)
        else:
            shared(rows, lambda first, end: self._fire(first, end, *given))
        return spikes


def slopes(x: Tensor, law: str, scale: Tensor, lengths: Tensor | None, over: Tensor | None = None) -> Tensor | None:
    """Returns p' per unit of membrane [T, B, ...] for standardised drives, or the secants over these distances [K]."""
    cpu = kernels(x)
    if cpu is None:
        return None
    last, (steps, rows) = channels_last(x, 2), x.shape[:2]
    out = empty(*x.shape, last=last)
    of_neurons = _distances(over), _per_neuron(scale, x.shape[2:], last, _together(rows, x.shape[2:], lengths))
    shape = steps, rows, x.shape[2:].numel()
    given = shape, LAWS[law], _flat(x, last), *of_neurons, _own(lengths, steps, rows), _flat(out, last)
    shared(rows, lambda first, end: cpu.slopes(first, end, *given))
    return out


def credit(
    a: Tensor,
    x: Tensor,
    law: str,
    scale: Tensor,
    lengths: Tensor | None,
    spikes: Tensor,
    beta: Tensor,
    threshold: Tensor,
    reset: str,
    later: Tensor | None,
    totals: bool,
    overwrite: bool = False,
    weight: Tensor | None = None,
    over: Tensor | None = None,
) -> tuple[Tensor | None, Tensor] | None:
    """Returns `credit.recurrence.Recurrence.credit` for standardised drives x. later: g [B, ...] of the step after the
    last, None for zero; it is overwritten with that of the first. totals: whether to return totals. overwrite: whether
    a may be overwritten. weight: C [N, N] of the recurrent current. over: distances [K] of the secants that replace
    p'."""
    gpu, cpu = _gpu(a), kernels(a)
    if gpu is not None and in_one_kernel(weight):
        later = rest(x).to(a.dtype) if later is None else later
        return gpu.credit(a, x, law, scale, lengths, spikes, beta, threshold, reset, later, totals, weight, over)
    if cpu is None or x.dtype != a.dtype or (weight is not None and weight.dtype != a.dtype):
        return None
    last = channels_last(x, 2)
    total = empty(*x.shape, last=last) if totals else empty(0, 0, 0)
    currents = a if overwrite and stored(a, last).is_contiguous() else empty(*x.shape, last=last)
    features, (steps, rows) = a.shape[2:], a.shape[:2]
    group = 1 if weight is not None else _together(rows, features, lengths)
    of_scale, of_beta, of_threshold = (_per_neuron(value, features, last, group) for value in (scale, beta, threshold))
    columns = None if weight is None else in_columns(weight, cpu.LINE).numpy()
    each = a if a.stride(0) else a[:1]  # stride 0: a is the same at every step
    with _rows(last, *(() if later is None else (later,))) as states:
        given = (
            (steps, rows, features.numel()), _flat(each, last), _flat(x, last), LAWS[law], _distances(over), of_scale,
            _own(lengths, steps, rows), _flat(spikes, last), of_beta, of_threshold, columns, RESETS.index(reset),
            *(states or (NOTHING,)), _flat(total, last and totals), _flat(currents, last),
        )  # fmt: skip
        shared(rows, lambda first, end: cpu.credit(first, end, *given))
    return total if totals else None, currents


def leak_gradient(g: Tensor, x: Tensor, scale: Tensor, threshold: Tensor, spikes: Tensor, reset: str) -> Tensor | None:
    """Returns `Record.leak_gradient` for g, drives and spikes [T, B, ...]; None if no kernel applies."""
    cpu = kernels(g)
    if cpu is None or not g.dtype == x.dtype == spikes.dtype:
        return None
    last, features = channels_last(g, 2), g.shape[2:]
    per_neuron = (_per_neuron(value, features, last) for value in (scale, threshold))
    given = _array(g, last), _array(x, last), *per_neuron, _array(spikes, last), RESETS.index(reset)
    shape = stored(g, last).shape[2:]
    return shown(summed(g.shape[1], shape, lambda first, end, out: cpu.leak(first, end, *given, out)), last)


def transposed(weight: Tensor) -> Tensor:
    """Returns a contiguous copy of W^T."""
    return weight.detach().T.contiguous()


def in_columns(weight: Tensor, width: int) -> Tensor:
    """Returns W^T, flat, in blocks of `width` outputs, padded with zeros (see `cpu.columns`), for a weight [outputs,
    inputs] on a CPU. The result is cached for the next time chunk, unless the pool is lean."""

    def made(weight: Tensor) -> Tensor:
        outputs, inputs = weight.shape
        out = empty(-(-outputs // width) * width * inputs)
        given = weight.detach().contiguous().flatten().numpy(), outputs, inputs, out.numpy(), width
        cpu = cpu_kernels()
        shared(-(-outputs // width), lambda first, end: cpu.columns(first, end, *given))
        return out

    return made(weight) if lean() else once(weight, f"columns {width}", made)


def leaky(c: Tensor, spikes: Tensor | None, beta: Tensor, reset: str) -> Tensor | None:
    """Returns g_t = c_t + beta k_t g_{t+1} [T, B, ...]; None if no kernel applies."""
    if beta.ndim > c.ndim - 2:
        return None
    reset = "none" if spikes is None else reset  # without spikes nothing is reset
    gpu, cpu = _gpu(c), kernels(c)
    if gpu is not None:
        return gpu.leaky(c, spikes, beta, reset)
    if cpu is None:
        return None
    last = channels_last(c, 2)
    out, later = empty(*c.shape, last=last), torch.zeros(c.shape[1], math.prod(c.shape[2:]), dtype=torch.float32)
    arrays = [_array(c, last), _array(c if spikes is None else spikes, last)]
    given = *arrays, _per_neuron(beta, c.shape[2:], last), RESETS.index(reset), later.numpy(), _array(out, last)
    shared(c.shape[1], lambda first, end: cpu.leaky(first, end, *given))
    return out


def window_sums(x: Tensor, windows: tuple[Pair, Pair, Pair], size: Pair) -> tuple[Tensor, bool] | None:
    """Returns sums over the windows of pictures x [..., high, across], and whether all of x is 0 or 1. windows: size,
    step and margin of the windows; size: size of the result."""
    if kernels(x) is None:
        return None
    from ulr_snn.kernels.windows import fired, fired_last

    last, spikes = channels_last(x), list[bool]()
    out = empty(*x.shape[:-2], *size, last=last)
    pictures, sums = (_pictures(t, last) for t in (x, out))
    count = fired_last if last else fired
    shared(len(pictures), lambda first, end: spikes.append(count(first, end, pictures, windows, sums)))
    return out, all(spikes)


def window_credit(x: Tensor, total: Tensor, g: Tensor, windows: tuple[Pair, Pair, Pair]) -> Tensor | None:
    """Returns the gradient of spikes x, from the gradient g of their OR over windows with sums `total`."""
    if kernels(x) is None or g.dtype != x.dtype or total.dtype != x.dtype:
        return None
    from ulr_snn.kernels.windows import credited, credited_last

    last = channels_last(x)
    out = empty(*x.shape, last=last)
    *given, to = (_pictures(t, last) for t in (x, total, g, out))
    credit = credited_last if last else credited
    shared(len(to), lambda first, end: credit(first, end, *given, windows, to))
    return out


def _pictures(x: Tensor, last: bool) -> Any:
    """Returns pictures [..., C, H, W] as an array [n, H, W, C] if channels are last, else [n, H, W]. It shares the
    memory of pictures in this layout."""
    rows = stored(x.detach(), last).contiguous()
    return (rows.flatten(0, -4) if last else rows.view(-1, *rows.shape[-2:])).numpy()


def turned(x: Tensor) -> Tensor:
    """Transposes [n, high, across, channels] to a contiguous [n, channels, high, across]. This undoes channels-last
    order; for [n, 1, channels, positions] it produces channels-last order."""
    cpu = kernels(x)
    if cpu is None or x.stride()[2:] != (x.shape[3], 1) or 0 in x.shape:
        return x.permute(0, 3, 1, 2).contiguous()
    n, high, across, channels = x.shape
    out = empty(n, channels, high, across)
    x = x.detach()
    flat = x.as_strided((x.untyped_storage().nbytes() // 4,), (1,), 0).numpy()
    given = flat, x.storage_offset(), x.stride()[:2], (n, high, across, channels), out.view(-1).numpy()
    shared(n, lambda first, end: cpu.turn(first, end, *given))
    return out


def _array(sequence: Tensor, last: bool) -> Any:
    """Returns [T, B, ...] as an array [T, B, N] with neurons in the order of this layout. It shares the memory of a
    sequence in this layout."""
    return stored(sequence.detach(), last).contiguous().flatten(2).numpy()


def _flat(sequence: Tensor, last: bool) -> Any:
    """Returns the numbers of `_array` in one axis, as kernels with vectors of several rows take them. A view by numpy:
    one by torch would count as the model's own, see `layout.Views`."""
    return stored(sequence.detach(), last).contiguous().numpy().reshape(-1)


@contextmanager
def _rows(last: bool, *states: Tensor) -> Iterator[list[Any]]:
    """Gives states [B, ...] as flat arrays with neurons in the order of this layout. At the end, the states have the
    values of the arrays."""
    arrays = [laid(state, last) for state in states]
    yield [stored(array, last).numpy().reshape(-1) for array in arrays]
    for state, array in zip(states, arrays, strict=True):
        if array.data_ptr() != state.data_ptr():
            state.copy_(array)


def _together(rows: int, features: torch.Size, lengths: Tensor | None) -> int:
    """Returns how many of these rows a kernel processes as one vector. Rows with padding are processed one by one."""
    return 1 if lengths is not None else max(1, min(rows, TOGETHER // max(1, features.numel())))


def _per_neuron(value: Tensor, features: torch.Size, last: bool, rows: int = 1) -> Any:
    """Broadcasts a value to features [...] and returns it as an array [N] float32 in the order of this layout, repeated
    for so many rows."""
    if value.numel() == 1:  # as most are; plain numbers take a fraction of the time
        return np.full(rows * features.numel(), value.item(), np.float32)
    while value.ndim > len(features) and value.shape[0] == 1:
        value = value[0]
    wide = value.detach().to(torch.float32).expand(rows, *features)
    return stored(wide, last).reshape(-1).contiguous().numpy()


@lru_cache(maxsize=32)
def _counters(features: torch.Size, last: bool) -> Any:
    """Returns what `Noise` counts neurons with, times the constant of its hash, in the order of this layout."""
    places = stored(torch.arange(math.prod(features)).view(features), last).reshape(-1)
    return places.numpy().astype(np.uint32) * cpu_kernels().GOLDEN


def _distances(over: Tensor | None) -> Any:
    """Returns d, 1 / 2dK, e^-d, and 1 / 2dK (1 - e^-2d) of distances d [K], as [K, 4] float32, with K padded to a
    multiple of 4; None for None. The last two columns are 1 and 0 if d is beyond NEAR."""
    if over is None:
        return None
    distances, near = over.tolist(), float(cpu_kernels().NEAR)
    rows: list[tuple[float, ...]] = []
    for d in distances:
        share, q = 1 / (2 * d * len(distances)), math.exp(-d)
        rows.append((d, share, q, share * (1 - q * q)) if d <= near else (d, share, 1, 0))
    return np.array(rows + [(0, 0, 1, 0)] * (-len(rows) % 4), np.float32)


def _own(lengths: Tensor | None, steps: int, rows: int) -> Any:
    return _all(rows, steps) if lengths is None else lengths.to(torch.int64).numpy()


@lru_cache(maxsize=32, typed=True)
def _all(rows: int, value: Any) -> Any:
    """Returns an array of equal values, which kernels only read."""
    return np.full(rows, value)
