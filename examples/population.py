"""A population code: twenty output neurons stand for each class, and a loss of snnTorch counts their spikes.

python examples/population.py [epochs]
"""

import sys
import warnings

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ulr_snn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    import snntorch as snn
    from snntorch import functional as SF

CODE = {"population_code": True, "num_classes": 10}


class Net(nn.Module):
    def __init__(self, steps: int = 1) -> None:
        super().__init__()
        self.steps = steps
        self.fc1, self.lif1 = nn.Linear(64, 128), snn.Leaky(beta=0.9)
        self.fc2, self.lif2 = nn.Linear(128, 200), snn.Leaky(beta=0.9)

    def forward(self, x: Tensor) -> Tensor:  # [B, 8, 8] -> spikes [T, B, 200]
        mem1, mem2, spk_rec = self.lif1.init_leaky(), self.lif2.init_leaky(), []
        for _ in range(self.steps):
            spk1, mem1 = self.lif1(self.fc1(x.flatten(1)), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spk_rec.append(spk2)
        return torch.stack(spk_rec)


def main(epochs: int = 10) -> float:
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(images[:1437], labels[:1437]), batch_size=64, shuffle=True)
    val = DataLoader(TensorDataset(images[1437:], labels[1437:]), batch_size=64)
    model, loss = Net(), SF.mse_count_loss(correct_rate=1.0, incorrect_rate=0.0, **CODE)
    result = ulr_snn.train(model, loader, epochs, val_loader=val, loss=loss, layout="B", device="cpu")
    with torch.no_grad():
        own = SF.accuracy_rate(model(images[1437:]), labels[1437:], **CODE)
    print(f"test accuracy {result.metrics['test_accuracy']:.1%}, by your own code {own:.1%}")
    return float(own)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
