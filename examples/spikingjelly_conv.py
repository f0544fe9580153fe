"""A convolutional network of SpikingJelly's multi-step layers, trained without its surrogate gradient on saccade-mnist
(see datasets/nmnist).

    python examples/spikingjelly_conv.py [epochs]
"""

import sys
import warnings

import torch
from torch import nn

import ulr_snn
from ulr_snn.data import EventDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    from spikingjelly.activation_based import layer, neuron


def network() -> nn.Module:
    def fire() -> nn.Module:
        return neuron.LIFNode(tau=2.0, decay_input=False, step_mode="m")

    return nn.Sequential(
        layer.Conv2d(2, 12, 5, stride=2, padding=2, step_mode="m"),
        fire(),
        layer.Conv2d(12, 24, 3, stride=2, padding=1, step_mode="m"),
        fire(),
        layer.Flatten(step_mode="m"),
        layer.Linear(24 * 9 * 9, 128, step_mode="m"),
        fire(),
        layer.Linear(128, 10, step_mode="m"),
    )


def recordings() -> tuple[EventDataset, EventDataset]:
    return ulr_snn.data.load("nmnist", time_bins=20, bin_us=15_000, binary=True)


def main(epochs: int = 5) -> float:
    torch.manual_seed(0)
    train_set, test_set = recordings()
    model = network()
    loader, val = ulr_snn.data.loader(train_set, shuffle=True), ulr_snn.data.loader(test_set)
    result = ulr_snn.train(model, loader, epochs, val_loader=val, lr=3e-3)  # the default may silence its layers
    print(f"test accuracy {result.metrics['test_accuracy']:.1%}")
    return result.metrics["test_accuracy"]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
