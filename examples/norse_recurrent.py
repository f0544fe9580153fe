"""A recurrent network of Norse's layers, as Norse has them, trained without its surrogate gradient on spoken digits
(see datasets/shd).

    python examples/norse_recurrent.py [epochs]
"""

import sys
import warnings

import torch
from torch import nn

import ulr_snn
from ulr_snn.data import EventDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    import norse.torch as norse


def network() -> nn.Module:
    return norse.SequentialState(norse.LIFRecurrent(128, 256), nn.Linear(256, 10), norse.LI())


def recordings() -> tuple[EventDataset, EventDataset]:
    return ulr_snn.data.load("shd", time_bins=50, bin_us=20_000)


def main(epochs: int = 10) -> float:
    torch.manual_seed(0)
    train_set, test_set = recordings()
    model = network()
    loader, val = ulr_snn.data.loader(train_set, shuffle=True), ulr_snn.data.loader(test_set)
    result = ulr_snn.train(model, loader, epochs, val_loader=val)
    print(f"test accuracy {result.metrics['test_accuracy']:.1%}")
    return result.metrics["test_accuracy"]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
