"""The shortest way: a network, a loader, `train`. About ten seconds on two cores; no download.

python examples/train_digits.py [epochs]
"""

import sys

import torch
from torch import nn

import ulr_snn
from ulr_snn import LIF, TimeAverage


def main(epochs: int = 15) -> float:
    torch.manual_seed(0)
    train_set, test_set = ulr_snn.data.load("digits")  # events [T, B, 2, 16, 16], 20 time bins
    model = nn.Sequential(
        nn.Flatten(2), nn.Linear(512, 256), LIF(), nn.Linear(256, 256), LIF(), TimeAverage(), nn.Linear(256, 10)
    )
    loader = ulr_snn.data.loader(train_set, shuffle=True)
    test_loader = ulr_snn.data.loader(test_set)
    print(ulr_snn.plan(model, next(iter(loader))))
    result = ulr_snn.train(model, loader, epochs, val_loader=test_loader)
    noisy = ulr_snn.evaluate(model, test_loader, mode="stochastic", copies=4, estimator=result.estimator)
    accuracy = result.metrics["test_accuracy"]
    print(f"test accuracy {accuracy:.1%} with deterministic firing, {noisy['accuracy']:.1%} with stochastic firing")
    return accuracy


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
