"""Regression over time: the membrane of the last layer follows a target at every time step.

python examples/regression.py [epochs]
"""

import sys
import warnings

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ulr_snn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    import snntorch as snn


class Net(nn.Module):
    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(1, hidden), snn.Leaky(torch.rand(hidden), threshold=torch.rand(hidden))
        self.fc2, self.lif2 = nn.Linear(hidden, hidden), snn.Leaky(torch.rand(hidden), threshold=torch.rand(hidden))
        self.fc3, self.li = nn.Linear(hidden, 1), snn.Leaky(0.8, reset_mechanism="none")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [B, T, 1] -> spikes and membranes [B, T, 1]
        mem1, mem2, mem3 = self.lif1.init_leaky(), self.lif2.init_leaky(), self.li.init_leaky()
        spikes, membranes = [], []
        for t in range(x.shape[1]):
            spk1, mem1 = self.lif1(self.fc1(x[:, t]), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spk3, mem3 = self.li(self.fc3(spk2), mem3)
            spikes.append(spk3)
            membranes.append(mem3)
        return torch.stack(spikes, 1), torch.stack(membranes, 1)


def main(epochs: int = 15) -> float:
    torch.manual_seed(0)
    ramps = torch.rand(768, 1, 1) * torch.linspace(0, 1, 50)[:, None]  # [B, T, 1], each to a height of its own
    roots = ramps.sqrt()
    loader = DataLoader(TensorDataset(ramps[:640], roots[:640]), batch_size=64, shuffle=True)
    val = DataLoader(TensorDataset(ramps[640:], roots[640:]), batch_size=64)
    model, loss = Net(), nn.MSELoss()
    result = ulr_snn.train(model, loader, epochs, val_loader=val, loss=loss, layout="BT", output=1, device="cpu")
    with torch.no_grad():
        own = loss(model(ramps[640:])[1], roots[640:]).item()
    print(f"loss {result.history[-1]['val_loss']:.5f}, by your own code {own:.5f}")
    return own


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
