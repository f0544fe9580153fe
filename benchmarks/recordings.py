"""Real recordings: a thousand of N-MNIST by an event camera, `ULR()` against surrogate-gradient BPTT, nothing tuned.

    python -m benchmarks.recordings            # all nets, both methods, ten folds; stop and start it at will
    python -m benchmarks.recordings --table

900 recordings to train on for 15 epochs of 14 batches of 64, 100 to test; 20 binary frames of 15 ms. For the networks
that end in -cv, the seed is also the number of a fold of ten: a cross-validation over all recordings. The others test
on the same 100 recordings with every seed. A row a run in results/recordings.csv. One recording is a whole point:
compare the means.
"""

import argparse
from functools import lru_cache, partial
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import nn

from benchmarks.zoo import command_line, missing, note_run, options_of, rows, run_or_show, trained
from benchmarks.zoo_networks import Network, Parts
from ulr_snn import LIF, Fold, TimeAverage
from ulr_snn.data import load

STEPS, BATCH, FOLDS = 15 * 14, 64, 10


@lru_cache
def recordings(root: str) -> Parts:
    found = []
    for part in load("nmnist", f"{root}/n-mnist-1000", time_bins=20, bin_us=15_000, binary=True):
        x, y, _ = part.dense(range(len(part)))
        found.append((x.transpose(0, 1), y))
    return found[0], found[1]


def fold(number: int, root: str) -> Parts:
    """Training and test part of a fold: of each class, every tenth recording is for the test."""
    x, y = (torch.cat(parts) for parts in zip(*recordings(root), strict=True))
    place = torch.zeros_like(y)
    for label in range(10):
        place[y == label] = torch.arange(int((y == label).sum())) % FOLDS
    test = place == number
    return (x[~test], y[~test]), (x[test], y[test])


def dense() -> nn.Module:
    layers = nn.Linear(2312, 256), LIF(), nn.Linear(256, 256), LIF()
    return nn.Sequential(nn.Flatten(2), *layers, TimeAverage(), nn.Linear(256, 10))


def convolutional() -> nn.Module:
    first = Fold(nn.Conv2d(2, 12, 5, stride=2, padding=2)), LIF()
    second = Fold(nn.Conv2d(12, 24, 5, stride=2, padding=2)), LIF(), nn.Flatten(2)
    return nn.Sequential(*first, *second, nn.Linear(24 * 9 * 9, 128), LIF(), TimeAverage(), nn.Linear(128, 10))


MAKERS = {"dense": dense, "convolutional": convolutional}
NETWORKS = [*MAKERS, *(f"{name}-cv" for name in MAKERS)]


def network(name: str, seed: int) -> Network:
    """Returns a network with its recordings: the fold of this number for a cross-validation."""
    make = MAKERS[name.removesuffix("-cv")]
    return Network(make, partial(fold, seed) if name.endswith("-cv") else recordings)


def run(arguments: argparse.Namespace) -> None:
    path = Path(arguments.out)
    for name, method, seed in missing(path, arguments.networks, ("ulr", "bptt"), range(arguments.seeds)):
        found = trained(network(name, seed), options_of(method), seed, STEPS, arguments.root, BATCH)
        note_run(path, name, method, seed, STEPS, found)


def show(path: Path) -> None:
    print("| network | seeds | ULR() | BPTT | difference, standard error |\n|---|---|---|---|---|")
    for name in NETWORKS:
        runs = {(r["method"], r["seed"]): float(r["accuracy"]) for r in rows(path) if r["network"] == name}
        seeds = sorted({seed for _, seed in runs if {("ulr", seed), ("bptt", seed)} <= set(runs)})
        if len(seeds) < 2:
            continue
        ours, theirs = ([runs[method, seed] for seed in seeds] for method in ("ulr", "bptt"))
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        difference = f"{mean(differences):+.1f} ± {stdev(differences) / sqrt(len(seeds)):.1f}"
        print(f"| {name} | {len(seeds)} | {mean(ours):.1f} | {mean(theirs):.1f} | {difference} |")


def main() -> None:
    run_or_show(command_line(__doc__, NETWORKS, 10, "recordings.csv"), run, show)


if __name__ == "__main__":
    main()
