"""Objectives that have no gradient: mistakes counted one by one, and a budget of spikes.

python examples/objectives.py [epochs]
"""

import sys

import torch

import ulr_snn
from ulr_snn import SpikeBudget
from ulr_snn.runs.models import default_model

BUDGET = 500  # spikes a sample


def trained(loss, epochs: int, data: tuple) -> dict:
    """Accuracy and spikes a sample, after training with this loss."""
    torch.manual_seed(0)
    train_set, test_set = data
    model = default_model(train_set.sample_shape, 10)
    ulr_snn.train(model, ulr_snn.data.loader(train_set, shuffle=True), epochs, loss=loss)
    found = ulr_snn.evaluate(model, ulr_snn.data.loader(test_set), activity=True)
    print(f"{loss}: test accuracy {found['accuracy']:.1%}, {found['spikes']:.0f} spikes a sample")
    return found


def main(epochs: int = 10) -> float:
    data = ulr_snn.data.load("digits")
    usual = trained("ce_count", epochs, data)
    frugal = trained({"ce_count": 1, SpikeBudget(BUDGET): 0.1}, epochs, data)
    mistakes = trained("zero_one", 3 * epochs, data)  # says less a sample than a cross-entropy does
    assert frugal["spikes"] <= BUDGET < usual["spikes"]
    return min(usual["accuracy"], frugal["accuracy"], mistakes["accuracy"])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
