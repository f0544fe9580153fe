"""The time scan of a layer and the reverse filter of its credit as one Triton kernel each, for GPUs.

`reference.py` and `credit/recurrence.py` define the equations. A program runs a block of neurons of one row of the
batch through all time steps. Its state is in registers, so that it reads and writes every number once. Membranes and
credit are float32 inside, for every dtype of the sequences.

Features [...] of sequences [T, B, ...] are flattened to N neurons. beta, threshold and scale are numbers or broadcast
against [...]; beta lies in [0, 1]. The kernels are not differentiable.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulr_snn.errors import UsageError
from ulr_snn.kernels.bits import WORD
from ulr_snn.kernels.state import RESETS

LAWS = ("logistic", "gaussian")
MOST = 256  # largest number of neurons in a program
ROWS, BLOCK, CHUNK = 16, 64, 32  # of a recurrent product: rows in a program, neurons and sources at a time

# -- one neuron at one time step ----------------------------------------------------------------------------

GOLDEN = tl.constexpr(0x9E3779B9)  # these three equal those in `ulr_snn.noise.random`, which imports this package
M1, M2 = tl.constexpr(0x7FEB352D), tl.constexpr(0x846CA68B)
BITS = tl.constexpr(WORD)


@triton.jit
def uniform(n, row1, row2):
    """Returns uniforms on (0, 1) with 23 bits for neurons n (int32), from their row's two words (uint32) at one time.
    They equal those of `ulr_snn.noise.random.Noise.uniform` bit for bit."""
    h = n.to(tl.uint32) * GOLDEN + row1
    h ^= h >> 16
    h *= M1
    h += row2
    h ^= h >> 15
    h *= M2
    h ^= h >> 16
    return ((h >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23; both steps are exact in float32


@triton.jit
def probability(x, LAW: tl.constexpr):
    """Returns F(x)."""
    if LAW == "logistic":
        return tl.sigmoid(x)
    else:
        return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)  # the error in the tails is below the grid of the uniforms


@triton.jit
def slope_of(x, over, K, LAW: tl.constexpr):
    """Returns F'(x), or the mean of the secants of F over K distances. For the logistic law each secant is
    (1 - e^-2d) / 2d F(d - x) F(d + x), in which nothing cancels."""
    if over is not None:
        total = tl.zeros_like(x)
        for k in range(K):
            d = tl.load(over + k)
            if LAW == "logistic":
                total += (1 - tl.exp(-2 * d)) * tl.sigmoid(d - x) * tl.sigmoid(d + x) / (2 * d)
            else:
                total += (probability(x + d, LAW) - probability(x - d, LAW)) / (2 * d)
        return total / K
    elif LAW == "logistic":
        p = tl.sigmoid(x)
        return p * (1 - p)
    else:
        return 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def charge(u, s, arriving, leak, theta, RESET: tl.constexpr):
    """Returns the membranes after a time step. u, s: membranes and spikes of the step before."""
    kept = u * (1 - s) if RESET == "zero" else u
    u = leak * kept + arriving
    if RESET == "subtract":
        u -= theta * s
    return u


@triton.jit
def fires(x, n, row1, row2, mirror, LAW: tl.constexpr):
    """Returns whether neurons n of standardised drives x fire. row1, row2: words of their rows; mirror: whether their
    rows see 1 - uniform, or None."""
    draw = uniform(n, row1, row2)
    if mirror is not None:
        draw = tl.where(mirror, 1 - draw, draw)
    return draw < probability(x, LAW)


@triton.jit
def through_reset(c, g, standard, leak, theta, width, H: tl.constexpr):
    """Returns credit c of spikes plus that by way of the reset of their own neuron. g: credit of the next currents."""
    if H == "subtract":
        c -= theta * g
    if H == "zero":
        c -= leak * (standard * width + theta) * g
    return c


# -- the kernels: one program for each row and block of neurons; None: not given, or not wanted ----------------


@triton.jit
def _forward(
    current,  # [T, B, N]
    beta,  # these three [N]
    threshold,
    scale,
    row1,  # [T, B] int32
    row2,
    mirrored,  # [B] bool
    lengths,  # [B]
    first_membrane,  # [B, N]
    first_spikes,
    spikes,  # from here on written: [T, B, N]
    bits,  # [T, B, ceil(N / 32)]
    x,  # [T, B, N]
    last_membrane,  # [B, N]
    last_spikes,
    T,
    B,
    N,
    RESET: tl.constexpr,
    LAW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, block = tl.program_id(0), tl.program_id(1)
    n = block * BLOCK + tl.arange(0, BLOCK)
    own = n < N
    leak = tl.load(beta + n, mask=own, other=0.0)
    theta = tl.load(threshold + n, mask=own, other=0.0)
    width = tl.load(scale + n, mask=own, other=1.0)
    row = b.to(tl.int64)  # t * B + b; a sequence may have more elements than int32 can count
    state = row * N + n
    u = tl.zeros([BLOCK], tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    if first_membrane is not None:
        u = tl.load(first_membrane + state, mask=own, other=0.0).to(tl.float32)
        s = tl.load(first_spikes + state, mask=own, other=0.0).to(tl.float32)
    last = T
    if lengths is not None:
        last = tl.load(lengths + b)
    mirror = None
    if mirrored is not None:
        mirror = tl.load(mirrored + b) != 0
    words = tl.cdiv(N, BITS)
    word = block * (BLOCK // BITS) + tl.arange(0, BLOCK // BITS)
    for t in range(T):
        at = row * N + n
        u = charge(u, s, tl.load(current + at, mask=own, other=0.0).to(tl.float32), leak, theta, RESET)
        drive = u - theta
        standard = drive / width
        if LAW is None:
            fired = drive > 0
        else:
            first = tl.load(row1 + row).to(tl.uint32, bitcast=True)
            second = tl.load(row2 + row).to(tl.uint32, bitcast=True)
            fired = fires(standard, n, first, second, mirror, LAW)
        fired = fired & own & (t < last)
        s = fired.to(tl.float32)
        if spikes is not None:
            tl.store(spikes + at, s, mask=own)
        if bits is not None:
            lanes = tl.reshape(fired.to(tl.int32), [BLOCK // BITS, BITS]) << tl.arange(0, BITS)[None, :]
            tl.store(bits + row * words + word, tl.sum(lanes, axis=1), mask=word < words)
        if x is not None:
            tl.store(x + at, standard, mask=own)
        row += B
    tl.store(last_membrane + state, u, mask=own)
    tl.store(last_spikes + state, s, mask=own)


@triton.jit
def _reverse(
    a,  # [T, B, N]
    beta,  # these three [N]
    threshold,
    scale,
    slope,  # [T, B, N], as the next three
    x,
    spikes,
    bits,  # [T, B, ceil(N / 32)]
    lengths,  # [B]
    later,  # [B, N]
    over,  # [K], distances of the secants
    total,  # from here on written: [T, B, N]
    currents,
    carry,  # [B, N]
    T,
    B,
    N,
    K,
    H: tl.constexpr,  # what a spike does to its own next membrane: "subtract", "zero" or "none"
    LAW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Runs the reverse filter. Spikes (in either form) are given if the reset is "zero"."""
    b = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    own = n < N
    leak = tl.load(beta + n, mask=own, other=0.0)
    theta = tl.load(threshold + n, mask=own, other=0.0)
    width = tl.load(scale + n, mask=own, other=1.0)
    state = b.to(tl.int64) * N + n
    g = tl.zeros([BLOCK], tl.float32)
    if later is not None:
        g = tl.load(later + state, mask=own, other=0.0).to(tl.float32)
    last = T
    if lengths is not None:
        last = tl.load(lengths + b)
    words = tl.cdiv(N, BITS)
    row = b.to(tl.int64) + (T - 1) * B
    for back in range(T):
        at = row * N + n
        c = tl.load(a + at, mask=own, other=0.0).to(tl.float32)
        standard = c if x is None else tl.load(x + at, mask=own, other=0.0).to(tl.float32)  # without x it is not read
        c = through_reset(c, g, standard, leak, theta, width, H)
        if total is not None:
            tl.store(total + at, c, mask=own)
        if LAW is not None:
            c = tl.where(T - 1 - back < last, c * slope_of(standard, over, K, LAW) / width, 0.0)
        elif slope is not None:
            c *= tl.load(slope + at, mask=own, other=0.0).to(tl.float32)
        kept = leak
        if spikes is not None:
            kept = leak * (1 - tl.load(spikes + at, mask=own, other=0.0).to(tl.float32))
        if bits is not None:
            word = tl.load(bits + row * words + n // BITS, mask=own, other=0)
            kept = leak * (1 - (word >> (n % BITS) & 1).to(tl.float32))
        g = kept * g + c
        tl.store(currents + at, g, mask=own)
        row -= B
    tl.store(carry + state, g, mask=own)


# -- recurrent layers: one program for each block of rows and all neurons ------------------------------------
#
# Within a time step, a program takes one block of neurons after another. It multiplies the last step's spikes (or
# credit) of all neurons of its rows by the block's part of the weights, which stay in the L2 cache. Blocks exchange
# spikes and credit in global memory, in two slots in turn, one to read and one to write: one barrier a step is enough.


@triton.jit
def product(values, weight, b, n, N, here, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Returns the product [ROWS, BLOCK] of rows b of values [B, N] and columns n of a weight [N, N]. here: which rows
    are rows of the batch."""
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, N, CHUNK):
        k = first + tl.arange(0, CHUNK)
        given = tl.load(values + b[:, None] * N + k[None, :], mask=here[:, None] & (k < N)[None, :], other=0.0)
        part = tl.load(weight + k[:, None] * N + n[None, :], mask=(k < N)[:, None] & (n < N)[None, :], other=0.0)
        # Three products of tensor cores are nearly as exact as one in float32; a single one is not.
        total = tl.dot(given, part, total, input_precision="tf32x3")
    return total


@triton.jit
def _recurrent_forward(
    current,  # [T, B, N]
    weight,  # [N, N], from each source to all targets
    beta,  # these three [N]
    threshold,
    scale,
    row1,  # [T, B] int32
    row2,
    mirrored,  # [B] bool
    lengths,  # [B]
    membrane,  # [B, N] float32, before the first step; becomes that after the last
    before,  # [2, B, N] float32, spikes before the first step in slot 0; those after the last are in slot T % 2
    spikes,  # from here on written: [T, B, N]
    x,
    fed_back,
    T,
    B,
    N,
    SLOT,  # B * N
    RESET: tl.constexpr,
    LAW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = b < B
    row = b  # t * B + b
    last = T
    if lengths is not None:
        last = tl.load(lengths + b, mask=here, other=0)[:, None]
    mirror = None
    if mirrored is not None:
        mirror = (tl.load(mirrored + b, mask=here, other=0) != 0)[:, None]
    for t in range(T):
        old, new = before + t % 2 * SLOT, before + (1 - t % 2) * SLOT
        for start in range(0, N, BLOCK):
            n = start + tl.arange(0, BLOCK)
            own = here[:, None] & (n < N)[None, :]
            leak = tl.load(beta + n, mask=n < N, other=0.0)[None, :]
            theta = tl.load(threshold + n, mask=n < N, other=0.0)[None, :]
            width = tl.load(scale + n, mask=n < N, other=1.0)[None, :]
            at, state = row[:, None] * N + n[None, :], b[:, None] * N + n[None, :]
            recurrent = product(old, weight, b, n, N, here, ROWS, BLOCK, CHUNK)
            arriving = tl.load(current + at, mask=own, other=0.0).to(tl.float32) + recurrent
            u = tl.load(membrane + state, mask=own, other=0.0)
            u = charge(u, tl.load(old + state, mask=own, other=0.0), arriving, leak, theta, RESET)
            drive = u - theta
            standard = drive / width
            if LAW is None:
                fired = drive > 0
            else:
                first = tl.load(row1 + row, mask=here, other=0).to(tl.uint32, bitcast=True)[:, None]
                second = tl.load(row2 + row, mask=here, other=0).to(tl.uint32, bitcast=True)[:, None]
                fired = fires(standard, n[None, :], first, second, mirror, LAW)
            s = (fired & own & (t < last)).to(tl.float32)
            tl.store(membrane + state, u, mask=own)
            tl.store(new + state, s, mask=own)
            tl.store(spikes + at, s, mask=own)
            tl.store(x + at, standard, mask=own)
            tl.store(fed_back + at, recurrent, mask=own)
        tl.debug_barrier()  # all neurons have written before the next step reads
        row += B


@triton.jit
def _recurrent_reverse(
    a,  # [T, B, N]
    weight,  # [N, N], from each target to all sources
    beta,  # these three [N]
    threshold,
    scale,
    x,  # [T, B, N]
    spikes,
    lengths,  # [B]
    over,  # [K], distances of the secants
    carry,  # [2, B, N] float32, credit of the currents of the step after the last in slot T % 2; of the first in slot 0
    total,  # from here on written: [T, B, N]
    currents,
    T,
    B,
    N,
    SLOT,
    K,
    H: tl.constexpr,
    LAW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = b < B
    row = b + (T - 1) * B
    last = T
    if lengths is not None:
        last = tl.load(lengths + b, mask=here, other=0)[:, None]
    for back in range(T):
        t = T - 1 - back
        old, new = carry + (1 - t % 2) * SLOT, carry + t % 2 * SLOT
        for start in range(0, N, BLOCK):
            n = start + tl.arange(0, BLOCK)
            own = here[:, None] & (n < N)[None, :]
            leak = tl.load(beta + n, mask=n < N, other=0.0)[None, :]
            theta = tl.load(threshold + n, mask=n < N, other=0.0)[None, :]
            width = tl.load(scale + n, mask=n < N, other=1.0)[None, :]
            at, state = row[:, None] * N + n[None, :], b[:, None] * N + n[None, :]
            g = tl.load(old + state, mask=own, other=0.0)
            standard = tl.load(x + at, mask=own, other=0.0).to(tl.float32)
            c = tl.load(a + at, mask=own, other=0.0).to(tl.float32)
            c += product(old, weight, b, n, N, here, ROWS, BLOCK, CHUNK)
            c = through_reset(c, g, standard, leak, theta, width, H)
            if total is not None:
                tl.store(total + at, c, mask=own)
            c = tl.where(t < last, c * slope_of(standard, over, K, LAW) / width, 0.0)
            kept = leak
            if spikes is not None:
                kept = leak * (1 - tl.load(spikes + at, mask=own, other=0.0).to(tl.float32))
            g = kept * g + c
            tl.store(new + state, g, mask=own)
            tl.store(currents + at, g, mask=own)
        tl.debug_barrier()
        row -= B


# -- launchers ----------------------------------------------------------------------------------------------


@dataclass
class Scanned:
    """The result of `lif_forward`. An output that is not wanted is None."""

    spikes: Tensor | None  # [T, B, ...] in the current's dtype
    bits: Tensor | None  # [T, B, ceil(N / 32)] int32, with the layout of `pack_bits` of the flattened features
    x: Tensor | None  # standardised drive [T, B, ...]
    state: tuple[Tensor, Tensor]  # membrane and spikes after the last step, both [B, ...] float32
    fed_back: Tensor | None = None  # recurrent current [T, B, N]


def lif_forward(
    current: Tensor,
    beta: Tensor | float,
    threshold: Tensor | float,
    reset: str,
    scale: Tensor | float = 1.0,
    law: str | None = None,
    words: tuple[Tensor, Tensor] | None = None,
    mirrored: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
    dense: bool = True,
    packed: bool = False,
    x_dtype: torch.dtype | None = torch.float32,
) -> Scanned:
    """Runs a layer without recurrent weights over time, and draws its spikes: s_t = 1 where U < F(x_t), with
    x = (u - threshold) / scale and F the law.

    current: [T, B, ...] float32 or bfloat16.
    law: "logistic", "gaussian", or None: a neuron fires where u > threshold.
    words: `Noise.words` of these time steps, [T, B] int32 each; mirrored: [B] bool, rows that see 1 - U. The kernel
        does not support Sobol points.
    state: membrane and spikes [B, ...] of the step before the first; None: zeros.
    lengths: [B], counted from the first step here; row b does not fire from step t = lengths[b] on.
    dense, packed, x_dtype: whether to return spikes and bits, and the dtype of x (None: x is not returned).
    Raises UsageError for another dtype, reset, law or shape, and for a law without words.
    """
    _check(current, reset, law)
    grid, sizes, block = _launch(current)
    per_neuron = [_per_neuron(value, current) for value in (beta, threshold, scale)]
    out = Scanned(
        torch.empty_like(current, memory_format=torch.contiguous_format) if dense else None,
        current.new_empty(_shape_of_bits(current), dtype=torch.int32) if packed else None,
        None if x_dtype is None else current.new_empty(current.shape, dtype=x_dtype),
        (_row_like(current), _row_like(current)),
    )
    given = _words(current, law, words)
    given += [_given(value, current.shape[1:2]) for value in (mirrored, lengths)]
    given += [_given(value, current.shape[1:]) for value in ((None, None) if state is None else state)]
    written = (out.spikes, out.bits, out.x, *out.state)
    with torch.cuda.device_of(current):
        _forward[grid](_given(current, current.shape), *per_neuron, *given, *written, *sizes, reset, law, block)
    return out


def recurrent_forward(
    current: Tensor,
    weight: Tensor,
    beta: Tensor | float,
    threshold: Tensor | float,
    reset: str,
    scale: Tensor | float = 1.0,
    law: str | None = None,
    words: tuple[Tensor, Tensor] | None = None,
    mirrored: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    lengths: Tensor | None = None,
) -> Scanned:
    """Runs a layer with recurrent weights V [N, N] over time: as `lif_forward` for J_t + V s_{t-1}, with x in float32
    and spikes that are not packed. One program runs 16 rows, so few rows leave a GPU idle.

    current: [T, B, N] float32 or bfloat16. Raises the errors of `lif_forward`.
    """
    _check(current, reset, law)
    given, (row1, row2) = _recurrent(current, weight, beta, threshold, scale), _words(current, law, words)
    steps, rows, neurons = current.shape
    membrane, before = current.new_zeros(rows, neurons, dtype=torch.float32), _slots(current)
    if state is not None:
        membrane.copy_(state[0])
        before[0].copy_(state[1])
    given += [row1, row2, *(_given(value, (rows,)) for value in (mirrored, lengths)), membrane, before]
    spikes, fed_back = torch.empty_like(given[0]), torch.empty_like(given[0])
    x = torch.empty_like(spikes, dtype=torch.float32)
    with torch.cuda.device_of(current):
        _recurrent_forward[(triton.cdiv(rows, ROWS),)](
            *given, spikes, x, fed_back, steps, rows, neurons, rows * neurons, reset, law, ROWS, BLOCK, CHUNK
        )
    return Scanned(spikes, None, x, (membrane, before[steps % 2]), fed_back)


def reverse_filter(
    a: Tensor,
    beta: Tensor | float,
    threshold: Tensor | float,
    reset: str,
    slope: Tensor | None = None,
    x: Tensor | None = None,
    scale: Tensor | float = 1.0,
    law: str | None = None,
    spikes: Tensor | None = None,
    bits: Tensor | None = None,
    later: Tensor | None = None,
    lengths: Tensor | None = None,
    with_total: bool = True,
    over: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Runs credit through a layer's own reset, from the last step to the first (`Recurrence.credit` without recurrent
    weights): total_t = a_t + h_t g_{t+1}, g_t = beta k_t g_{t+1} + total_t p'_t.

    a: [T, B, ...] float32 or bfloat16, credit of the spikes.
    slope: p' per unit of membrane [T, B, ...]. With law "logistic" or "gaussian" instead of slope, p' is the law's
        density at x divided by scale, and 0 for row b from step lengths[b] on. over: distances [K], whose secants of
        the law replace its density.
    x: standardised drive [T, B, ...], for a law, and for reset "zero", which needs the membrane x scale + threshold.
    spikes [T, B, ...], or bits [T, B, ceil(N / 32)] as from `lif_forward`: for reset "zero".
    later: g of the step after the last [B, ...]; None: zeros.
    Returns total (None without with_total) and g, both in a's shape and dtype, and g of the first step [B, ...] in
    float32, which is `later` for the steps before.
    Raises UsageError for another dtype, reset, law or shape, and if one of these is missing.
    """
    _check(a, reset, law)
    if (slope is None) == (law is None):
        raise UsageError("reverse_filter takes either slope or law")
    if x is None and (law is not None or reset == "zero"):
        raise UsageError("reverse_filter needs x for a law, and for reset 'zero'")
    cut = _cut(reset, spikes, bits)
    total = torch.empty_like(a, memory_format=torch.contiguous_format) if with_total else None
    needed = x if law is not None or reset == "zero" else None
    given = slope, needed, *cut, over, lengths, later, total
    currents, carry = _filter(a, beta, threshold, scale, *given, reset, law)
    return total, currents, carry


def recurrent_reverse(
    a: Tensor,
    weight: Tensor,
    beta: Tensor | float,
    threshold: Tensor | float,
    reset: str,
    x: Tensor,
    scale: Tensor | float,
    law: str,
    spikes: Tensor,
    later: Tensor | None = None,
    lengths: Tensor | None = None,
    with_total: bool = True,
    over: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Runs credit through a layer's reset and its recurrent current: as `reverse_filter` with a law and spikes, for
    total_t = a_t + h_t g_{t+1} + C g_{t+1} with the map C [N, N]."""
    _check(a, reset, law)
    (steps, rows, neurons), given = a.shape, _recurrent(a, weight, beta, threshold, scale)
    given += [_given(value, a.shape) for value in (x, spikes if reset == "zero" else None)]
    (over, count), carry = _distances(over), _slots(a)
    if later is not None:
        carry[steps % 2].copy_(later)
    total, currents = torch.empty_like(given[0]) if with_total else None, torch.empty_like(given[0])
    given += [_given(lengths, (rows,)), over, carry, total, currents]
    with torch.cuda.device_of(a):
        _recurrent_reverse[(triton.cdiv(rows, ROWS),)](
            *given, steps, rows, neurons, rows * neurons, count, reset, law, ROWS, BLOCK, CHUNK
        )
    return total, currents, carry[0]


def leaky_filter(
    c: Tensor,
    beta: Tensor | float,
    reset: str,
    spikes: Tensor | None = None,
    bits: Tensor | None = None,
    later: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the filter inside the neuron at fixed spikes, g_t = c_t + beta k_t g_{t+1}, for the drives' gradient
    c [T, B, ...]. Returns g and g of the first step. The other arguments are those of `reverse_filter`."""
    _check(c, reset, None)
    return _filter(c, beta, 0.0, 1.0, None, None, *_cut(reset, spikes, bits), None, None, later, None, "none", None)


def _filter(
    a, beta, threshold, scale, slope, x, spikes, bits, over, lengths, later, total, h, law
) -> tuple[Tensor, Tensor]:
    grid, sizes, block = _launch(a)
    per_neuron = [_per_neuron(value, a) for value in (beta, threshold, scale)]
    given = [_given(value, a.shape) for value in (slope, x, spikes)]
    given += [_given(bits, _shape_of_bits(a)), _given(lengths, a.shape[1:2]), _given(later, a.shape[1:])]
    currents, carry = torch.empty_like(a, memory_format=torch.contiguous_format), _row_like(a)
    (over, count), written = _distances(over), (total, currents, carry)
    with torch.cuda.device_of(a):
        _reverse[grid](_given(a, a.shape), *per_neuron, *given, over, *written, *sizes, count, h, law, block)
    return currents, carry


def _check(sequence: Tensor, reset: str, law: str | None) -> None:
    if sequence.dtype not in (torch.float32, torch.bfloat16):
        raise UsageError(f"the kernels got {sequence.dtype}; they take float32 and bfloat16")
    if reset not in RESETS:
        raise UsageError(f"the kernels got reset={reset!r}; it is one of {', '.join(RESETS)}")
    if law is not None and law not in LAWS:
        raise UsageError(f"the kernels got law={law!r}; it is None or one of {', '.join(LAWS)}")


def _words(current: Tensor, law: str | None, words: tuple[Tensor, Tensor] | None) -> list[Tensor | None]:
    """Returns the random words if there is a law; else None twice."""
    if law is None:
        return [None, None]
    if words is None:
        raise UsageError(f"law={law!r} draws spikes; give words, the random words of every row and step")
    return [_given(word, current.shape[:2]) for word in words]


def _recurrent(
    sequence: Tensor, weight: Tensor, beta: Tensor | float, threshold: Tensor | float, scale: Tensor | float
) -> list[Any]:
    """Returns the first five arguments of a recurrent kernel."""
    per_neuron = [_per_neuron(value, sequence) for value in (beta, threshold, scale)]
    wide = weight.detach().to(torch.float32).T
    return [_given(sequence, sequence.shape), _given(wide, sequence.shape[2:] * 2), *per_neuron]


def _slots(sequence: Tensor) -> Tensor:
    """Returns zeros [2, B, N] float32."""
    return sequence.new_zeros(2, *sequence.shape[1:], dtype=torch.float32)


def _cut(reset: str, spikes: Tensor | None, bits: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Returns spikes and bits, of which only one is not None, for reset "zero"; otherwise neither."""
    if reset != "zero":
        return None, None
    if spikes is None and bits is None:
        raise UsageError("reset 'zero' needs spikes or bits")
    return spikes, bits if spikes is None else None


def _launch(sequence: Tensor) -> tuple[tuple[int, int], tuple[int, int, int], int]:
    """Returns the grid, the sizes (T, B, N), and the number of neurons in a program."""
    steps, rows = sequence.shape[:2]
    neurons = sequence.shape[2:].numel()
    block = min(MOST, max(WORD, triton.next_power_of_2(neurons)))
    return (rows, triton.cdiv(neurons, block)), (steps, rows, neurons), block


def _per_neuron(value: Tensor | float, sequence: Tensor) -> Tensor:
    """Broadcasts a value to [N] float32."""
    if not isinstance(value, Tensor):
        value = torch.full((), value, device=sequence.device)  # a copy from the CPU would wait for the GPU
    return value.detach().to(sequence.device, torch.float32).expand(sequence.shape[2:]).reshape(-1).contiguous()


def _distances(over: Tensor | None) -> tuple[Tensor | None, int]:
    """Returns distances [K] float32, and K."""
    return (None, 0) if over is None else (over.detach().to(torch.float32).contiguous(), len(over))


def _row_like(sequence: Tensor) -> Tensor:
    """Returns [B, ...] float32, not initialised."""
    return sequence.new_empty(sequence.shape[1:], dtype=torch.float32)


def _shape_of_bits(sequence: Tensor) -> tuple[int, int, int]:
    return *sequence.shape[:2], triton.cdiv(sequence.shape[2:].numel(), WORD)


def _given(value: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Returns the contiguous value. Raises UsageError for another shape, beyond whose end a kernel would read."""
    if value is None:
        return None
    if value.shape != torch.Size(shape):
        raise UsageError(f"the kernels got shape {tuple(value.shape)} in a place of shape {tuple(shape)}")
    return value.detach().contiguous()
