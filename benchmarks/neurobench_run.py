"""NeuroBench's metrics of a trained network beside those of ulr_snn.

    python -m benchmarks.neurobench_run [--epochs 3]      # needs pip install neurobench; a minute

Trains the dense network of the event set "digits", with a linear readout at every time step, and measures it on the
test set by NeuroBench (`neurobench.benchmarks.Benchmark`) and by `ulr_snn.evaluate(..., activity=True)`. Writes a row
to `results/neurobench.csv`.
"""

import argparse
import csv
import datetime
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from neurobench.benchmarks import Benchmark
from neurobench.metrics.static import ConnectionSparsity, Footprint
from neurobench.metrics.workload import ActivationSparsity, ClassificationAccuracy, SynapticOperations
from neurobench.models import TorchModel
from torch import Tensor, nn

import ulr_snn
from benchmarks.accuracy import machine
from ulr_snn import LIF, RecurrentLIF

RESULTS = Path(__file__).parent / "results" / "neurobench.csv"
METRICS = [[Footprint, ConnectionSparsity], [ActivationSparsity, SynapticOperations, ClassificationAccuracy]]


class Binary:
    """The batches of a loader, with 1 where there are events. Of several events in a place, NeuroBench counts one."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.loader:
            yield (x > 0).float(), y


class SamplesFirst:
    """The batches of a loader with the samples first, [B, T, ...], as NeuroBench takes them."""

    def __init__(self, loader: Any, samples: int) -> None:
        self.loader, self.dataset = loader, range(samples)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.loader:
            yield x.transpose(0, 1), y


class OverTime(TorchModel):
    """A model on sequences [T, B, ...], as NeuroBench calls it: [B, T, ...] -> [B, T, classes]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.add_activation_module(LIF)
        self.layers = [module for module in net.modules() if isinstance(module, RecurrentLIF)]

    @torch.no_grad()
    def __call__(self, batch: Tensor) -> Tensor:
        # NeuroBench counts what modules are called with, and a scan does not call its recurrent weights.
        with observed(self.layers, lambda layer, spikes: layer.recurrent(spikes)):
            return self.net(batch.transpose(0, 1)).transpose(0, 1)


@contextmanager
def observed(layers: list[Any], see: Callable[[Any, Tensor], Any]) -> Iterator[None]:
    """Within this context, calls `see` with each of these layers that runs, and with its spikes."""

    def hook(layer: nn.Module, _: Any, spikes: Tensor) -> None:
        see(layer, spikes)

    hooks = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def by_neurobench(model: nn.Module, loader: Any, samples: int) -> dict[str, float]:
    """Returns NeuroBench's metrics: bytes, shares, and operations of a sample."""
    choose = [lambda outputs: outputs.sum(1).argmax(1)]
    found = Benchmark(OverTime(model), SamplesFirst(loader, samples), [], choose, METRICS).run(quiet=True)
    operations = found["SynapticOperations"]
    return {
        "footprint": found["Footprint"],
        "connection_sparsity": found["ConnectionSparsity"],
        "activation_sparsity": found["ActivationSparsity"],
        "operations": operations["Effective_ACs"] + operations["Effective_MACs"],
        "dense_operations": operations["Dense"],
        "accuracy": found["ClassificationAccuracy"],
    }


def by_ulr_snn(model: nn.Module, loader: Any) -> dict[str, float]:
    """Returns the same metrics, as far as ulr_snn has them."""
    found = ulr_snn.evaluate(model, loader, activity=True)
    x, _ = next(iter(loader))
    most: list[int] = []  # spikes that a sample may have, by layer
    layers = [module for module in model.modules() if isinstance(module, LIF)]
    with torch.no_grad(), observed(layers, lambda _, spikes: most.append(spikes[:, 0].numel())):
        model(x)
    tensors = [*model.parameters(), *model.buffers()]
    return {
        "footprint": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "activation_sparsity": 1 - found["spikes"] / sum(most),
        "operations": found["operations"],
        "accuracy": found["accuracy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    train_set, test_set = ulr_snn.data.load("digits")
    layers = nn.Flatten(2), nn.Linear(512, 256), LIF(), nn.Linear(256, 256), LIF(), nn.Linear(256, 10)
    model = nn.Sequential(*layers)
    ulr_snn.train(model, Binary(ulr_snn.data.loader(train_set, shuffle=True)), epochs)
    loader = Binary(ulr_snn.data.loader(test_set))
    theirs, ours = by_neurobench(model, loader, len(test_set)), by_ulr_snn(model, loader)
    print(f"{'metric':<22}{'NeuroBench':>14}{'ulr_snn':>14}")
    for name, value in theirs.items():
        print(f"{name:<22}{value:>14.6g}{ours[name] if name in ours else float('nan'):>14.6g}")
    row = {"network": "digits, dense 512-256-256-10", "epochs": epochs, "seed": 0}
    row |= {f"{name}_neurobench": value for name, value in theirs.items()}
    row |= {f"{name}_ulr_snn": value for name, value in ours.items()}
    row |= {"machine": machine(), "torch": torch.__version__, "date": datetime.date.today().isoformat()}
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
