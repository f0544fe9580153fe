"""The reference network of each data set, which the command line trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ulr_snn.model.neurons import LIF, Fold, RecurrentLIF, TimeAverage

_HIDDEN = 256
# PyTorch's initial weights suit dense inputs. With events, the second layer would be almost silent at the start.
_WEIGHT_GAIN = 3.0

BuildModel = Callable[[Sequence[int], int], nn.Sequential]


def default_model(sample_shape: Sequence[int], classes: int) -> nn.Sequential:
    """Returns two dense layers of 256 LIF neurons and a linear readout of their mean activity.

    The model maps [T, B, *sample_shape] to logits [B, classes].
    """
    return nn.Sequential(
        nn.Flatten(start_dim=2),
        _linear(math.prod(sample_shape), _HIDDEN),
        LIF(),
        _linear(_HIDDEN, _HIDDEN),
        LIF(),
        TimeAverage(),
        nn.Linear(_HIDDEN, classes),
    )


def recurrent_model(sample_shape: Sequence[int], classes: int) -> nn.Sequential:
    """Returns a layer of 256 recurrent LIF neurons and a linear readout of their mean activity."""
    hidden = _linear(math.prod(sample_shape), _HIDDEN), RecurrentLIF(_HIDDEN)
    return nn.Sequential(nn.Flatten(start_dim=2), *hidden, TimeAverage(), nn.Linear(_HIDDEN, classes))


def convolutional_model(sample_shape: Sequence[int], classes: int) -> nn.Sequential:
    """Returns two convolutions of stride 2 and a dense layer, all of LIF neurons, and a linear readout of their mean
    activity. sample_shape: (channels, height, width)."""
    channels, height, width = sample_shape
    rows, columns = ((size + 3) // 4 for size in (height, width))  # after two strides of 2
    return nn.Sequential(
        Fold(nn.Conv2d(channels, 16, 5, stride=2, padding=2)),
        LIF(),
        Fold(nn.Conv2d(16, 32, 5, stride=2, padding=2)),
        LIF(),
        nn.Flatten(start_dim=2),
        _linear(32 * rows * columns, _HIDDEN),
        LIF(),
        TimeAverage(),
        nn.Linear(_HIDDEN, classes),
    )


@dataclass(frozen=True)
class Reference:
    """How the command line trains a data set. options: arguments of `ulr_snn.data.load`."""

    model: BuildModel = default_model
    options: Mapping[str, Any] = field(default_factory=dict)


REFERENCES = {
    "shd": Reference(recurrent_model),
    "ssc": Reference(recurrent_model),
    "smnist": Reference(recurrent_model),
    "dvsgesture": Reference(convolutional_model, {"downsample": 4}),
    "cifar10dvs": Reference(convolutional_model, {"downsample": 4}),
    "ncaltech101": Reference(convolutional_model, {"downsample": 4}),
    "ncars": Reference(convolutional_model, {"downsample": 2}),
    "asldvs": Reference(convolutional_model, {"downsample": 4}),
}


def reference(name: str) -> Reference:
    """Returns the reference of a data set, by default the dense network."""
    return REFERENCES.get(name, Reference())


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight *= _WEIGHT_GAIN
    return layer
