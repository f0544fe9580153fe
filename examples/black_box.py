"""A neuron that leaves PyTorch: its membrane is a NumPy array, it has no derivative, and its thresholds are learned all
the same. Noise on its input current trains the weights before it, noise on the thresholds trains them. No download.

python examples/black_box.py [epochs]
"""

import sys

import numpy
import torch
from torch import Tensor, nn

import ulr_snn


class NumpyNeuron(nn.Module):
    """One time step a call, [B, N] currents -> [B, N] spikes: a leaky membrane that a spike sets back by the threshold,
    and that no current moves in the step after a spike."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.ones(features))
        self.membrane: numpy.ndarray | None = None
        self.spikes: numpy.ndarray | None = None

    def forward(self, current: Tensor) -> Tensor:
        now, threshold = current.numpy(), self.threshold.detach().numpy()
        if self.membrane is None or self.membrane.shape != now.shape:
            self.membrane, self.spikes = numpy.zeros_like(now), numpy.zeros_like(now)
        self.membrane = numpy.where(self.spikes > 0, self.membrane, 0.9 * self.membrane + now)
        self.spikes = (self.membrane > threshold).astype(now.dtype)
        self.membrane -= threshold * self.spikes
        return torch.from_numpy(self.spikes)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.neuron, self.readout = nn.Linear(512, 128), NumpyNeuron(128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.readout(self.neuron(self.hidden(step.flatten(1)))) for step in x])


def main(epochs: int = 10) -> float:
    torch.manual_seed(0)
    train_set, test_set = ulr_snn.data.load("digits")
    loader, val = ulr_snn.data.loader(train_set, shuffle=True), ulr_snn.data.loader(test_set)
    model = Net()
    print(ulr_snn.plan(model, next(iter(loader))))
    result = ulr_snn.train(model, loader, epochs, val_loader=val, device="cpu")
    print(f"test accuracy {result.metrics['test_accuracy']:.1%}, thresholds {model.neuron.threshold.detach()[:4]}")
    return result.metrics["test_accuracy"]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
