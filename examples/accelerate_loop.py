"""Hugging Face Accelerate: `ulr.backward(x, y)` stands in the place of `accelerator.backward(loss)`.

python examples/accelerate_loop.py [epochs]
"""

import sys
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

import ulr_snn
from ulr_snn import LIF


def fit(model: nn.Module, loader: DataLoader, val: DataLoader, epochs: int, estimator: Any = None, lr: float = 5e-3):
    """Trains the model and returns its accuracy on the validation data."""
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model, optimizer, loader, val = accelerator.prepare(model, optimizer, loader, val)
    plain = accelerator.unwrap_model(model)
    with ulr_snn.attach(plain, estimator, seed=0, total_steps=epochs * len(loader)) as ulr:
        for epoch in range(epochs):
            losses = []
            for x, y in loader:
                optimizer.zero_grad()
                estimate = ulr.backward(x, y)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                losses.append(estimate.loss.mean())
            accelerator.print(f"epoch {epoch + 1}: loss {torch.stack(losses).mean():.3f}")
    right = []
    for x, y in val:
        with torch.no_grad():
            predicted = model(x.float()).sum(0).argmax(1)
        right.append(accelerator.gather_for_metrics(predicted == y))
    return torch.cat(right).float().mean().item()


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(2), nn.Linear(512, 128), LIF(), nn.Linear(128, 10))


def main(epochs: int = 8) -> float:
    torch.manual_seed(0)
    train_set, test_set = ulr_snn.data.load("digits")
    loader, val = ulr_snn.data.loader(train_set, shuffle=True), ulr_snn.data.loader(test_set)
    model = network()
    accuracy = fit(model, loader, val, epochs)
    found = ulr_snn.evaluate(model, val, device="cpu")
    print(f"test accuracy {accuracy:.1%} by Accelerate, {found['accuracy']:.1%} by evaluate")
    return accuracy


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
