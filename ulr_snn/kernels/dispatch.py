"""Fused kernels for the time scans, where there are some for a tensor; `reference.py` defines what they compute.

One resolver, `choice`, chooses by what a tensor is. An error in a kernel is an error: nothing falls back after one.
"""

import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ulr_snn.errors import UsageError
from ulr_snn.kernels.pool import empty, lean
from ulr_snn.kernels.state import RESETS, Draw, State
from ulr_snn.kernels.weight_cache import once

Pair = tuple[int, int]

SMALL = 1 << 14  # numbers that other threads would take longer to be told of
LAWS = {"logistic": 0, "gaussian": None}  # as of cpu.py


@lru_cache
def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def choice(like: Tensor) -> tuple[str, str]:
    """Which code scans tensors like this one, "cpu" (numba), "gpu" (Triton) or "reference", and why."""
    if like.dtype != torch.float32:
        return "reference", f"no kernel for {str(like.dtype).removeprefix('torch.')}"
    if like.device.type == "cpu":
        return ("cpu", "float32 on a CPU") if _installed("numba") else ("reference", "numba is not installed")
    if like.device.type == "cuda":
        return ("gpu", "float32 on a GPU") if _installed("triton") else ("reference", "triton is not installed")
    return "reference", f"no kernel for {like.device.type}"


def kernels(like: Tensor) -> ModuleType | None:
    """The module of kernels for tensors like this one on a CPU; None elsewhere."""
    return _cpu() if choice(like)[0] == "cpu" else None


def _cpu() -> ModuleType:
    from ulr_snn.kernels import cpu

    return cpu


def _gpu(like: Tensor) -> ModuleType | None:
    """The module of kernels for tensors like this one on a GPU; None elsewhere."""
    if choice(like)[0] != "gpu":
        return None
    from ulr_snn.kernels import gpu

    return gpu


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
    """Spikes, standardised drives x (drives, where nothing is drawn) and recurrent current, [T, B, ...]; None where the
    reference has to do it. weight: recurrent [N, N]; lengths [B]: steps of each row that are no padding;
    known: the spikes, where they are not drawn. Raises UsageError for shapes that do not fit, since kernels check no
    bounds."""
    check_fit(current, weight, draw, lengths)
    gpu = _gpu(current)
    if gpu is not None:
        alone = weight is None and known is None
        return gpu.scan(current, beta, threshold, reset, draw, lengths, state) if alone else None
    cpu = kernels(current)
    if cpu is None or (weight is not None and weight.dtype != current.dtype):
        return None
    features, (steps, rows) = current.shape[2:], current.shape[:2]
    scale = torch.ones((), dtype=torch.float32) if draw is None else draw.scale
    per_neuron = [_per_neuron(value, features) for value in (beta, threshold, scale)]
    state = State(*torch.zeros(2, *current.shape[1:], dtype=torch.float32).unbind()) if state is None else state
    spikes, x = (
        empty(*current.shape) if known is None else known.contiguous(),
        empty(*current.shape),
    )
    fed_back = empty(*(current.shape if weight is not None else (0, 0, 0)))
    sources = None if weight is None else once(weight, "transposed", transposed).view(-1).numpy()
    words = None if draw is None else draw.words
    row1, row2 = (torch.zeros(steps, rows, dtype=torch.int32),) * 2 if words is None else words
    mirrored = torch.zeros(rows, dtype=torch.bool)
    if draw is not None and draw.mirrored is not None:
        mirrored = draw.mirrored
    law = cpu.KNOWN if known is not None else cpu.DETERMINISTIC if draw is None else LAWS[draw.law]
    given = (
        _array(current), sources, *per_neuron, RESETS.index(reset),
        law, row1.numpy().view("uint32"), row2.numpy().view("uint32"),
        mirrored.numpy(), _own(lengths, steps, rows), _rows(state.membrane), _rows(state.spikes),
        _array(spikes), _array(x), fed_back.flatten(2).numpy(),
    )  # fmt: skip
    shared(rows, lambda first, end: cpu.scan(first, end, *given))
    return spikes, x, None if weight is None else fed_back


