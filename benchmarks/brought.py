"""Models as people bring them: those of tutorials, and loops of other libraries, by `ULR()` and by surrogate gradients.

    python -m benchmarks.brought                     # all cases and seeds; stop and start it at will
    python -m benchmarks.brought --cases snntorch-5 lightning --seeds 0 1
    python -m benchmarks.brought --table             # the table of what there is

"ulr" is untuned. "ulr-rate" and "bptt" have the best of three learning rates, chosen for each case on a fifth of the
training set by a seed of its own. BPTT has the surrogate of the model's own library. Epochs, batches and initial
weights are the same. A row a run in results/brought.csv, with the figure that the user's own code gives on the test
set, or on the validation fifth.
"""

import argparse
import csv
import datetime
import importlib
import importlib.metadata
import itertools
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch.utils.data import DataLoader, random_split

from benchmarks.accuracy import machine
from benchmarks.brought_models import CASES, Case
from benchmarks.missing_operators import declare_operators
from benchmarks.zoo import append
from ulr_snn import ULR, train
from ulr_snn.peers import SurrogateBPTT
from ulr_snn.runs.directory import versions

RESULTS = Path(__file__).resolve().parent / "results" / "brought.csv"
METHODS = {"ulr": ULR, "ulr-rate": ULR, "bptt": SurrogateBPTT}
RATES = (3e-3, 1e-2, 3e-2)  # of all but "ulr"
CHOOSING = 100  # the seed of the runs that choose a learning rate
COLUMNS = ("case", "method", "part", "lr", "metric", "value", "seconds", "seed", "epochs", "machine", "versions",
           "date")  # fmt: skip


def trained(case: Case, method: str, lr: float | None, seed: int, loader: DataLoader, test: DataLoader) -> dict:
    """Trains the case's model and returns figure and time. lr: None for the default."""
    torch.manual_seed(seed)
    model, estimator = case.make(), METHODS[method]()
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if case.loop is None:
            options = {"loss": case.loss, "seed": seed, "progress": False, "device": "cpu", **case.options}
            train(model, loader, case.epochs, estimator=estimator, lr=lr, **options)
        else:
            declare_operators()
            rate = {} if lr is None else {"lr": lr}
            importlib.import_module(f"examples.{case.loop}").fit(model, loader, test, case.epochs, estimator, **rate)
    seconds = time.perf_counter() - started
    return {"value": case.own_figures(model, test)[case.metric], "seconds": round(seconds, 1)}


def run(name: str, method: str, part: str, lr: float | None, seed: int) -> dict[str, Any]:
    """Makes one run and returns its row. part: "test", or "validation" for a fifth of the training set."""
    case = CASES[name]
    train_set, test_set = case.data()
    if part == "validation":
        train_set, test_set = random_split(train_set, [0.8, 0.2], torch.Generator().manual_seed(seed))
    figures = trained(case, method, lr, seed, case.loader(train_set, seed), case.loader(test_set))
    row = {"case": name, "method": method, "part": part, "lr": lr or "", "metric": case.metric, **figures, "seed": seed}
    library = name.partition("-")[0]
    known = versions() | {library: importlib.metadata.version(library)}
    row |= {"epochs": case.epochs, "machine": machine(), "date": datetime.date.today().isoformat()}
    row["versions"] = " ".join(f"{package} {version}" for package, version in known.items())
    return {column: row[column] for column in COLUMNS}


def rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rated(found: list[dict[str, str]], name: str, method: str) -> dict[float, float]:
    """Returns the figure of a method on validation data for each learning rate; larger is better."""
    sign = -1 if CASES[name].metric == "loss" else 1
    own = [r for r in found if (r["case"], r["method"], r["part"]) == (name, method, "validation")]
    return {float(r["lr"]): sign * float(r["value"]) for r in own}


def best_rate(found: list[dict[str, str]], name: str, method: str) -> float | None:
    """Returns the learning rate that was chosen for a method; None for the default."""
    values = rated(found, name, method)
    return max(values, key=values.__getitem__) if values else None


def missing(path: Path, names: list[str], seeds: list[int]) -> Iterator[tuple[str, str, str, float | None, int]]:
    """Yields the arguments of each run that has no row. Learning rates are chosen first."""
    for name, method in itertools.product(names, METHODS):
        for rate in RATES if method != "ulr" else ():
            if rate not in rated(rows(path), name, method):
                yield name, method, "validation", rate, CHOOSING
        lr = best_rate(rows(path), name, method)
        done = {(r["case"], r["method"], r["part"], r["seed"]) for r in rows(path)}
        for seed in seeds:
            if (name, method, "test", str(seed)) not in done:
                yield name, method, "test", lr, seed


def table(path: Path) -> str:
    """Returns the mean figure of each case and method over the seeds that all methods have."""
    lines = ["| case | figure | seeds | ULR(), untuned | ULR (rate) | BPTT (rate) |", "|---|---|---|---|---|---|"]
    for name, case in CASES.items():
        found = [r for r in rows(path) if r["case"] == name and r["part"] == "test"]
        runs = [{r["seed"]: r for r in found if r["method"] == method} for method in METHODS]
        seeds = sorted(set.intersection(*map(set, runs)))
        if seeds:
            cells = [cell(case, [by_seed[seed] for seed in seeds]) for by_seed in runs]
            lines.append(f"| {name} | {case.metric} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(case: Case, found: list[dict[str, str]]) -> str:
    """Returns the mean figure of some runs, and their learning rate if it was chosen."""
    value, rate = mean(float(r["value"]) for r in found), found[0]["lr"]
    figure = f"{value:.4f}" if case.metric == "loss" else f"{100 * value:.1f} %"
    return f"{figure} ({rate})" if rate else figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.table:
        for found in missing(arguments.out, arguments.cases, arguments.seeds):
            row = run(*found)
            append(arguments.out, row, COLUMNS)
            print(*(row[column] for column in COLUMNS[:8]), flush=True)
    print(table(arguments.out))


if __name__ == "__main__":
    main()
