"""The OR of spikes over windows of pictures on a CPU, fused by numba. `credit/pooling.py` defines the results.

All arrays are float32 [n, high, across], or [n, high, across, channels] with channels last. windows: size, step and
margin of the windows along both axes.
"""

import numpy as np

from ulr_snn.kernels.cpu import compiled

_f = np.float32
_ONE = _f(1)


@compiled(inline="always")
def _inside(offset, step, inputs, outputs):
    """Returns the range (first, end) of the outputs j for which input j * step + offset is in the picture."""
    first = max(0, -(offset // step))
    return first, max(first, min(outputs, -((offset - inputs) // step)))


@compiled(nogil=True)
def fired(first, end, x, windows, out):
    """Computes the sums over the windows of some pictures x. Returns whether all their numbers are 0 or 1."""
    (high, across), (down, right), (above, left) = windows
    odd = 0
    for i in range(first, end):
        for y in range(x.shape[1]):
            for k in range(x.shape[2]):
                odd += x[i, y, k] * x[i, y, k] != x[i, y, k]
        for row in range(out.shape[1]):
            total = out[i, row]
            for j in range(len(total)):
                total[j] = 0
            for y in range(max(0, row * down - above), min(x.shape[1], row * down - above + high)):
                source = x[i, y]
                if across == 2 and right == 2 and left == 0 and 2 * len(total) <= len(source):
                    for j in range(len(total)):  # the compiler vectorises a constant step
                        total[j] += source[2 * j] + source[2 * j + 1]
                    continue
                for k in range(across):
                    low, high_j = _inside(k - left, right, len(source), len(total))
                    for j in range(low, high_j):
                        total[j] += source[j * right + k - left]
    return odd == 0


@compiled(nogil=True)
def credited(first, end, x, total, g, windows, out):
    """Computes the gradient of some pictures x from the gradient g of their windows' OR. A silent window passes g to
    all its inputs, a window with one spike to that spike. total: sums over the windows."""
    (high, across), (down, right), (above, left) = windows
    silent, alone = np.empty(g.shape[2], np.float32), np.empty(g.shape[2], np.float32)
    for i in range(first, end):
        for y in range(x.shape[1]):
            for k in range(x.shape[2]):
                out[i, y, k] = 0
        for row in range(g.shape[1]):
            for j in range(g.shape[2]):
                silent[j] = g[i, row, j] * _f(total[i, row, j] == 0)
                alone[j] = g[i, row, j] * _f(total[i, row, j] == 1)
            for y in range(max(0, row * down - above), min(x.shape[1], row * down - above + high)):
                source, to = x[i, y], out[i, y]
                if across == 2 and right == 2 and left == 0 and 2 * len(silent) <= len(source):
                    for j in range(len(silent)):
                        to[2 * j] += silent[j] + source[2 * j] * alone[j]
                        to[2 * j + 1] += silent[j] + source[2 * j + 1] * alone[j]
                    continue
                for k in range(across):
                    low, high_j = _inside(k - left, right, len(source), len(silent))
                    for j in range(low, high_j):
                        at = j * right + k - left
                        to[at] += silent[j] + source[at] * alone[j]


@compiled(nogil=True)
def fired_last(first, end, x, windows, out):
    """Computes `fired` with channels last."""
    (high, across), (down, right), (above, left) = windows
    odd = 0
    for i in range(first, end):
        picture = x[i].reshape(-1)
        for n in range(len(picture)):
            odd += picture[n] * picture[n] != picture[n]
        for row in range(out.shape[1]):
            for j in range(out.shape[2]):
                total = out[i, row, j]
                for c in range(len(total)):
                    total[c] = 0
                for y in range(max(0, row * down - above), min(x.shape[1], row * down - above + high)):
                    for k in range(max(0, j * right - left), min(x.shape[2], j * right - left + across)):
                        source = x[i, y, k]
                        for c in range(len(total)):
                            total[c] += source[c]
    return odd == 0


@compiled(nogil=True)
def credited_last(first, end, x, total, g, windows, out):
    """Computes `credited` with channels last."""
    (high, across), (down, right), (above, left) = windows
    silent, alone = np.empty(g.shape[3], np.float32), np.empty(g.shape[3], np.float32)
    for i in range(first, end):
        picture = out[i].reshape(-1)
        for n in range(len(picture)):
            picture[n] = 0
        for row in range(g.shape[1]):
            for j in range(g.shape[2]):
                credit, sums = g[i, row, j], total[i, row, j]
                for c in range(len(silent)):
                    silent[c] = credit[c] * _f(sums[c] == 0)
                    alone[c] = credit[c] * _f(sums[c] == 1)
                for y in range(max(0, row * down - above), min(x.shape[1], row * down - above + high)):
                    for k in range(max(0, j * right - left), min(x.shape[2], j * right - left + across)):
                        source, to = x[i, y, k], out[i, y, k]
                        for c in range(len(silent)):
                            to[c] += silent[c] + source[c] * alone[c]
