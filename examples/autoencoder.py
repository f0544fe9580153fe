"""A spiking autoencoder: the loader gives images alone, so the loss compares the outputs with the inputs.

python examples/autoencoder.py [epochs]
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ulr_snn
from ulr_snn import LIF, TimeAverage


class Autoencoder(nn.Module):
    """[B, 1, 8, 8] -> [B, 1, 8, 8], through the spikes of 16 neurons."""

    def __init__(self, steps: int = 10) -> None:
        super().__init__()
        self.steps = steps
        self.encoder = nn.Sequential(nn.Flatten(2), nn.Linear(64, 128), LIF(), nn.Linear(128, 16), LIF())
        self.decoder = nn.Sequential(nn.Linear(16, 128), LIF(), TimeAverage(), nn.Linear(128, 64), nn.Sigmoid())

    def forward(self, image: Tensor) -> Tensor:
        repeated = image.expand(self.steps, *image.shape)
        return self.decoder(self.encoder(repeated)).view(image.shape)


def main(epochs: int = 20) -> float:
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    loader: DataLoader = DataLoader(images[:1437], batch_size=64, shuffle=True)  # a batch is a tensor, without targets
    val: DataLoader = DataLoader(images[1437:], batch_size=64)
    model, loss = Autoencoder(), nn.MSELoss()
    result = ulr_snn.train(model, loader, epochs, val_loader=val, loss=loss, layout="B", device="cpu")
    with torch.no_grad():
        own = loss(model(images[1437:]), images[1437:]).item()
    print(f"loss {result.history[-1]['val_loss']:.4f}, by your own code {own:.4f}")
    return own


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
