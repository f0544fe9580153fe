"""snnTorch's network of its tutorial 5, which reads a step of events at a time, trained without its surrogate gradient
on saccade-mnist (see datasets/nmnist).

    python examples/snntorch_tutorial.py [epochs]
"""

import sys
import warnings

import torch
from torch import Tensor, nn

import ulr_snn
from ulr_snn.data import EventDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    import snntorch as snn


class Net(nn.Module):
    def __init__(self, num_inputs: int = 2 * 34 * 34, num_hidden: int = 1000, num_outputs: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(num_inputs, num_hidden)
        self.lif1 = snn.Leaky(beta=0.95)
        self.fc2 = nn.Linear(num_hidden, num_outputs)
        self.lif2 = snn.Leaky(beta=0.95)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mem1 = self.lif1.init_leaky()
        mem2 = self.lif2.init_leaky()
        spk2_rec, mem2_rec = [], []
        for step in range(len(x)):
            cur1 = self.fc1(x[step].flatten(1))
            spk1, mem1 = self.lif1(cur1, mem1)
            cur2 = self.fc2(spk1)
            spk2, mem2 = self.lif2(cur2, mem2)
            spk2_rec.append(spk2)
            mem2_rec.append(mem2)
        return torch.stack(spk2_rec, dim=0), torch.stack(mem2_rec, dim=0)


def network() -> nn.Module:
    return Net()


def recordings() -> tuple[EventDataset, EventDataset]:
    return ulr_snn.data.load("nmnist", time_bins=20, bin_us=15_000, binary=True)


def main(epochs: int = 5) -> float:
    torch.manual_seed(0)
    train_set, test_set = recordings()
    model = network()
    loader, val = ulr_snn.data.loader(train_set, shuffle=True), ulr_snn.data.loader(test_set)
    result = ulr_snn.train(model, loader, epochs, val_loader=val)
    print(f"test accuracy {result.metrics['test_accuracy']:.1%}")
    return result.metrics["test_accuracy"]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