def check_fit(current: Tensor, weight: Tensor | None, draw: Draw | None, lengths: Tensor | None) -> None:
    """Raises UsageError unless recurrent weights, noise and lengths are those of a current [T, B, ...]."""
    features, (steps, rows) = tuple(current.shape[2:]), current.shape[:2]
    if weight is not None and (len(features) != 1 or tuple(weight.shape) != features * 2):
        raise UsageError(
            f"recurrent weights {tuple(weight.shape)} got a current of features {features}; give RecurrentLIF as many "
            "features as its current has"
        )
    drawn = None if draw is None or draw.words is None else tuple(draw.words[0].shape)
    if drawn not in (None, (steps, rows)) or (lengths is not None and len(lengths) != rows):
        own = len(lengths) if lengths is not None else drawn[1]
        raise UsageError(
            f"a spiking layer got a current of {steps} time steps and {rows} rows in a pass of {own} samples; keep "
            "time and samples the first two axes [T, B, ...] of every layer"
        )


def words(key: int, sample: Tensor, stream: Tensor, first: int, steps: int) -> tuple[Tensor, Tensor] | None:
    """`Noise.words` of a site with this key; None where torch has to make them."""
    if sample.device.type != "cpu" or not _installed("numba"):
        return None
    found = torch.empty(2, steps, len(sample), dtype=torch.int32)
    low, high = np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32)
    rows = (tensor.contiguous().numpy().view("uint32") for tensor in (sample, stream))
    _cpu().words(*rows, low, high, np.uint32(first), *found.numpy().view("uint32"))
    return found[0], found[1]


class StepDraw:
    """Draws the spikes of a layer on a CPU whose membranes come in time step by time step. like: the drives [B, ...] of
    one; lengths, over: as of `credit`. spikes: [T, B, ...]; slope: the one that credit takes at them, per unit of
    membrane; both as far as they have been drawn."""

    def __init__(self, draw: Draw, like: Tensor, lengths: Tensor | None, over: Tensor | None) -> None:
        steps, rows = draw.words[0].shape
        self.spikes, self.slope = empty(steps, *like.shape), empty(steps, *like.shape)
        self._farthest = np.zeros(rows, np.int32)
        mirrored = torch.zeros(rows, dtype=torch.bool) if draw.mirrored is None else draw.mirrored
        words = [word.numpy().view("uint32") for word in draw.words]
        about = mirrored.numpy(), _own(lengths, steps, rows), _distances(over), _array(self.spikes), _array(self.slope)
        self._given = _per_neuron(draw.scale, like.shape[1:]), LAWS[draw.law], *words, *about, self._farthest
        self._parts = None if like.numel() > SMALL else 1
        self._fire = _cpu().fire

    @property
    def farthest(self) -> Tensor:
        """Largest |drive / scale| so far, a number."""
        return torch.from_numpy(self._farthest.view(np.float32)).max()

    def __call__(self, t: int, drive: Tensor) -> Tensor:
        """Spikes of drives [B, ...] of time step t."""
        given = drive.detach().contiguous().view(len(drive), -1).numpy(), t, *self._given
        shared(len(drive), lambda first, end: self._fire(first, end, *given), self._parts)
        return self.spikes[t]


