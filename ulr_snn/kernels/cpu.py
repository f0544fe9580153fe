"""The time scans on a CPU, fused by numba. One pass over a row's neurons and time steps draws, fires and resets.

`reference.py` defines their results. Each kernel processes the rows (samples, copies) from `first` to `end`, so that
threads can share the rows (`team.shared`). Loops over neurons are short and without branches, so that they become
vector instructions. All arrays are float32, [T, B, N] with features flattened.
"""

import math

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

# Laws of firing; KNOWN means given spikes. The Gaussian law is None, since numba compiles a separate kernel for None
# and drops the code of the other laws from it.
LOGISTIC, DETERMINISTIC, KNOWN = 0, 1, 2
SUBTRACT, ZERO, NONE = 0, 1, 2  # resets

_f, _u = np.float32, np.uint32
_ONE, _HALF, _BIT = _f(1), _f(0.5), _f(2.0**-23)
_SIGN = np.int32(-(2**31))
_LOG2E, _LN2_HIGH, _LN2_LOW = _f(1.44269504), _f(0.693359375), _f(-2.12194440e-4)
_FARTHEST = _f(80)  # largest argument of exp, whose result fits float32
NEAR = _f(60)  # largest distance d for which e^-|x| / e^-d differs from zero wherever it matters
_LEAST_SLOPE, _LEAST_CREDIT = _f(1e-25), _f(1e-30)  # smaller values become zero, since denormal numbers are slow
_M1, _M2, GOLDEN = _u(0x7FEB352D), _u(0x846CA68B), _u(0x9E3779B9)
BLOCK = 64  # outputs that one thread sums in the cache
LINE = 16  # float32 numbers in a cache line
TILE = 4  # rows whose products with LINE columns stay in registers together
FUSED = {"contract"}  # a product and a sum may be one instruction, but not where spikes are drawn, which must not vary


def compiled(**options):
    """Decorates a function with numba.njit, with a cache on disk if its directory is writable."""

    def decorate(function):
        try:
            return numba.njit(cache=True, error_model="numpy", **options)(function)
        except RuntimeError:  # no directory is writable
            return numba.njit(error_model="numpy", **options)(function)

    return decorate


# -- vectors: loops over a few adjacent numbers of flat arrays, written as vector instructions. The compiler's code for
# such short loops, and for sums that could stay in registers, is several times as slow. They are in this file, since
# numba's cache of a compiled kernel detects only changes of the kernel's own file.


