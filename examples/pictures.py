"""Pictures of what a trained network does, and the report of its run: rasters, membranes, firing rates, events.

python examples/pictures.py [epochs]        writes into runs/pictures
"""

import sys
from pathlib import Path

import torch
from torch import nn

import ulr_snn
from ulr_snn import LIF, TimeAverage
from ulr_snn.runs import pictures
from ulr_snn.runs.report import write_report


def main(epochs: int = 10) -> float:
    folder = Path("runs/pictures")
    torch.manual_seed(0)
    train_set, test_set = ulr_snn.data.load("digits")
    model = nn.Sequential(
        nn.Flatten(2), nn.Linear(512, 128), LIF(), nn.Linear(128, 64), LIF(), TimeAverage(), nn.Linear(64, 10)
    )
    loader, test_loader = ulr_snn.data.loader(train_set, shuffle=True), ulr_snn.data.loader(test_set)
    run = {"run_dir": folder / "run", "resume": True}  # called again, it goes on
    result = ulr_snn.train(model, loader, epochs, val_loader=test_loader, device="cpu", **run)

    recording = pictures.record(model, next(iter(test_loader)))  # spikes and membranes of every layer
    pictures.raster(recording).savefig(folder / "raster.png")
    pictures.membranes(recording).savefig(folder / "membranes.png")
    pictures.rates_histogram(recording.rates()).savefig(folder / "rates.png")
    pictures.event_image(recording.events[:, 0]).savefig(folder / "events.png")
    pictures.animate_events(recording.events[:, 0], folder / "events.gif")
    print(write_report(folder / "run", model, test_loader, device="cpu"))
    return result.metrics["test_accuracy"]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
