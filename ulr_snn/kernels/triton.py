"""The time scan of a layer and the reverse filter of its credit as one Triton kernel each, for GPUs.

`reference.py` and `credit/recurrence.py` define the equations. A program runs a block of neurons of one row of the
batch through all time steps. Its state is in registers, so that it reads and writes every number once. Membranes and
credit are float32 inside, for every dtype of the sequences.

Features [...] of sequences [T, B, ...] are flattened to N neurons. beta, threshold and scale are numbers or broadcast
against [...]; beta lies in [0, 1]. The kernels are not differentiable.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulr_snn.errors import UsageError
from ulr_snn.kernels.bits import WORD
from ulr_snn.kernels.state import RESETS

LAWS = ("logistic", "gaussian")
MOST = 256  # largest number of neurons in a program

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
def density(x, LAW: tl.constexpr):
    """Returns f(x) = F'(x)."""
    if LAW == "logistic":
        p = tl.sigmoid(x)
        return p * (1 - p)
    else:
        return 0.3989422804014327 * tl.exp(-0.5 * x * x)


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
    if mirrored is not None:
        mirror = tl.load(mirrored + b) != 0
    words = tl.cdiv(N, BITS)
    word = block * (BLOCK // BITS) + tl.arange(0, BLOCK // BITS)
    for t in range(T):
        at = row * N + n
        kept = u * (1 - s) if RESET == "zero" else u
        u = leak * kept + tl.load(current + at, mask=own, other=0.0).to(tl.float32)
        if RESET == "subtract":
            u -= theta * s
        drive = u - theta
        standard = drive / width
        if LAW is None:
            fires = drive > 0
        else:
            first = tl.load(row1 + row).to(tl.uint32, bitcast=True)
            second = tl.load(row2 + row).to(tl.uint32, bitcast=True)
            draw = uniform(n, first, second)
            if mirrored is not None:
                draw = tl.where(mirror, 1 - draw, draw)
            fires = draw < probability(standard, LAW)
        fires = fires & own & (t < last)
        s = fires.to(tl.float32)
        if spikes is not None:
            tl.store(spikes + at, s, mask=own)
        if bits is not None:
            lanes = tl.reshape(fires.to(tl.int32), [BLOCK // BITS, BITS]) << tl.arange(0, BITS)[None, :]
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
    total,  # from here on written: [T, B, N]
    currents,
    carry,  # [B, N]
    T,
    B,
    N,
    H: tl.constexpr,  # what a spike does to its own next membrane: "subtract", "zero" or "none"
    LAW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Runs the reverse filter. Spikes (in either form) are given if the reset is to zero."""
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
        if x is not None:
            standard = tl.load(x + at, mask=own, other=0.0).to(tl.float32)
        if H == "subtract":
            c -= theta * g
        if H == "zero":
            c -= leak * (standard * width + theta) * g
        if total is not None:
            tl.store(total + at, c, mask=own)
        if LAW is not None:
            c = tl.where(T - 1 - back < last, c * density(standard, LAW) / width, 0.0)
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


# -- launchers ----------------------------------------------------------------------------------------------


@dataclass
class Scanned:
    """The result of `lif_forward`. An output that is not wanted is None."""

    spikes: Tensor | None  # [T, B, ...] in the current's dtype
    bits: Tensor | None  # [T, B, ceil(N / 32)] int32, with the layout of `pack_bits` of the flattened features
    x: Tensor | None  # standardised drive [T, B, ...]
    state: tuple[Tensor, Tensor]  # membrane and spikes after the last step, both [B, ...] float32


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
    if law is not None and words is None:
        raise UsageError(f"law={law!r} draws spikes; give words, the random words of every row and step")
    grid, sizes, block = _launch(current)
    per_neuron = [_per_neuron(value, current) for value in (beta, threshold, scale)]
    out = Scanned(
        torch.empty_like(current, memory_format=torch.contiguous_format) if dense else None,
        current.new_empty(_shape_of_bits(current), dtype=torch.int32) if packed else None,
        None if x_dtype is None else current.new_empty(current.shape, dtype=x_dtype),
        (_row_like(current), _row_like(current)),
    )
    drawn = (None, None) if law is None or words is None else words
    given = [_given(word, current.shape[:2]) for word in drawn]
    given += [_given(value, current.shape[1:2]) for value in (mirrored, lengths)]
    given += [_given(value, current.shape[1:]) for value in ((None, None) if state is None else state)]
    written = (out.spikes, out.bits, out.x, *out.state)
    with torch.cuda.device_of(current):
        _forward[grid](_given(current, current.shape), *per_neuron, *given, *written, *sizes, reset, law, block)
    return out


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
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Runs credit through a layer's own reset, from the last step to the first (`Recurrence.credit` without recurrent
    weights): total_t = a_t + h_t g_{t+1}, g_t = beta k_t g_{t+1} + total_t p'_t.

    a: [T, B, ...] float32 or bfloat16, credit of the spikes.
    slope: p' per unit of membrane [T, B, ...]. With law "logistic" or "gaussian" instead of slope, p' is the law's
        density at x divided by scale, and 0 for row b from step lengths[b] on.
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
    currents, carry = _filter(a, beta, threshold, scale, slope, needed, *cut, lengths, later, total, reset, law)
    return total, currents, carry


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
    return _filter(c, beta, 0.0, 1.0, None, None, *_cut(reset, spikes, bits), None, later, None, "none", None)


def _filter(a, beta, threshold, scale, slope, x, spikes, bits, lengths, later, total, h, law) -> tuple[Tensor, Tensor]:
    grid, sizes, block = _launch(a)
    per_neuron = [_per_neuron(value, a) for value in (beta, threshold, scale)]
    given = [_given(value, a.shape) for value in (slope, x, spikes)]
    given += [_given(bits, _shape_of_bits(a)), _given(lengths, a.shape[1:2]), _given(later, a.shape[1:])]
    currents, carry = torch.empty_like(a, memory_format=torch.contiguous_format), _row_like(a)
    with torch.cuda.device_of(a):
        _reverse[grid](_given(a, a.shape), *per_neuron, *given, total, currents, carry, *sizes, h, law, block)
    return currents, carry


def _check(sequence: Tensor, reset: str, law: str | None) -> None:
    if sequence.dtype not in (torch.float32, torch.bfloat16):
        raise UsageError(f"the kernels got {sequence.dtype}; they take float32 and bfloat16")
    if reset not in RESETS:
        raise UsageError(f"the kernels got reset={reset!r}; it is one of {', '.join(RESETS)}")
    if law is not None and law not in LAWS:
        raise UsageError(f"the kernels got law={law!r}; it is None or one of {', '.join(LAWS)}")


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
