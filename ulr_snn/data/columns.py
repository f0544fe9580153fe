"""The columns of a recording's events: times in whole microseconds, and flat indices of the inputs that fire."""

import numpy as np

from ulr_snn.errors import UsageError

LATEST = 2**62  # microseconds that int64 holds, with room for sums
NAMES = {"t": "t", "ts": "t", "time": "t", "timestamp": "t", "timestamps": "t"} | {
    "x": "x", "y": "y", "p": "p", "pol": "p", "polarity": "p",
}  # fmt: skip

Columns = dict[str, np.ndarray]  # by "t", "x" and, if the sensor has them, "y" and "p"; all but "t" are int64


def of_events(events: np.ndarray, where: str) -> Columns:
    """Returns the columns of a structured array. Raises UsageError for fields with other names, and for places and
    polarities that are no whole numbers."""
    names = events.dtype.names or ()
    events = events.ravel()  # those of tonic's ASLDVS have the shape [n, 1]
    found = {NAMES.get(name, name): events[name] for name in names}
    if not {"t", "x"} <= set(found):
        raise UsageError(f"{where} has events with the fields {names}; they need t and x")
    if len(found) < len(names) or not set(found) <= set(NAMES.values()):
        raise UsageError(f"{where} has events with the fields {names}; give t, x, and y and p if the sensor has them")
    return {name: values if name == "t" else _whole(values, name, where) for name, values in found.items()}


def _whole(values: np.ndarray, name: str, where: str) -> np.ndarray:
    if values.dtype.kind not in "biuf":
        raise UsageError(f"{where} has {name} of type {values.dtype}; give whole numbers")
    if values.dtype.kind == "f" or values.dtype == np.uint64:
        fine = (values > -LATEST) & (values < LATEST)  # NaN is not
        fine[fine] = values[fine] % 1 == 0
        if not fine.all():
            raise UsageError(f"{where} has an event at {name}={values[~fine][0]}; give whole numbers, such as pixels")
    return values.astype(np.int64)


def on(polarities: np.ndarray, where: str) -> np.ndarray:
    """Returns which events are ON. Raises UsageError for polarities of another code."""
    least, most = polarities.min(initial=0), polarities.max(initial=0)
    if least < -1 or most > 1 or (least == -1 and (polarities == 0).any()):
        seen = ", ".join(map(str, np.unique(polarities)[:4]))
        raise UsageError(f"{where} has the polarities {seen}; give 0 and 1, -1 and 1, or bools")
    return polarities > 0


def features(columns: Columns, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Returns `(p * height + y) * width + x`. Raises UsageError for an event outside the sensor."""
    channels, height, width = shape if len(shape) == 3 else (1, 1, *shape)
    feature = np.zeros(len(columns["x"]), np.int64)
    for field, size in (("p", channels), ("y", height), ("x", width)):
        if field == "p" and size == 1:  # tonic gives units a polarity of 1
            continue
        sensor = f"the sensor of (width, height, polarities) = ({width}, {height}, {channels}); give sensor_size="
        values = columns.get(field)
        if values is None:
            if size > 1:
                raise UsageError(f"{where} has events without {field}, which do not fit {sensor}")
            continue
        if field == "p" and size == 2:
            values = on(values, where)
        if len(values) and not 0 <= values.min() <= values.max() < size:
            worst = values.max() if values.max() >= size else values.min()
            raise UsageError(f"{where} has an event at {field}={worst}, outside {sensor}")
        feature *= size
        feature += values
    return feature


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
