"""The networks of three libraries in examples/, by likelihood ratios untuned and by their own library's BPTT at three
learning rates, in the table that `ulr_snn.compare` prints.

    python -m benchmarks.libraries [--examples ...] [--methods ulr surrogate] [--seeds 0 1 2]

Recordings are looked for as in the examples. Rows go to results/libraries.csv; those that are there are not made again:
after a change of the library delete its own.
"""

import argparse
import csv
import datetime
import importlib
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import machine
from ulr_snn import compare
from ulr_snn.data import loader

HERE = Path(__file__).resolve().parent
EPOCHS = {"snntorch_tutorial": 3, "norse_recurrent": 10, "spikingjelly_conv": 3}
LIBRARY = {"snntorch_tutorial": "snntorch", "norse_recurrent": "norse", "spikingjelly_conv": "spikingjelly"}
METHODS = ("ulr", "surrogate")
RATES = (0.002, 0.005, 0.01)  # of BPTT
COLUMNS = ("example", "seed", "epochs", "method", "lr", "accuracy", "loss", "seconds_a_step", "peak_memory_bytes",
           "forward_passes", "machine", "torch", "library", "date")  # fmt: skip


def rows_of(example: str, seed: int, methods: list[str]) -> list[dict[str, Any]]:
    """Trains an example's network by these methods; prints the table."""
    module = importlib.import_module(example)
    train_set, test_set = module.recordings()
    torch.manual_seed(seed)
    found = compare(
        module.network(),
        loader(train_set, shuffle=True, seed=seed),
        loader(test_set, 256),
        methods,
        epochs=EPOCHS[example],
        lr={"surrogate": RATES} if "surrogate" in methods else None,
        seed=seed,
        progress=False,
    )
    print(f"{example}, seed {seed}\n{found}\n", flush=True)
    about = {"example": example, "epochs": EPOCHS[example], "machine": machine(), "torch": torch.__version__}
    about["library"] = importlib.metadata.version(LIBRARY[example])
    about["date"] = datetime.date.today().isoformat()
    return [{name: (row | about).get(name) for name in COLUMNS} for row in found.rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", nargs="+", choices=EPOCHS, default=list(EPOCHS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=HERE / "results" / "libraries.csv")
    arguments = parser.parse_args()
    sys.path.insert(0, str(HERE.parent / "examples"))
    torch.set_num_threads(1)
    done = set()
    if arguments.results.exists():
        with arguments.results.open(newline="") as file:
            done = {(row["example"], int(row["seed"]), row["method"]) for row in csv.DictReader(file)}
    for seed in arguments.seeds:
        for example in arguments.examples:
            methods = [method for method in arguments.methods if (example, seed, method) not in done]
            if not methods:
                continue
            rows = rows_of(example, seed, methods)
            new = not arguments.results.exists()
            with arguments.results.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if new:
                    writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
