"""PyTorch Lightning: the training step of a LightningModule gets its gradients from `ulr_snn.attach`.

python examples/lightning_loop.py [epochs]
"""

import sys
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import ulr_snn
from ulr_snn import LIF


class Spiking(lightning.LightningModule):
    def __init__(self, model: nn.Module, ulr: Any, lr: float) -> None:
        super().__init__()
        self.automatic_optimization = False  # gradients come from `ulr`, not from `loss.backward()`
        self.model, self.ulr, self.lr = model, ulr, lr

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), lr=self.lr)

    def training_step(self, batch: Any, index: int) -> None:
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        estimate = self.ulr.backward(x, y)
        optimizer.step()
        self.log("train_loss", estimate.loss.mean(), batch_size=len(y))

    def validation_step(self, batch: Any, index: int) -> None:
        x, y = batch
        totals = self.model(x.float()).sum(0)
        self.log("val_loss", F.cross_entropy(totals, y), batch_size=len(y), prog_bar=True)
        self.log("val_accuracy", (totals.argmax(1) == y).float().mean(), batch_size=len(y), prog_bar=True)


def fit(model: nn.Module, loader: DataLoader, val: DataLoader, epochs: int, estimator: Any = None, lr: float = 5e-3):
    """Trains the model and returns what `validation_step` logged last."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", enable_progress_bar=False, **quiet)
    with ulr_snn.attach(model, estimator, seed=0, total_steps=epochs * len(loader)) as ulr:
        trainer.fit(Spiking(model, ulr, lr), loader, val)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(2), nn.Linear(512, 128), LIF(), nn.Linear(128, 10))


def main(epochs: int = 8) -> float:
    torch.manual_seed(0)
    train_set, test_set = ulr_snn.data.load("digits")
    loader, val = ulr_snn.data.loader(train_set, shuffle=True), ulr_snn.data.loader(test_set)
    model = network()
    logged = fit(model, loader, val, epochs)
    found = ulr_snn.evaluate(model, val)
    print(f"test accuracy {logged['val_accuracy']:.1%} by Lightning, {found['accuracy']:.1%} by evaluate")
    return logged["val_accuracy"]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
