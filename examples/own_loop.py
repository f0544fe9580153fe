"""`attach`: likelihood-ratio gradients in a loop and with an optimizer of one's own. A recurrent net with a leaky
readout; the loss is a function of ours on its membranes.

    python examples/own_loop.py [epochs]
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ulr_snn


def late_cross_entropy(membranes: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the mean membrane over the last half of the steps: [T, B, C], [B] -> [B]."""
    return F.cross_entropy(membranes[len(membranes) // 2 :].mean(0), targets, reduction="none")


def main(epochs: int = 8) -> float:
    torch.manual_seed(0)
    train_set, test_set = ulr_snn.data.load("digits")
    loader = ulr_snn.data.loader(train_set, shuffle=True)
    model = nn.Sequential(
        nn.Flatten(2), nn.Linear(512, 128), ulr_snn.RecurrentLIF(128), nn.Linear(128, 10), ulr_snn.LeakyReadout(0.9)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    with ulr_snn.attach(model, loss=late_cross_entropy, seed=0, total_steps=epochs * len(loader)) as ulr:
        for epoch in range(epochs):
            losses = []
            for x, y in loader:
                optimizer.zero_grad()
                estimate = ulr.backward(x, y)  # forward passes, then adds to .grad
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                losses.append(estimate.loss.mean())
            print(f"epoch {epoch + 1}: loss {torch.stack(losses).mean():.3f}")
    metrics = ulr_snn.evaluate(model, ulr_snn.data.loader(test_set), loss=late_cross_entropy)
    print(f"test accuracy {metrics['accuracy']:.1%}")
    return metrics["accuracy"]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
