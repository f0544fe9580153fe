"""Networks that nobody of this project wrote: untuned `ULR()` against surrogate-gradient BPTT at three learning rates,
and at two with schedule and momentum of `ULR()`.

    python -m benchmarks.zoo                       # all networks, methods and seeds; stop and start it at will
    python -m benchmarks.zoo --networks sj_csnn --methods ulr
    python -m benchmarks.zoo --times               # processor time of a step of both in turn, on a quiet machine
    python -m benchmarks.zoo --table               # prints the table and draws the picture of what there is

A row a run in results/zoo_runs.csv: accuracy on the test part after 150 steps of 32 samples, processor time of a step
(median, one thread) and forward passes a sample. Of "mse" the accuracy is minus the loss. A row a short run in
results/zoo_times.csv, from which the table has its times.
"""

import argparse
import csv
import datetime
import itertools
import operator
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from benchmarks.zoo_networks import ZOO, Network
from ulr_snn import ULR, evaluate, train
from ulr_snn.peers import METHODS
from ulr_snn.runs.directory import versions
from ulr_snn.runs.optim import OWN

RESULTS = Path(__file__).resolve().parent / "results"
RATES = ("1e-3", "3e-3", "1e-2")
USUAL = tuple(f"bptt:{rate}" for rate in RATES)
CYCLES = ("bptt-cycle:1e-2", "bptt-cycle:1.5e-2")  # schedule, momentum and, in the second, rate of ULR()
TIMED, FIRST = 20, 5  # steps of a short run, and those that look at the model and are not timed
COLUMNS = ("network", "method", "seed", "steps", "accuracy", "ms", "passes", "note", "machine", "torch", "date")


class Batches:
    """Shuffled batches [T, B, ...] of one part; notes the processor time between one and the next."""

    def __init__(self, x: Tensor, y: Tensor, size: int, seed: int | None) -> None:
        self.x, self.y, self.size, self.seed, self.epoch = x, y, size, seed, 0
        self.spent: list[float] = []

    def __len__(self) -> int:
        return len(self.y) // self.size if self.seed is not None else -(-len(self.y) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self.y))
        if self.seed is not None:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(1000 * self.seed + self.epoch))
        self.epoch += 1
        for i in range(len(self)):
            now = order[i * self.size : (i + 1) * self.size]
            started = time.process_time()
            yield self.x[now].transpose(0, 1).contiguous(), self.y[now]
            self.spent.append(time.process_time() - started)


def options_of(method: str) -> dict[str, Any]:
    """The options of `train` for "ulr", "bptt", "bptt:RATE" or, with schedule and momentum of `ULR()`,
    "bptt-cycle:RATE"."""
    name, _, rate = method.partition(":")
    options: dict[str, Any] = {"estimator": ULR() if name == "ulr" else METHODS["surrogate"]()}
    if name == "bptt-cycle":
        adam = partial(torch.optim.Adam, lr=float(rate), betas=(OWN.momentum, 0.999))
        return options | {"optimizer": adam, "scheduler": OWN.schedule}
    return options | {"lr": float(rate) if rate else None}