def slopes(x: Tensor, law: str, scale: Tensor, lengths: Tensor | None, over: Tensor | None = None) -> Tensor | None:
    """p' per unit of membrane [T, B, ...] of standardised drives, or the secants over these distances [K]; None where
    the reference has to do it."""
    cpu = kernels(x)
    if cpu is None:
        return None
    out, (steps, rows) = empty(*x.shape), x.shape[:2]
    of_neurons = _distances(over), _per_neuron(scale, x.shape[2:])
    given = LAWS[law], _array(x), *of_neurons, _own(lengths, steps, rows), _array(out)
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
    later: Tensor,
    totals: bool,
    overwrite: bool = False,
    weight: Tensor | None = None,
    over: Tensor | None = None,
) -> tuple[Tensor | None, Tensor] | None:
    """`credit.recurrence.Recurrence.credit` of standardised drives x; None where the reference has to do it. later: g
    [B, ...] of the step after the last; becomes that of the first. totals: whether they are asked for; overwrite: a is
    not needed any more; weight: C [N, N] of the recurrent current; over: distances [K] of the secants in place of p'.
    """
    gpu = _gpu(a)
    if gpu is not None and over is not None:
        return None
    if gpu is not None:
        given = a, x, law, scale, lengths, spikes, beta, threshold, reset, later, totals
        return gpu.credit(*given) if weight is None else None
    cpu = kernels(a)
    if cpu is None or x.dtype != a.dtype or (weight is not None and weight.dtype != a.dtype):
        return None
    total = empty(*(a.shape if totals else (0, 0, 0)))
    currents = a if overwrite and a.is_contiguous() else empty(*a.shape)
    scale, beta, threshold = (_per_neuron(value, a.shape[2:]) for value in (scale, beta, threshold))
    columns = None if weight is None else in_columns(weight, cpu.LINE).numpy()
    each = a if a.stride(0) else a[:1]  # the same at every step
    given = (
        _array(each), _array(x), LAWS[law], _distances(over), scale, _own(lengths, *a.shape[:2]), _array(spikes),
        beta, threshold, columns, RESETS.index(reset), _rows(later), _array(total), _array(currents),
    )  # fmt: skip
    shared(a.shape[1], lambda first, end: cpu.credit(first, end, *given))
    return total if totals else None, currents


def leak_gradient(g: Tensor, x: Tensor, scale: Tensor, threshold: Tensor, spikes: Tensor, reset: str) -> Tensor | None:
    """`Record.leak_gradient` of g, drives and spikes [T, B, ...]; None where torch has to do it."""
    cpu = kernels(g)
    if cpu is None or not g.dtype == x.dtype == spikes.dtype:
        return None
    per_neuron = (_per_neuron(value, g.shape[2:]) for value in (scale, threshold))
    given, sums = (_array(g), _array(x), *per_neuron, _array(spikes), RESETS.index(reset)), []  # one of each thread

    def work(first: int, end: int) -> None:
        sums.append(torch.zeros(g[0, 0].numel(), dtype=torch.float32))
        cpu.leak(first, end, *given, sums[-1].numpy())

    shared(g.shape[1], work)
    return sum(sums).view(g.shape[2:])


def transposed(weight: Tensor) -> Tensor:
    """W^T in memory of its own."""
    return weight.detach().T.contiguous()


