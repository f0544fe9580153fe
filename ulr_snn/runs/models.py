"""The built-in network of the command line."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from ulr_snn.model.neurons import LIF, TimeAverage

_HIDDEN = 256
# PyTorch's initial weights suit dense inputs. With events, the second layer would be almost silent at the start.
_WEIGHT_GAIN = 3.0


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


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight *= _WEIGHT_GAIN
    return layer