def trained(
    network: Network,
    options: dict[str, Any],
    seed: int,
    steps: int,
    root: str,
    batch: int = 32,
    tested: bool = True,
) -> dict[str, object]:
    """The measured columns of one run, tested or not. options: of `train`."""
    (x, y), (test_x, test_y) = network.data(root)
    torch.manual_seed(seed)
    model, batches = network.make(), Batches(x, y, batch, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = train(
            model,
            batches,
            epochs=-(-steps // len(batches)),
            max_steps=steps,
            seed=seed,
            loss=network.loss,
            progress=False,
            **options,
        )
        kept = slice(None) if tested else slice(batch)
        found = evaluate(model, Batches(test_x[kept], test_y[kept], batch, None), loss=network.loss)
    accuracy = -found["loss"] if network.loss == "mse" else 100 * found["accuracy"]
    passes = result.metrics["forward_passes"] / (steps * batch)
    return {
        "accuracy": round(accuracy, 3),
        "ms": round(1e3 * median(batches.spent[FIRST:] or batches.spent), 2),
        "passes": round(passes, 3),
    }


def run(arguments: argparse.Namespace) -> None:
    path = Path(arguments.out)
    seeds = range(arguments.first_seed, arguments.seeds)
    for name, method, seed in missing(path, arguments.networks, arguments.methods, seeds):
        try:
            found, note = trained(ZOO[name], options_of(method), seed, arguments.steps, arguments.root), ""
        except (ValueError, RuntimeError, ArithmeticError) as error:
            found, note = {}, f"{type(error).__name__}: {str(error)[:200]}"
        note_run(path, name, method, seed, arguments.steps, found, note)


def measure_times(arguments: argparse.Namespace) -> None:
    """Short runs of both methods in turn, so many rounds."""
    path = beside(Path(arguments.out), "times.csv")
    known = {(name, turn) for name, _, turn in done(path)}
    for name in arguments.networks:
        for turn in range(arguments.seeds):
            if (name, str(turn)) in known:
                continue
            for method in ("ulr", USUAL[0]):
                found = trained(ZOO[name], options_of(method), turn, TIMED, arguments.root, tested=False)
                note_run(path, name, method, turn, TIMED, {"ms": found["ms"], "passes": found["passes"]})


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name}, {os.cpu_count()} cores, one thread"


def rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def done(path: Path) -> set[tuple[str, str, str]]:
    """Network, method and seed of each run that has a row."""
    return {(r["network"], r["method"], r["seed"]) for r in rows(path)}


def missing(
    path: Path, networks: Iterable[str], methods: Iterable[str], seeds: Iterable[int]
) -> Iterator[tuple[str, str, int]]:
    """Network, method and seed of each run that has no row, seed by seed."""
    known = done(path)
    for seed, name, method in itertools.product(seeds, networks, methods):
        if (name, method, str(seed)) not in known:
            yield name, method, seed


def note_run(
    path: Path, network: str, method: str, seed: int, steps: int, found: dict[str, object], note: str = ""
) -> None:
    """Prints a run and appends its row."""
    about = {"machine": machine(), "torch": versions()["torch"], "date": str(datetime.date.today())}
    row = {"network": network, "method": method, "seed": seed, "steps": steps, "note": note}
    append(path, row | found | about)
    print(network, method, seed, *found.values(), note, flush=True)


def append(path: Path, row: dict[str, object], columns: Sequence[str] = COLUMNS) -> None:
    """Adds a row to a CSV file, which it begins if there is none."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def beside(path: Path, kind: str) -> Path:
    """The file of another kind beside NAME_runs.csv: NAME_times.csv or NAME.png."""
    stem = path.stem.removesuffix("_runs")
    return path.with_name(f"{stem}{kind}" if kind.startswith(".") else f"{stem}_{kind}")


# -- the table ---------------------------------------------------------------------------------------------


def ratios(path: Path) -> dict[str, float]:
    """By network, the time of a step of ULR() over that of BPTT, median of the rounds."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for r in rows(path):
        found.setdefault(r["network"], {}).setdefault(r["seed"], {})[r["method"].partition(":")[0]] = float(r["ms"])
    return {name: median(turn["ulr"] / turn["bptt"] for turn in turns.values()) for name, turns in found.items()}


def summary(found: list[dict[str, str]], times: dict[str, float]) -> list[dict[str, object]]:
    """Of each network with runs of both: means over the seeds that both have, and the best rate of BPTT by them.

    cycle: the difference to BPTT with the schedule of ULR(), NaN without runs. times: of a step, over BPTT's, as they
    were measured in turn.
    """
    table = []
    for name, network in ZOO.items():
        by_method = {
            method: {r["seed"]: r for r in found if (r["network"], r["method"]) == (name, method) and r["accuracy"]}
            for method in ("ulr", *USUAL, *CYCLES)
        }
        seeds = sorted(set.intersection(*(set(by_method[method]) for method in ("ulr", *USUAL))))
        if not seeds:
            continue

        def average(method: str, column: str, by_method=by_method, seeds=seeds) -> float:
            return mean(float(by_method[method][seed][column]) for seed in seeds)

        best = max(USUAL, key=lambda m: average(m, "accuracy"))
        cycles = [average(method, "accuracy") for method in CYCLES if set(seeds) <= set(by_method[method])]
        table.append(
            {
                "network": name,
                "seeds": len(seeds),
                "tuned": network.tuned,
                "ulr": average("ulr", "accuracy"),
                "bptt": average(best, "accuracy"),
                "rate": best.partition(":")[2],
                "difference": average("ulr", "accuracy") - average(best, "accuracy"),
                "cycle": average("ulr", "accuracy") - max(cycles, default=float("nan")),
                "time": times.get(name, float("nan")),
                "passes": average("ulr", "passes"),
            }
        )
    return table


def show(path: Path) -> None:
    table = summary(rows(path), ratios(beside(path, "times.csv")))
    print("| network | seeds | ULR() | best BPTT (rate) | difference | to BPTT in one cycle | time | passes |")
    print("|---|---|---|---|---|---|---|---|")
    for r in table:
        tuned = "*" if r["tuned"] else ""
        print(
            f"| {r['network']}{tuned} | {r['seeds']} | {r['ulr']:.1f} | {r['bptt']:.1f} ({r['rate']}) "
            f"| {r['difference']:+.1f} | {r['cycle']:+.1f} | {r['time']:.2f} | {r['passes']:.2f} |"
        )
    if table:
        print()
        for name, column in (("BPTT", "difference"), ("BPTT in one cycle", "cycle")):
            for kind in (True, False):
                found = in_short([r[column] for r in table if r["tuned"] is kind])
                print(f"to {name}, {'' if kind else 'not '}looked at: {found}")
        times = [r["time"] for r in table if r["time"] == r["time"]]
        print(f"median time {median(times or [float('nan')]):.2f}; * looked at while defaults were tuned")
        draw(table, beside(path, ".png"))


def in_short(differences: Sequence[float]) -> str:
    """The mean and median of differences of accuracy, and how many are level, ahead or far behind."""
    known = [d for d in differences if d == d]
    if not known:
        return "no network"
    level, behind = sum(d >= 0 for d in known), sum(d < -3 for d in known)
    middle = f"mean {mean(known):+.2f}, median {median(known):+.2f}"
    return f"{len(known)} networks, {middle}, level or ahead {level}, more than 3 behind {behind}"


def draw(table: list[dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    ordered = sorted(table, key=lambda r: r["difference"])
    names = [r["network"] + ("*" if r["tuned"] else "") for r in ordered]
    panels = [
        ([r["difference"] for r in ordered], 0, operator.ge, "accuracy of ULR() less that of the best BPTT, points")
    ]
    if any(r["time"] == r["time"] for r in table):
        panels.append(([r["time"] for r in ordered], 1, operator.lt, "processor time of a step, over BPTT's"))
    size = 1 + 4 * len(panels), 0.2 * len(table) + 1.2
    figure, axes = plt.subplots(1, len(panels), sharey=True, squeeze=False, figsize=size, layout="constrained")
    for axis, (values, line, good, label) in zip(axes[0], panels, strict=True):
        axis.barh(names, values, color=["tab:blue" if good(v, line) else "tab:red" for v in values])
        axis.axvline(line, color="black", linewidth=0.8)
        axis.set_xlabel(label)
        axis.tick_params(axis="y", labelsize=7)
        axis.margins(y=0.01)
    figure.savefig(path, dpi=110)


def command_line(about: str, networks: Iterable[str], seeds: int, out: str) -> argparse.ArgumentParser:
    """What all benchmarks of networks in one CSV are asked; out: its name. One thread from here on."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", choices=list(networks), default=list(networks), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--root", default=os.environ.get("ULR_SNN_DATA", "../shared/data"))
    parser.add_argument("--out", default=RESULTS / out)
    parser.add_argument("--table", action="store_true")
    return parser


def run_or_show(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], show: Callable[[Path], None]
) -> None:
    """Makes the runs that are asked for, unless for the table alone, and shows the table."""
    arguments = parser.parse_args()
    if not arguments.table:
        run(arguments)
    show(Path(arguments.out))


def main(about: str | None = __doc__, networks: Iterable[str] = tuple(ZOO), out: str = "zoo_runs.csv") -> None:
    parser = command_line(about or "", networks, 3, out)
    parser.add_argument("--methods", nargs="*", default=["ulr", *USUAL, *CYCLES])
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--times", action="store_true")
    arguments = parser.parse_args()
    if arguments.times:
        measure_times(arguments)
    elif not arguments.table:
        run(arguments)
    show(Path(arguments.out))


if __name__ == "__main__":
    main()
