"""The columns of a recording's events: times in whole microseconds, and flat indices of the inputs that fire."""

import numpy as np

from ulr_snn.errors import UsageError

LATEST = 2**62  # microseconds that int64 holds


def times(t: np.ndarray, clock_us: float, align: bool, where: str) -> np.ndarray:
    """Returns times in microseconds, int64, rounded. clock_us: microseconds in one unit of `t`.

    Raises UsageError for times that are no numbers, negative, not finite or too late.
    """
    wrong = UsageError(f"{where} has times that are no numbers of microseconds; clean them, or give clock_us=")
    if t.dtype.kind not in "iuf":
        raise wrong
    if len(t) == 0:
        return np.empty(0, np.int64)
    if t.dtype.kind != "f" and not -LATEST < int(t.min()) <= int(t.max()) < LATEST:
        raise wrong
    t = t.astype(np.float64 if t.dtype.kind == "f" else np.int64)
    if align:
        with np.errstate(invalid="ignore"):  # of infinite times, which are refused below
            t -= t.min()
    unit = int(clock_us) if clock_us == int(clock_us) else clock_us
    first, last = t.min().item() * unit, t.max().item() * unit  # Python's numbers, which do not wrap around
    if first < 0:
        raise UsageError(f"{where} has an event before time 0; use align=True")
    if not last < LATEST:  # NaN is not
        raise wrong
    return np.rint(t * unit).astype(np.int64) if isinstance(unit, float) or t.dtype.kind == "f" else t * unit
