"""A network that shows itself a static image at every time step, as in snnTorch's tutorial 5: `layout="B"`.

python examples/static_images.py [epochs]
"""

import sys
import warnings

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ulr_snn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    import snntorch as snn


class Net(nn.Module):
    def __init__(self, steps: int = 25) -> None:
        super().__init__()
        self.steps = steps
        self.fc1, self.lif1 = nn.Linear(64, 200), snn.Leaky(beta=0.95)
        self.fc2, self.lif2 = nn.Linear(200, 10), snn.Leaky(beta=0.95)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [B, 8, 8]
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        spk_rec, mem_rec = [], []
        for _ in range(self.steps):
            spk1, mem1 = self.lif1(self.fc1(x.flatten(1)), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spk_rec.append(spk2)
            mem_rec.append(mem2)
        return torch.stack(spk_rec), torch.stack(mem_rec)


def every_step(membranes: Tensor, targets: Tensor) -> Tensor:
    """The tutorial's loss, cross-entropy at every time step, summed over time: [T, B, C], [B] -> [B]."""
    return torch.stack([F.cross_entropy(mem, targets, reduction="none") for mem in membranes]).sum(0)


def main(epochs: int = 10) -> float:
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(images[:1437], labels[:1437]), batch_size=64, shuffle=True)
    val = DataLoader(TensorDataset(images[1437:], labels[1437:]), batch_size=64)
    model = Net()
    result = ulr_snn.train(model, loader, epochs, val_loader=val, loss=every_step, layout="B", output=1, device="cpu")
    with torch.no_grad():
        _, membranes = model(images[1437:])
    own = every_step(membranes, labels[1437:]).mean()
    print(f"loss {result.history[-1]['val_loss']:.4f}, by your own code {own:.4f}")
    return result.metrics["test_accuracy"]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