def in_columns(weight: Tensor, width: int) -> Tensor:
    """W^T, flat, in blocks of `width` outputs of a weight [outputs, inputs] on a CPU, filled up with zeros: see
    `cpu.columns`. It is kept for the next part of time, unless a step is to take little memory."""

    def made(weight: Tensor) -> Tensor:
        outputs, inputs = weight.shape
        out = empty(-(-outputs // width) * width * inputs)
        cpu, given = kernels(out), (weight.detach().contiguous().flatten().numpy(), outputs, inputs, out.numpy(), width)
        shared(-(-outputs // width), lambda first, end: cpu.columns(first, end, *given))
        return out

    return made(weight) if lean() else once(weight, f"columns {width}", made)


def threads(rows: int) -> int:
    """That share rows on a CPU, as many as torch uses."""
    return max(1, min(torch.get_num_threads(), rows))


def shared(rows: int, work: Callable[[int, int], Any], parts: int | None = None) -> None:
    """Calls work(first, end) for ranges that make up all rows, as equal as can be, each in a thread. parts: how many;
    None: as many as torch uses."""
    parts = threads(rows) if parts is None else parts
    ends = [part * rows // parts for part in range(parts + 1)]
    others = [_workers().submit(work, *ends[i : i + 2]) for i in range(1, parts)]
    work(*ends[:2])
    for other in others:
        other.result()


@lru_cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.cache_clear)  # a child has none of its parent's threads


def leaky(c: Tensor, spikes: Tensor | None, beta: Tensor, reset: str) -> Tensor | None:
    """g_t = c_t + beta k_t g_{t+1} [T, B, ...]; None where the reference has to do it."""
    if beta.ndim > c.ndim - 2:
        return None
    reset = "none" if spikes is None else reset  # without spikes nothing is reset
    gpu, cpu = _gpu(c), kernels(c)
    if gpu is not None:
        return gpu.leaky(c, spikes, beta, reset)
    if cpu is None:
        return None
    out, later = empty(*c.shape), torch.zeros(c.shape[1:], dtype=torch.float32)
    arrays = [_array(c), _array(c if spikes is None else spikes)]
    given = *arrays, _per_neuron(beta, c.shape[2:]), RESETS.index(reset), _rows(later), _array(out)
    shared(c.shape[1], lambda first, end: cpu.leaky(first, end, *given))
    return out


def window_sums(x: Tensor, windows: tuple[Pair, Pair, Pair], size: Pair) -> tuple[Tensor, bool] | None:
    """Sums over the windows of pictures x [..., high, across], and whether all of x is 0 or 1; None where torch has to
    do it. windows: their size, step and margin; size: of the result."""
    if kernels(x) is None:
        return None
    from ulr_snn.kernels.windows import fired

    out, spikes = empty(*x.shape[:-2], *size), []
    pictures, sums = (t.contiguous().view(-1, *t.shape[-2:]).numpy() for t in (x, out))
    shared(len(pictures), lambda first, end: spikes.append(fired(first, end, pictures, windows, sums)))
    return out, all(spikes)


def window_credit(x: Tensor, total: Tensor, g: Tensor, windows: tuple[Pair, Pair, Pair]) -> Tensor | None:
    """Gradient of spikes x from that of the OR over windows, whose sums are `total`; None where torch has to do it."""
    if kernels(x) is None or g.dtype != x.dtype or total.dtype != x.dtype:
        return None
    from ulr_snn.kernels.windows import credited

    out = empty(*x.shape)
    given = [t.detach().contiguous().view(-1, *t.shape[-2:]).numpy() for t in (x, total, g)]
    to = out.view(-1, *x.shape[-2:]).numpy()
    shared(len(to), lambda first, end: credited(first, end, *given, windows, to))
    return out


def turned(x: Tensor) -> Tensor:
    """[n, high, across, channels] -> [n, channels, high, across], its own memory: what channels last are put in order
    by, and, of [n, 1, channels, positions], the other way round."""
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


def _array(sequence: Tensor) -> Any:
    """[T, B, N] of [T, B, ...], its own memory where it can be."""
    return sequence.detach().contiguous().flatten(2).numpy()


def _rows(state: Tensor) -> Any:
    """[B, N] of [B, ...], its own memory."""
    return state.view(len(state), -1).numpy()


def _per_neuron(value: Tensor, features: torch.Size) -> Any:
    """[N] float32 of what broadcasts against [...]."""
    while value.ndim > len(features) and value.shape[0] == 1:
        value = value[0]
    return value.detach().to(torch.float32).expand(features).reshape(-1).contiguous().numpy()


def _distances(over: Tensor | None) -> Any:
    """Of distances d [K], K filled up to fours: d, 1 / 2dK, e^-d, and 1 / 2dK (1 - e^-2d), but 1 and 0 where e^-d is as
    good as zero, [K, 4] float32; None of none."""
    if over is None:
        return None
    d = over.to(torch.float64).numpy()
    near, share, q = d <= _cpu().NEAR, 1 / (2 * d * len(d)), np.exp(-d)
    rows = np.zeros((-(-len(d) // 4) * 4, 4), np.float32)
    rows[:, 2] = 1
    rows[: len(d)] = np.stack([d, share, np.where(near, q, 1), np.where(near, share * (1 - q * q), 0)], 1)
    return rows


def _own(lengths: Tensor | None, steps: int, rows: int) -> Any:
    return (torch.full((rows,), steps) if lengths is None else lengths.to(torch.int64)).numpy()
