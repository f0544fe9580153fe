"""Reward: the spiking policy of examples/cartpole.py, five seeds.

    python -m benchmarks.cartpole [--methods reward-to-go auto] [--seeds 0 1 2 3 4]

After the training, 100 episodes of gymnasium's CartPole-v1 with deterministic firing and start states of their own.
Rows go to results/cartpole.csv; those that are there are not made again: after a change of the library delete its own.
"""

import argparse
import csv
import datetime
import importlib
import importlib.metadata
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import machine
from benchmarks.speed import write
from ulr_snn import ULR

HERE = Path(__file__).resolve().parent
METHODS = ("reward-to-go", "auto")  # the example's estimator, and `ULR(copies=2)`; both play 64 episodes an update
UPDATES = 80
SOLVED = 475.0
TEST_SEED = 10_000  # added to the seed of the training


def row_of(method: str, seed: int) -> dict[str, Any]:
    """Trains one policy and plays 100 episodes."""
    cartpole = importlib.import_module("cartpole")
    estimator, samples = {"reward-to-go": (cartpole.ESTIMATOR, 1), "auto": (ULR(copies=2), 32)}[method]
    begin = time.perf_counter()
    model = cartpole.trained(UPDATES, estimator, samples, seed)
    seconds = time.perf_counter() - begin
    torch.manual_seed(TEST_SEED + seed)
    found = cartpole.returns(model)
    versions = {name: importlib.metadata.version(name) for name in ("snntorch", "gymnasium")}
    return {
        "method": method,
        "seed": seed,
        "updates": UPDATES,
        "mean_return": round(found.mean().item(), 2),
        "least_return": int(found.min()),
        "seconds": round(seconds, 1),
        "machine": f"{machine()}, one thread",
        "torch": torch.__version__,
        **versions,
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--results", type=Path, default=HERE / "results" / "cartpole.csv")
    arguments = parser.parse_args()
    sys.path.insert(0, str(HERE.parent / "examples"))
    torch.set_num_threads(1)
    done = set()
    if arguments.results.exists():
        with arguments.results.open(newline="") as file:
            done = {(row["method"], int(row["seed"])) for row in csv.DictReader(file)}
    for method in arguments.methods:
        for seed in arguments.seeds:
            if (method, seed) in done:
                continue
            row = row_of(method, seed)
            write(arguments.results, [row])
            verdict = "solved" if row["mean_return"] >= SOLVED else "not solved"
            print(f"{method}, seed {seed}: {row['mean_return']} in {row['seconds']} s, {verdict}", flush=True)


if __name__ == "__main__":
    main()
