"""The part of the sensor that a data set shows: crop, spatial downsampling and polarity."""

from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np

from ulr_snn.data.binning import Recordings
from ulr_snn.errors import UsageError

Polarity = Literal["both", "merged", "on", "off"]


@dataclass(frozen=True)
class View:
    """What of each event's position is kept. It is applied before recordings are binned and cached.

    crop: height and width of the window that is kept, at the centre of the sensor; None keeps all.
    downsample: side of the square of pixels (or number of neighbouring units) that become one input, after the crop.
    polarity: "both" keeps two channels, "merged" puts both into one, "on" and "off" keep one of them.

    Raises UsageError for a value that is none of these.
    """

    crop: tuple[int, int] | None = None
    downsample: int = 1
    polarity: Polarity = "both"

    def __post_init__(self) -> None:
        if not _positive(self.downsample):
            raise UsageError(f"downsample={self.downsample!r} is not a number of pixels; give a positive integer")
        if self.polarity not in ("both", "merged", "on", "off"):
            raise UsageError(f'polarity={self.polarity!r} is unknown; give "both", "merged", "on" or "off"')
        crop = self.crop
        if crop is not None and not (isinstance(crop, tuple) and len(crop) == 2 and all(map(_positive, crop))):
            raise UsageError(f"crop={crop!r} is not a window; give (height, width) in pixels")

    def shape(self, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of a time step that is left of `sample_shape`, which is (2, height, width) or (units,).

        Raises UsageError if the sensor has no such part.
        """
        if len(sample_shape) == 1:
            if self.crop is not None or self.polarity != "both":
                raise UsageError("these recordings have units, not pixels; leave crop= and polarity= out")
            return (-(-sample_shape[0] // self.downsample),)
        channels, height, width = sample_shape
        if self.polarity != "both" and channels != 2:
            raise UsageError(f"polarity={self.polarity!r} needs two channels, but these recordings have {channels}")
        if self.crop is not None:
            if self.crop[0] > height or self.crop[1] > width:
                raise UsageError(f"crop={self.crop} is larger than the sensor, {height} x {width} pixels")
            height, width = self.crop
        left = channels if self.polarity == "both" else 1
        return left, -(-height // self.downsample), -(-width // self.downsample)

    def apply(self, chunk: Recordings, sample_shape: tuple[int, ...]) -> Recordings:
        """Returns the events that the view keeps, with the inputs of `shape(sample_shape)`."""
        if self == WHOLE:
            return chunk
        shape = self.shape(sample_shape)
        if len(sample_shape) == 1:
            return Recordings(chunk.time, chunk.feature // self.downsample, chunk.offsets, chunk.labels)
        channel, y, x = np.unravel_index(chunk.feature, sample_shape)
        kept = np.ones(len(x), bool)
        if self.crop is not None:
            (_, height, width), (rows, columns) = sample_shape, self.crop
            y, x = y - (height - rows) // 2, x - (width - columns) // 2
            kept = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
        if self.polarity in ("on", "off"):
            kept &= channel == (self.polarity == "on")
        if self.polarity != "both":
            channel = np.zeros_like(channel)
        place = channel[kept], y[kept] // self.downsample, x[kept] // self.downsample
        feature = np.ravel_multi_index(place, shape) if prod(shape) else place[0]
        before = np.concatenate([[0], np.cumsum(kept)])
        return Recordings(chunk.time[kept], feature, before[chunk.offsets], chunk.labels)


def _positive(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and int(value) > 0


WHOLE = View()