def _vector(array, context, builder, kind, at, width):
    """Returns a pointer to `width` numbers of an array of this type, from index `at`."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), ir.VectorType(ir.FloatType(), width).as_pointer())


def _number(array, context, builder, kind, at):
    """Loads the number of an array of this type at index `at`."""
    return builder.load(builder.gep(context.make_array(kind)(context, builder, array).data, [at]))


def _spread(builder, value, kind):
    """Returns a vector of this type with `value` in all places."""
    blank = ir.Constant(kind, ir.Undefined)
    single = builder.insert_element(blank, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(single, blank, _mask(*[0] * kind.count))


def _mask(*places):
    return ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places)


def _adder(width):
    """Makes add(to, t, source, s, value): to[t : t + width] += value * source[s : s + width], for flat arrays, as one
    vector."""

    @intrinsic
    def add(typing, to, t, source, s, value):
        def code(context, builder, signature, arguments):
            to, t, source, s, value = arguments
            kind = ir.VectorType(ir.FloatType(), width)
            at = _vector(to, context, builder, signature.args[0], t, width)
            numbers = builder.load(_vector(source, context, builder, signature.args[2], s, width), align=4)
            product = builder.fmul(numbers, _spread(builder, value, kind))
            builder.store(builder.fadd(builder.load(at, align=4), product), at, align=4)
            return context.get_dummy_value()

        return numba.void(to, t, source, s, value), code

    return add


@intrinsic
def _turn4(typing, to, t, to_step, source, s, step):
    """Sets to[t + j to_step + i] = source[s + i step + j] for i, j < 4, for flat arrays."""

    def code(context, builder, signature, arguments):
        to, t, to_step, source, s, step = arguments

        def row(array, kind, start, by, i):
            at = builder.add(start, builder.mul(by, ir.Constant(by.type, i)))
            return _vector(array, context, builder, kind, at, 4)

        a, b, c, d = (builder.load(row(source, signature.args[3], s, step, i), align=4) for i in range(4))
        low, high = _mask(0, 4, 1, 5), _mask(2, 6, 3, 7)
        for i, half in enumerate((low, high)):
            above, below = builder.shuffle_vector(a, b, half), builder.shuffle_vector(c, d, half)
            for j, places in enumerate((_mask(0, 1, 4, 5), _mask(2, 3, 6, 7))):
                found = builder.shuffle_vector(above, below, places)
                builder.store(found, row(to, signature.args[0], t, to_step, 2 * i + j), align=4)
        return context.get_dummy_value()

    return numba.void(to, t, to_step, source, s, step), code


def _summer(width):
    """Makes weighted(out, o, start, z, source, s, step, places, values, k, end): out[o : o + width] = start[z : z +
    width] + sum over k <= i < end of values[i] * source[s + places[i] * step : ... + width], summed in registers."""

    @intrinsic
    def weighted(typing, out, o, start, z, source, s, step, places, values, k, end):
        def code(context, builder, signature, arguments):
            out, o, start, z, source, s, step, places, values, k, end = arguments
            kinds, kind = signature.args, ir.VectorType(ir.FloatType(), width)
            total = cgutils.alloca_once(builder, kind)
            builder.store(builder.load(_vector(start, context, builder, kinds[2], z, width), align=4), total)
            with cgutils.for_range_slice(builder, k, end, ir.Constant(k.type, 1)) as (i, _):
                place = builder.sext(_number(places, context, builder, kinds[7], i), step.type)
                value = _spread(builder, _number(values, context, builder, kinds[8], i), kind)
                at = _vector(source, context, builder, kinds[4], builder.add(s, builder.mul(place, step)), width)
                product = builder.fmul(builder.load(at, align=4), value)
                builder.store(builder.fadd(builder.load(total), product), total)
            builder.store(builder.load(total), _vector(out, context, builder, kinds[0], o, width), align=4)
            return context.get_dummy_value()

        return numba.void(out, o, start, z, source, s, step, places, values, k, end), code

    return weighted


@intrinsic
def _products(typing, out, o, x, s, step, columns, c, inputs):
    """Sets out[o + i step : ... + LINE] = sum over k < inputs of x[s + i step + k] * columns[c + LINE k : ... + LINE]
    for i < TILE, for flat arrays. The sums stay in registers."""

    def code(context, builder, signature, arguments):
        out, o, x, s, step, columns, c, inputs = arguments
        kinds, kind, fused = signature.args, ir.VectorType(ir.FloatType(), LINE), ("contract",)
        totals = [cgutils.alloca_once(builder, kind) for _ in range(TILE)]

        def row(start, i):
            return builder.add(start, builder.mul(step, ir.Constant(step.type, i)))

        for total in totals:
            builder.store(ir.Constant(kind, [0.0] * LINE), total)
        with cgutils.for_range(builder, inputs) as loop:
            at = builder.add(c, builder.mul(loop.index, ir.Constant(c.type, LINE)))
            line = builder.load(_vector(columns, context, builder, kinds[5], at, LINE), align=4)
            for i, total in enumerate(totals):
                value = _number(x, context, builder, kinds[2], builder.add(row(s, i), loop.index))
                product = builder.fmul(_spread(builder, value, kind), line, flags=fused)
                builder.store(builder.fadd(builder.load(total), product, flags=fused), total)
        for i, total in enumerate(totals):
            at = _vector(out, context, builder, kinds[0], row(o, i), LINE)
            builder.store(builder.load(total), at, align=4)
        return context.get_dummy_value()

    return numba.void(out, o, x, s, step, columns, c, inputs), code


@intrinsic
def _plus(typing, a, b, c):
    """Returns a b + c, without rounding in between where the processor can. Of a sum of two products, the compiler may
    round another one in each copy of a loop, so that a number would depend on its place."""

    def code(context, builder, signature, arguments):
        kind = ir.FloatType()
        function = builder.module.declare_intrinsic("llvm.fmuladd", [kind], ir.FunctionType(kind, [kind] * 3))
        return builder.call(function, arguments)

    return numba.float32(numba.float32, numba.float32, numba.float32), code


_add4, _add16, _add64 = _adder(4), _adder(16), _adder(64)
_weighted16, _weighted64 = _summer(16), _summer(64)


# -- scans -------------------------------------------------------------------------------------------------


@compiled()
def _copy(source, to):
    """Copies one row. A slice assignment would take numba seconds to compile."""
    for n in range(len(source)):
        to[n] = source[n]


@compiled()
def _fill(to, value):
    for n in range(len(to)):
        to[n] = value


@compiled(inline="always")
def _exp(x):
    """Returns exp(x), -80 <= x <= 80, in float32 precision (Cephes' polynomial), with operations that vectorise."""
    n = np.floor(x * _LOG2E + _HALF)
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    y = _f(1.9875691500e-4) * r + _f(1.3981999507e-3)
    y = y * r + _f(8.3334519073e-3)
    y = y * r + _f(4.1665795894e-2)
    y = y * r + _f(1.6666665459e-1)
    y = y * r + _f(5.0000001201e-1)
    y = y * r * r + r + _ONE
    return y * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@compiled(inline="always")
def _sigmoid(x):
    return _ONE / (_ONE + _exp(-min(max(x, -_FARTHEST), _FARTHEST)))


@compiled(inline="always")
def _gaussian(x):
    """Returns Phi(x)."""
    return _f(0.5 * math.erfc(-x * 0.7071067811865476))


@compiled()
def _uniforms(row1, row2, mirrored, counters, out):
    """Computes `Noise.uniform` of one row at one time step. counters: those of neurons, times GOLDEN."""
    for n in range(len(out)):
        h = _u(counters[n] + row1)  # numba widens products and sums, so each result is cut to 32 bits
        h = _u(_u(h ^ (h >> _u(16))) * _M1 + row2)
        h = _u(_u(h ^ (h >> _u(15))) * _M2)
        h = _u(h ^ (h >> _u(16)))
        out[n] = (_f(np.int32(h >> _u(9))) + _HALF) * _BIT
    if mirrored:
        for n in range(len(out)):
            out[n] = _ONE - out[n]


@compiled(inline="always")
def _mix(h):
    """Computes `noise.random._mix`."""
    h = _u(_u(h ^ (h >> _u(16))) * _M1)
    h = _u(_u(h ^ (h >> _u(15))) * _M2)
    return _u(h ^ (h >> _u(16)))


@compiled()
def words(sample, stream, low, high, time, row1, row2):
    """Computes `Noise.words` [T, B] from this time on. low, high: halves of the site's key."""
    for b in range(len(sample)):
        one, two = _mix(_u(_mix(_u(sample[b] + low)) + stream[b])), _mix(_u(_mix(_u(sample[b] + high)) + stream[b]))
        for t in range(len(row1)):
            row1[t, b], row2[t, b] = _mix(_u(one + _u(time + t))), _mix(_u(two + _u(time + t)))


@compiled()
def _draws(law):
    """Returns whether this law draws spikes."""
    if law is None:
        return True
    return law < DETERMINISTIC


@compiled()
def _fire(law, x, uniform, spikes):
    """Computes the spikes of one row at one time step, from its standardised drive."""
    if law is None:
        for n in range(len(x)):
            spikes[n] = _f(uniform[n] < _gaussian(x[n]))
    elif law == LOGISTIC:
        for n in range(len(x)):
            spikes[n] = _f(uniform[n] < _sigmoid(x[n]))
    elif law == DETERMINISTIC:
        for n in range(len(x)):
            spikes[n] = _f(x[n] > 0)


@compiled()
def _charge(reset, membrane, before, current, beta, threshold):
    """Advances the membranes of one row by one time step. before: spikes of the previous step."""
    if reset == SUBTRACT:
        for n in range(len(current)):
            membrane[n] = beta[n] * membrane[n] + current[n] - threshold[n] * before[n]
    elif reset == ZERO:
        for n in range(len(current)):
            membrane[n] = beta[n] * (membrane[n] * (_ONE - before[n])) + current[n]
    else:
        for n in range(len(current)):
            membrane[n] = beta[n] * membrane[n] + current[n]


@compiled(inline="always")
def _weighted(out, o, start, z, source, s, step, places, values, k, end, count):
    """Sets out[o : o + count] = start[z : z + count] + sum over k <= i < end of values[i] * source[s + places[i] *
    step : ... + count], for flat arrays."""
    n = 0
    while n + 64 <= count:
        _weighted64(out, o + n, start, z + n, source, s + n, step, places, values, k, end)
        n += 64
    while n + 16 <= count:
        _weighted16(out, o + n, start, z + n, source, s + n, step, places, values, k, end)
        n += 16
    while n < count:
        out[o + n] = start[z + n]
        for i in range(k, end):
            out[o + n] += values[i] * source[s + n + places[i] * step]
        n += 1


@compiled()
def _recurrent(weight, before, places, values, blank, out):
    """Sums the rows of flat weights of the neurons that fired. Silent neurons cost nothing. places, values: space for
    the list of neurons that fired; blank: zeros."""
    count, neurons = 0, len(before)
    for j in range(neurons):
        places[count], values[count] = j, before[j]  # overwritten unless it fired, which needs no branch
        count += before[j] != 0
    _weighted(out, 0, blank, 0, weight, 0, neurons, places, values, 0, count, neurons)


@compiled(inline="always")
def _drawn(law, x, t, b, row1, row2, mirrored, counters, valid, uniform, spikes):
    """Computes the spikes of the rows from b on at time step t from their drives x; zero on padding. uniform: space for
    as many numbers."""
    if valid:
        if _draws(law):
            for row in range(b, b + len(x) // len(counters)):
                out = uniform[(row - b) * len(counters) : (row - b + 1) * len(counters)]
                _uniforms(row1[t, row], row2[t, row], mirrored[row], counters, out)
        _fire(law, x, uniform, spikes)
    else:
        _fill(spikes, _f(0))


@compiled(nogil=True)
def scan(first, end, shape, current, weight, beta, threshold, scale, reset, law, row1, row2, mirrored, counters, own,
         fresh, membrane, before, spikes, x, fed_back):  # fmt: skip
    """Runs rows of a layer over time. Sequences [T, B, N], of this shape, and states [B, N] are flat. Membrane and
    spikes (before) of the previous step become the last step's. fresh: they are zero at first, whatever they hold.

    current: sequence; weight: recurrent, from each source to all targets [N * N], or None; beta, threshold, scale: of
    the neurons of as many rows as are one vector, since each call and each rest of a vector costs (1 with padding);
    row1, row2 [T, B] uint32: words of the noise; mirrored [B] bool; counters [N] uint32: see `_uniforms`; own [B]:
    number of steps without padding.
    Writes spikes (with law KNOWN it reads them), standardised drives and, with recurrent weights, the recurrent
    current.
    """
    steps, rows, neurons = shape
    wide, group = len(scale), len(scale) // neurons
    uniform, total, blank = np.empty(wide, np.float32), np.empty(wide, np.float32), np.zeros(neurons, np.float32)
    places, values = np.empty(neurons, np.int32), np.empty(neurons, np.float32)
    for t in range(steps):
        for b in range(first, end, group):
            low, count = b * neurons, (min(b + group, end) - b) * neurons
            at, u, last = t * rows * neurons + low, membrane[low : low + count], before[low : low + count]
            if fresh and t == 0:
                _fill(u, _f(0))
                _fill(last, _f(0))
            arriving = current[at : at + count]
            if weight is not None:
                for row in range(0, count, neurons):
                    _recurrent(weight, last[row : row + neurons], places, values, blank,
                               fed_back[at + row : at + row + neurons])  # fmt: skip
                for n in range(count):
                    total[n] = arriving[n] + fed_back[at + n]
                arriving = total[:count]
            _charge(reset, u, last, arriving, beta, threshold)
            here, now = x[at : at + count], spikes[at : at + count]
            for n in range(count):
                here[n] = (u[n] - threshold[n]) / scale[n]
            _drawn(law, here, t, b, row1, row2, mirrored, counters, t < own[b], uniform, now)
            _copy(now, last)


@compiled(inline="always")
def _kept(credit):
    """Returns zero for too small values. NaN stays NaN."""
    return credit * _f(abs(credit) >= _LEAST_CREDIT)  # a conditional expression would not vectorise


@compiled(fastmath=FUSED)
def _secants(law, x, over, out):
    """Computes the mean of the secants of F over distances d. For the logistic law each is sinh d / (2 d (cosh x +
    cosh d)) = (1 - e^-2d) / 2d / ((1 + e^{|x| - d}) (1 + e^{-|x| - d})). over [K, 4]: see `dispatch._distances`."""
    _fill(out, _f(0))
    if law is None:
        for k in range(len(over)):
            d, weight = over[k, 0], over[k, 1]
            for n in range(len(x)):
                out[n] += weight * (_gaussian(x[n] + d) - _gaussian(x[n] - d))
    else:
        for k in range(0, len(over), 4):
            _near_secants(x, over[k : k + 4], out)
        for k in range(len(over)):
            d, weight = over[k, 0], over[k, 1]
            if d > NEAR:
                for n in range(len(x)):
                    out[n] += weight / (_ONE + _exp(min(max(abs(x[n]) - d, -_FARTHEST), _FARTHEST)))


@compiled(fastmath=FUSED)
def _near_secants(x, over, out):
    """Adds four secants of the logistic law, up to the distance NEAR, from one e^-|x|."""
    q0, q1, q2, q3 = over[0, 2], over[1, 2], over[2, 2], over[3, 2]
    c0, c1, c2, c3 = over[0, 3], over[1, 3], over[2, 3], over[3, 3]
    for n in range(len(x)):
        e = _exp(-min(abs(x[n]), _FARTHEST))
        out[n] += e * (
            c0 / ((e + q0) * (_ONE + e * q0)) + c1 / ((e + q1) * (_ONE + e * q1))
            + c2 / ((e + q2) * (_ONE + e * q2)) + c3 / ((e + q3) * (_ONE + e * q3))
        )  # fmt: skip


@compiled(fastmath=FUSED)
def _slope(law, x, over, scale, valid, out):
    """Computes p' per unit of membrane of some rows at one time step, or secants instead; 0 on padding."""
    if not valid:
        _fill(out, _f(0))
        return
    if over is not None:
        _secants(law, x, over, out)
    elif law is None:
        for n in range(len(x)):
            out[n] = _exp(-min(_HALF * x[n] * x[n], _FARTHEST)) * _f(0.3989422804014327)
    else:
        for n in range(len(x)):
            p = _sigmoid(x[n])
            out[n] = p * (_ONE - p)
    for n in range(len(x)):
        out[n] *= _f(abs(out[n]) >= _LEAST_SLOPE) / scale[n]


@compiled()
def _ordered(bits):
    """Returns the bits of a float as an integer that has the order of the floats, or the bits of such an integer."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@compiled(nogil=True)
def fire(first, end, shape, drive, t, scale, law, row1, row2, mirrored, counters, own, over, slope, farthest, spikes):
    """Draws the spikes [S, B, N] of some rows from drives [S, B, N] of S time steps from t on, and computes their
    `_slope` [T, B, N], of this shape. All three are flat. farthest [B, 2]: `_ordered` bits of the largest
    -drive / scale and of the largest drive / scale so far. The rest: as in `scan`."""
    _, rows, neurons = shape
    group = len(scale) // neurons
    x, uniform = np.empty(len(scale), np.float32), np.empty(len(scale), np.float32)
    for b in range(first, end, group):
        low, count = b * neurons, (min(b + group, end) - b) * neurons
        here, below, above = x[:count], farthest[b, 0], farthest[b, 1]
        for step in range(len(drive) // (rows * neurons)):
            now, at = t + step, step * rows * neurons + low
            valid, to = now < own[b], at + t * rows * neurons
            for n in range(count):
                here[n] = drive[at + n] / scale[n]
            _slope(law, here, over, scale, valid, slope[to : to + count])
            _drawn(law, here, now, b, row1, row2, mirrored, counters, valid, uniform, spikes[at : at + count])
            if valid:
                bits = here.view(np.int32)
                for n in range(count):
                    below = max(below, _ordered(bits[n] ^ _SIGN))
                    above = max(above, _ordered(bits[n]))
        farthest[b, 0], farthest[b, 1] = below, above


@compiled(nogil=True)
def slopes(first, end, shape, law, x, over, scale, own, out):
    """Computes p' per unit of membrane of flat drives x [T, B, N], or secants over distances `over`; 0 on padding."""
    steps, rows, neurons = shape
    group = len(scale) // neurons
    for t in range(steps):
        for b in range(first, end, group):
            low, high = (t * rows + b) * neurons, (t * rows + min(b + group, end)) * neurons
            _slope(law, x[low:high], over, scale, t < own[b], out[low:high])


@compiled(nogil=True)
def credit(first, end, shape, a, x, law, over, scale, own, spikes, beta, threshold, columns, reset, later, totals,
           currents):  # fmt: skip
    """Computes `Recurrence.credit` of some rows: total_t = a_t + h_t g_{t+1} + C g_{t+1}, g_t = kept_t g_{t+1} +
    total_t p'_t, all [T, B, N], of this shape, and flat. The first g is later [B, N], which becomes that of the first
    step; empty: it is zero. a: may be [1, B, N], the same at every step; x: standardised drives, for p' (see `slopes`);
    spikes: read only for reset "zero"; columns: C^T in blocks of LINE (see `columns`), or None without recurrent
    weights; totals: empty if not wanted; currents: may be the same array as a."""
    steps, rows, neurons = shape
    group = len(scale) // neurons
    span, wide, high = group, neurons, group  # rows that go back in time together
    if columns is not None:  # products of all rows, padded with zeros
        span, wide, high = max(1, end - first), -(-neurons // LINE) * LINE, -(-(end - first) // TILE) * TILE
    flat, sums = np.zeros(high * wide, np.float32), np.zeros(high * wide, np.float32)
    total, slope = np.empty(len(scale), np.float32), np.empty(len(scale), np.float32)
    varies = len(a) > rows * neurons
    for start in range(first, end, span):
        stop = min(start + span, end)
        _fill(flat, _f(0))
        if len(later):
            for b in range(start, stop):
                _copy(later[b * neurons : (b + 1) * neurons], flat[(b - start) * wide :])
        for back in range(steps):
            t = steps - 1 - back
            if columns is not None:
                for low in range(0, wide, LINE):
                    for at in range(0, high * wide, TILE * wide):
                        _products(sums, at + low, flat, at, wide, columns, low * neurons, neurons)
            for b in range(start, stop, group):
                count = (min(b + group, stop) - b) * neurons
                at, here, given = (b - start) * wide, (t * rows + b) * neurons, (t * varies * rows + b) * neurons
                now, recurrent, out = flat[at : at + count], sums[at : at + count], total[:count]
                standing = x[here : here + count]
                _slope(law, standing, over, scale, t < own[b], slope[:count])
                _credit(
                    a[given : given + count], standing, scale, spikes[here : here + count], beta, threshold, reset,
                    recurrent, now, out, slope,
                )  # fmt: skip
                _copy(now, currents[here : here + count])
                if len(totals):
                    _copy(out, totals[here : here + count])
        if len(later):
            for b in range(start, stop):
                _copy(flat[(b - start) * wide : (b - start) * wide + neurons], later[b * neurons :])


@compiled(fastmath=FUSED)
def _credit(a, x, scale, spikes, beta, threshold, reset, recurrent, g, total, slope):
    """Computes total credit and g of one row, one time step back."""
    if reset == SUBTRACT:
        for n in range(len(g)):
            total[n] = a[n] + recurrent[n] - threshold[n] * g[n]
            g[n] = _kept(_plus(beta[n], g[n], total[n] * slope[n]))
    elif reset == ZERO:
        for n in range(len(g)):
            total[n] = a[n] + recurrent[n] - beta[n] * (x[n] * scale[n] + threshold[n]) * g[n]
            g[n] = _kept(_plus(beta[n] * (_ONE - spikes[n]), g[n], total[n] * slope[n]))
    else:
        for n in range(len(g)):
            total[n] = a[n] + recurrent[n]
            g[n] = _kept(_plus(beta[n], g[n], total[n] * slope[n]))


@compiled(nogil=True)
def leaky(first, end, c, spikes, beta, reset, later, out):
    """Computes g_t = c_t + beta k_t g_{t+1} [T, B, N] of some rows. later [B, N], the first g, becomes the last one."""
    steps, _, neurons = c.shape
    for back in range(steps):
        t = steps - 1 - back
        for b in range(first, end):
            g = later[b]
            if reset == ZERO:
                for n in range(neurons):
                    g[n] = _kept(c[t, b, n] + beta[n] * (_ONE - spikes[t, b, n]) * g[n])
            else:
                for n in range(neurons):
                    g[n] = _kept(c[t, b, n] + beta[n] * g[n])
            _copy(g, out[t, b])


@compiled(nogil=True)
def leak(first, end, g, x, scale, threshold, spikes, reset, out):
    """Adds to out [N] the sum over time steps and some rows of g_t times the membrane after the previous step's reset.
    x: standardised drives."""
    steps, _, neurons = g.shape
    for t in range(1, steps):
        for b in range(first, end):
            if reset == ZERO:
                for n in range(neurons):
                    left = (x[t - 1, b, n] * scale[n] + threshold[n]) * (_ONE - spikes[t - 1, b, n])
                    out[n] += g[t, b, n] * left
            else:
                for n in range(neurons):
                    out[n] += g[t, b, n] * (x[t - 1, b, n] * scale[n] + threshold[n])


# -- sparse events -----------------------------------------------------------------------------------------


@compiled(nogil=True)
def count(first, end, frames, counts):
    """Counts the non-zero inputs in each of some rows of frames [n, inputs]."""
    for r in range(first, end):
        found = 0
        for i in range(frames.shape[1]):
            found += frames[r, i] != 0
        counts[r] = found


@compiled(nogil=True)
def collect(first, end, frames, starts, places, values):
    """Lists the non-zero inputs of some rows: their places in the row and their values, for row r from starts[r] on."""
    for r in range(first, end):
        k, last = starts[r], starts[r + 1]
        i = 0
        while k < last:
            if frames[r, i] != 0:
                places[k], values[k] = i, frames[r, i]
                k += 1
            i += 1


@compiled(inline="always")
def _turn(to, t, to_step, source, s, step, rows, columns):
    """Sets to[t + j to_step + i] = source[s + i step + j] for i < rows, j < columns, for flat arrays."""
    if rows < 4 or columns < 4:
        for i in range(rows):
            for j in range(columns):
                to[t + j * to_step + i] = source[s + i * step + j]
        return
    for column in range(0, columns, 4):
        j = min(column, columns - 4)  # the last group of four may overlap the one before
        for row in range(0, rows, 4):
            i = min(row, rows - 4)
            _turn4(to, t + j * to_step + i, to_step, source, s + i * step + j, step)


@compiled(inline="always")
def _lines(to, t, to_step, source, s, step, rows, columns):
    """Sets to[t + i to_step + j] = source[s + i step + j] for i < rows, j < columns, for flat arrays."""
    for i in range(rows):
        _copy(source[s + i * step : s + i * step + columns], to[t + i * to_step :])


@compiled(inline="always")
def _add(to, t, source, s, value, count):
    """Adds to[t : t + count] += value * source[s : s + count], for a count divisible by 4."""
    wide = count & ~15
    for n in range(0, wide, 16):
        _add16(to, t + n, source, s + n, value)
    for n in range(wide, count, 4):
        _add4(to, t + n, source, s + n, value)


@compiled(inline="always")
def _add_lines(to, t, to_step, source, s, step, value, lines, length):
    """Applies `_add` to several lines of this length, which are to_step and step apart."""
    for _ in range(lines):
        _add(to, t, source, s, value, length)
        t += to_step
        s += step


@compiled(nogil=True)
def scatter(first, end, starts, places, values, g, inputs, out):
    """Computes some blocks of BLOCK outputs of g^T x [outputs, inputs], flat, for rows of events x and g [n, outputs].
    The sums of a block stay in the cache."""
    outputs, width = g.shape[1], BLOCK
    for block in range(first, end):
        low, high = block * width, min((block + 1) * width, outputs)
        own, row = np.zeros(inputs * width, np.float32), np.zeros(width, np.float32)
        for r in range(len(g)):
            _copy(g[r, low:high], row)
            for k in range(starts[r], starts[r + 1]):
                _add64(own, places[k] * width, row, 0, values[k])
        _turn(out, low * inputs, inputs, own, 0, width, inputs, high - low)


@compiled(nogil=True)
def columns(first, end, matrix, outputs, inputs, out, width):
    """Computes some blocks of W^T [blocks, inputs, width] from W [outputs, inputs], both flat, padded with zeros. It
    reads few outputs at a time, since distant lines of W may evict each other from the cache."""
    for block in range(first, end):
        low, high = block * width, min((block + 1) * width, outputs)
        if high - low < width:
            _fill(out[low * inputs : (low + width) * inputs], _f(0))
        for n in range(low, high, LINE):
            few = min(LINE, high - n)
            _turn(out, low * inputs + n - low, width, matrix, n * inputs, inputs, few, inputs)


@compiled(nogil=True)
def gather(first, end, starts, places, values, columns, inputs, start, out, width):
    """Computes x W^T + b [n, outputs] of some rows of events x. columns: W^T in blocks of this width (see `columns`),
    each of which stays in the cache for all rows; start: b."""
    outputs = out.shape[1]
    bias, total = np.zeros(width, np.float32), np.empty(width, np.float32)
    for low in range(0, outputs, width):
        high = min(low + width, outputs)
        _copy(start[low:high], bias)
        for r in range(first, end):
            _weighted(total, 0, bias, 0, columns, low * inputs, width, places, values, starts[r], starts[r + 1], width)
            _copy(total[: high - low], out[r, low:high])


@compiled(nogil=True)
def spread(first, end, starts, places, values, to, which, patches, blank, steps, wide, shape, last, out):
    """Computes the convolution [n, outputs, high, across] of some rows of events (see `sparse.Patches`). blank: the
    grid without events; steps: `Patches.steps`; last: the flat result has channels last."""
    _, outputs, high, across = shape
    lines, length, step, lead = steps
    grid = np.empty(len(blank), np.float32)  # one frame, which stays in the cache; outputs are its last axis
    for r in range(first, end):
        _copy(blank, grid)
        for k in range(starts[r], starts[r + 1]):
            t, s, value = np.int64(to[places[k]]), np.int64(which[places[k]]), values[k]
            _add_lines(grid, t, step, patches, s, length, value, lines, length)
        for y in range(high):
            if last:
                at = (r * high + y) * across * outputs
                _lines(out, at, outputs, grid, lead + y * step, wide, across, outputs)
            else:
                at = (r * outputs * high + y) * across
                _turn(out, at, high * across, grid, lead + y * step, wide, across, outputs)


@compiled(nogil=True)
def spread_weight(first, end, starts, places, values, to, which, own, steps, wide, size, shape, last, g):
    """Adds the gradient of the patches from some rows to `own`. g: flat gradient of the outputs; size: number of places
    in the grid; last: g has channels last."""
    _, outputs, high, across = shape
    lines, length, step, lead = steps
    grid = np.zeros(size * wide, np.float32)
    for r in range(first, end):
        if starts[r] == starts[r + 1]:
            continue
        for y in range(high):
            if last:
                at = (r * high + y) * across * outputs
                _lines(grid, lead + y * step, wide, g, at, outputs, across, outputs)
            else:
                at = (r * outputs * high + y) * across
                _turn(grid, lead + y * step, wide, g, at, high * across, outputs, across)
        for k in range(starts[r], starts[r + 1]):
            t, s, value = np.int64(to[places[k]]), np.int64(which[places[k]]), values[k]
            _add_lines(own, s, length, grid, t, step, value, lines, length)


@compiled(nogil=True)
def turn(first, end, source, start, steps, shape, out):
    """Transposes some rows of [n, high, across, channels], whose last two axes are contiguous, to [n, channels, high,
    across]. source, out: flat; start: index of the first number; steps: strides of n and of high."""
    _, high, across, channels = shape
    for r in range(first, end):
        for y in range(high):
            at = (r * channels * high + y) * across
            _turn(out, at, high * across, source, start + r * steps[0] + y * steps[1], channels, across, channels)
