"""The digits data set: scikit-learn's 1,797 handwritten 8x8 digits, seen by a simulated event camera.

The camera moves in three saccades. The digit, 12 sensor pixels wide, passes over 16x16 pixels along a triangle of
100 ms sides at minimum-jerk speed. A pixel sends an ON (OFF) event when the logarithm of its luminance is a threshold
above (below) a reference, which then moves by that threshold. A pixel sends at most one event in a step of 2.5 ms.
Thresholds differ by up to 4 % between pixels. References start within half a threshold of the first luminance. Noise
adds 0.4 events a second and pixel.

The events are the same on every machine. Apart from one rounded table of logarithms, all arithmetic is on integers (or
on integers that float64 holds exactly). All randomness comes from the raw bits of PCG64, a stream that never changes.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from ulr_snn.data.binning import Recordings
from ulr_snn.data.entry import Entry, Raw, Recorded, Root
from ulr_snn.data.splits import stratified
from ulr_snn.errors import UsageError

SAMPLE_SHAPE = (2, 16, 16)  # channel 1 is ON
CLASSES = 10
SPAN_US = 300_000
BIN_US = 15_000
SIMULATION = 1  # version of the events; a change of the events must raise it, so that old caches are stale

SIZE = 16
STEP_US = 2_500
STEPS_PER_SIDE = 40
SENSOR_PIXEL = 32  # lengths are in 1/32 of a sensor pixel; a picture's pixel is one and a half sensor pixels wide
PICTURE_PIXEL = 48
START = (16, 16)
CORNERS = ((0, 0), (64, 128), (128, 0), (0, 0))  # (x, y) of the saccades' ends
FULL = 16 * PICTURE_PIXEL**2  # luminance of a white pixel, on top of the black one's
LOG_UNIT = 4096  # logarithms are in 1 / LOG_UNIT
THRESHOLD = 1843  # 0.45
MISMATCH = 74  # 4 % of the threshold
NOISE = 2**63 // 1000  # of 2**63: 0.4 events a second in steps of 2.5 ms


def recordings() -> tuple[Recordings, Recordings]:
    """Returns train and test recordings (1,438 and 359), a split of 80/20 in every class, from seed 0."""
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    events = list(_events(pictures.reshape(-1, 8, 8)))
    owner, feature, time = (np.concatenate(column) for column in zip(*events, strict=True))
    order = np.argsort(owner, kind="stable")
    offsets = np.searchsorted(owner[order], np.arange(len(labels) + 1))
    everything = Recordings(time[order], feature[order], offsets, labels)
    train, test = stratified(labels, 0.2, seed=0)
    return _choose(everything, train), _choose(everything, test)


def _choose(all_recordings: Recordings, indices: np.ndarray) -> Recordings:
    sizes = np.diff(all_recordings.offsets)
    kept = np.repeat(np.isin(np.arange(len(sizes)), indices), sizes)
    offsets = np.concatenate([[0], np.cumsum(sizes[indices])])
    return Recordings(all_recordings.time[kept], all_recordings.feature[kept], offsets, all_recordings.labels[indices])


def _events(pictures: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (recording, feature, time) of the events in each step of the motion; pictures [n, 8, 8], 0..16."""
    count, pixels = len(pictures), SIZE * SIZE
    bits = np.random.PCG64(0)
    logarithm = log_table()
    flat = pictures.reshape(count, 64).astype(np.float64)
    threshold = THRESHOLD - MISMATCH + (bits.random_raw(pixels) % np.uint64(2 * MISMATCH + 1)).astype(np.int32)
    path = _path()
    phase = (bits.random_raw(count * pixels) % np.uint64(THRESHOLD)).astype(np.int32) - THRESHOLD // 2
    reference = logarithm[_luminance(flat, path[0])] + phase.reshape(count, pixels)
    for step, position in enumerate(path[1:]):
        change = logarithm[_luminance(flat, position)] - reference
        polarity = (change >= threshold).astype(np.int32) - (change <= -threshold)
        reference += polarity * threshold
        noise = bits.random_raw(count * pixels).reshape(count, pixels)
        spurious = (noise >> np.uint64(1)) < np.uint64(NOISE)
        owner, pixel = np.nonzero((polarity != 0) | spurious)
        sign = polarity[owner, pixel]
        on = np.where(sign != 0, sign > 0, noise[owner, pixel] & np.uint64(1) == 1)
        yield owner, on * pixels + pixel, np.full(len(owner), step * STEP_US + STEP_US // 2)


def log_table() -> np.ndarray:
    """Returns logarithms of luminance, [FULL + 1] int32, in units of 1 / LOG_UNIT. Black is 12 % of white."""
    return np.rint(exact_logs()).astype(np.int32)


def exact_logs() -> np.ndarray:
    """Returns the table before rounding. No entry is so near a half that libraries could round it differently."""
    return LOG_UNIT * np.log(0.12 * FULL + 0.88 * np.arange(FULL + 1))


def _luminance(flat: np.ndarray, position: tuple[int, int]) -> np.ndarray:
    """Returns luminance [n, 256], 0..FULL, of the pictures [n, 64] shifted to `position`, by linear interpolation."""
    centres = np.arange(SIZE) * SENSOR_PIXEL
    picture = np.arange(8) * PICTURE_PIXEL
    across, down = (np.maximum(0, PICTURE_PIXEL - abs(centres[:, None] - p - picture)) for p in position)
    # Products in float64 are fast, and sums of integers below 2**53 are exact in any order.
    weights = np.kron(down, across).astype(np.float64)
    return (flat @ weights.T).astype(np.int32)


def _path() -> list[tuple[int, int]]:
    """Returns the positions (x, y) of the picture at the start and after each step, rounded to integers."""
    side = STEPS_PER_SIDE
    path = [START]
    for origin, goal in pairwise(CORNERS):
        for k in range(1, side + 1):
            travelled = 10 * k**3 * side**2 - 15 * k**4 * side + 6 * k**5  # of side**5
            x, y = (
                s + a + (2 * (b - a) * travelled + side**5) // (2 * side**5)
                for s, a, b in zip(START, origin, goal, strict=True)
            )
            path.append((x, y))
    return path


def _find(root: Root) -> Recorded:
    if root is not None:
        raise UsageError("digits are made, not read from a folder; leave root= out (cache_dir= is their folder)")

    def read() -> Raw:
        train, test = recordings()
        return Raw(SAMPLE_SHAPE, CLASSES, {"train": [train], "test": [test]})

    return Recorded("", f"simulation {SIMULATION}", read)


DIGITS = Entry(SPAN_US, BIN_US, _find)
