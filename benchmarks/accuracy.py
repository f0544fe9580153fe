"""Test accuracy of likelihood ratios against surrogate-gradient BPTT: same nets, batches and optimizer.

    python -m benchmarks.accuracy            # tunes, trains, tests, prints; stop and start it at will
    python -m benchmarks.accuracy --table    # prints the table of what there is

See README.md beside this file.
"""

import argparse
import csv
import datetime
import json
import math
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.search import Block, Score, Settings, key, search
from benchmarks.table import summarise
from benchmarks.tasks import TASKS, logistic_regression
from ulr_snn import ULR, Logistic
from ulr_snn.data import EventDataset, loader, split
from ulr_snn.evaluate import evaluate
from ulr_snn.peers.surrogate import SurrogateBPTT
from ulr_snn.train import train

HERE = Path(__file__).resolve().parent
STAGES = ("tune", "final")


@dataclass(frozen=True)
class Run:
    """One training. Measured on the held-out part of the training set ("tune") or the test set ("final")."""

    stage: str
    task: str
    method: str
    settings: str  # JSON: lr, clip, and the rest for the estimator
    seed: int
    epochs: int

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(map(str, (self.stage, self.task, self.method, self.settings, self.seed, self.epochs)))


MEASURED = ("accuracy", "loss", "accuracy_stochastic", "train_loss", "seconds", "forward_passes", "note")
ABOUT = ("machine", "torch", "date")
COLUMNS = (*Run.__dataclass_fields__, *MEASURED, *ABOUT)


# -- one run, in a worker ----------------------------------------------------------------------------------


def estimator_of(method: str, settings: Settings) -> ULR | SurrogateBPTT:
    """What `train` gets; the rest are its own arguments."""
    options = {name: value for name, value in settings.items() if name not in ("lr", "clip", "readout")}
    if method.startswith("bptt"):
        return SurrogateBPTT(**options)
    noise = {name: options.pop(name) for name in ("start", "end") if name in options}
    return ULR(firing=Logistic(**noise), **options)


def optimizer_of(model: nn.Sequential, settings: Settings) -> dict[str, Any]:
    """lr or optimizer, as `train` takes them; readout: factor of the learning rate of the last layer."""
    if "readout" not in settings:
        return {"lr": settings.get("lr")}
    lr, last = settings["lr"], list(model[-1].parameters())
    rest = [q for q in model.parameters() if all(q is not other for other in last)]
    groups = [{"params": rest}, {"params": last, "lr": settings["readout"] * lr}]
    return {"optimizer": torch.optim.Adam(groups, lr)}


def parts(run: Run, config: dict[str, Any], root: str) -> tuple[EventDataset, EventDataset]:
    """What the run trains on, and what it is measured on."""
    train_set, test_set = TASKS[run.task].recordings(root)
    if run.stage == "tune":
        train_set, test_set = split(train_set, config["validation"]["fraction"], config["validation"]["seed"])
    limit = config.get("limit")
    return tuple(part.subset(range(len(part))[:: -(-len(part) // limit)]) if limit else part
                 for part in (train_set, test_set))  # fmt: skip


def execute(run: Run, config: dict[str, Any], root: str) -> dict[str, Any]:
    """Trains and measures; the measured columns of the run's row."""
    training, held_out = parts(run, config, root)
    if run.method == "logistic":
        return {"accuracy": logistic_regression(training, held_out)}
    view, settings = TASKS[run.task].view, json.loads(run.settings)
    torch.manual_seed(run.seed)
    model, estimator = TASKS[run.task].net(), estimator_of(run.method, settings)
    batches = loader(view(training), config["batch"], shuffle=True, seed=run.seed)
    options = {"clip": settings.get("clip"), "seed": run.seed, "device": "cpu"} | optimizer_of(model, settings)
    try:
        result = train(model, batches, run.epochs, estimator=estimator, progress=False, **options)
    except FloatingPointError:
        return {"accuracy": 0.0, "loss": math.inf, "note": "diverged"}
    tests = loader(view(held_out), 4 * config["batch"])
    measured = evaluate(model, tests, device="cpu")
    row = {
        "accuracy": measured["accuracy"],
        "loss": measured["loss"],
        "train_loss": result.history[-1]["train_loss"],
        "seconds": round(result.metrics["seconds"], 2),
        "forward_passes": result.metrics["forward_passes"],
    }
    if run.stage == "final" and isinstance(estimator, ULR):
        copies = config["stochastic_copies"]
        noisy = evaluate(model, tests, mode="stochastic", copies=copies, estimator=estimator, device="cpu")
        row["accuracy_stochastic"] = noisy["accuracy"]
    return row


# -- all runs ----------------------------------------------------------------------------------------------


class Ledger:
    """The rows of all runs, on disk as soon as they are there. A run that has a row is not made again."""

    def __init__(self, path: Path, pool: Executor, config: dict[str, Any], root: str) -> None:
        self.path, self.pool, self.config, self.root = path, pool, config, root
        self.lock = threading.Lock()
        self.rows = {Run(*(row[name] for name in Run.__dataclass_fields__)).key: row for row in read(path)}

    def submit(self, run: Run) -> Callable[[], dict[str, Any]]:
        """Starts the run unless it has been made; call the result for its row."""
        if run.key in self.rows:
            return lambda: self.rows[run.key]
        future = self.pool.submit(execute, run, self.config, self.root)
        return lambda: self._add(run, future)

    def _add(self, run: Run, future: Future) -> dict[str, Any]:
        date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
        about = {"machine": machine(), "torch": torch.__version__, "date": date}
        row = {**dict.fromkeys(COLUMNS, ""), **vars(run), **future.result(), **about}
        with self.lock:
            new = not self.path.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if new:
                    writer.writeheader()
                writer.writerow(row)
            self.rows[run.key] = row
            print(*run.key, f"accuracy {row['accuracy']:.4f}", f"{row['seconds']} s", row["note"], flush=True)
        return row


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def machine() -> str:
    """CPU model and number of cores."""
    model = "unknown CPU"
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores"


def tune(ledger: Ledger, task: str, method: str) -> tuple[Settings, bool]:
    """The method's best settings on this task, and whether they are interior."""
    config = ledger.config
    blocks = [Block.of(block) for block in config["tuned"][method]]

    def scores(points: list[Settings], fraction: float) -> list[Score]:
        epochs = max(1, round(fraction * config.get("epochs", TASKS[task].epochs)))
        runs = [Run("tune", task, method, key(point), config["tune_seed"], epochs) for point in points]
        rows = [wait() for wait in [ledger.submit(run) for run in runs]]
        return [(float(row["accuracy"]), -float(row["loss"])) for row in rows]

    return search(blocks, scores, config["short"], config["keep"], config["rounds"])


def compare(ledger: Ledger, task: str, method: str, stages: list[str], seeds: list[int]) -> None:
    """All runs of one method on one task."""
    settings = ledger.config["untuned"].get(method, {})
    if method in ledger.config["tuned"]:
        settings, interior = tune(ledger, task, method)
        where = "interior" if interior else "NOT SHOWN TO BE INTERIOR: raise rounds"
        print(f"{task} {method}: {key(settings)} ({where})", flush=True)
    if "final" in stages:
        epochs = ledger.config.get("epochs", TASKS[task].epochs)
        seeds = seeds[:1] if method == "logistic" else seeds
        for wait in [ledger.submit(Run("final", task, method, key(settings), seed, epochs)) for seed in seeds]:
            wait()


def quick(config: dict[str, Any]) -> dict[str, Any]:
    """A benchmark of seconds that shows only that everything runs."""

    def small(block: dict[str, Any]) -> dict[str, Any]:
        single = {**block["ordered"], **block.get("choices", {})}
        lr = single.pop("lr")[:2]
        return {"ordered": {"lr": lr}, "choices": {axis: values[:1] for axis, values in single.items()}}

    tuned = {method: [small(blocks[0])] for method, blocks in config["tuned"].items()}
    few = {"limit": 128, "epochs": 1, "rounds": 0, "test_seeds": [0, 1], "stochastic_copies": 2}
    return {**config, **few, "tuned": tuned}


def one_thread() -> None:
    torch.set_num_threads(1)


def main() -> None:
    config = json.loads((HERE / "grid.json").read_text())
    methods = ["bptt", "bptt-tuned", "bptt-readout", "ulr", "ulr-tuned", "residual", "global", "logistic"]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods, help="logistic: digits only")
    parser.add_argument("--seeds", nargs="+", type=int, help="of the final stage (default: those of grid.json)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--data", default=os.environ.get("ULR_SNN_DATA", HERE.parents[1] / "shared" / "data"))
    parser.add_argument("--results", type=Path, help="default: results beside this file")
    parser.add_argument("--quick", action="store_true", help="tiny; results go to runs/accuracy-quick")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    config = quick(config) if options.quick else config
    results = options.results or (Path("runs/accuracy-quick") if options.quick else HERE / "results")
    if not options.table:
        run_all(options, config, results / "accuracy_runs.csv")
    print(summarise(read(results / "accuracy_runs.csv"), results / "accuracy.csv"))


def run_all(options: argparse.Namespace, config: dict[str, Any], path: Path) -> None:
    """Tasks in order, their methods side by side as far as there are workers."""
    seeds = options.seeds or config["test_seeds"]
    jobs = [
        (task, method)
        for task in options.tasks
        for method in options.methods
        if (method != "logistic" or task == "digits") and ("final" in options.stages or method in config["tuned"])
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, spawn, one_thread) as pool:
        ledger = Ledger(path, pool, config, str(options.data))
        with ThreadPoolExecutor(options.workers) as threads:
            running = [threads.submit(compare, ledger, *job, options.stages, seeds) for job in jobs]
            try:
                for job in running:
                    job.result()
            except BaseException:
                for job in running:
                    job.cancel()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


if __name__ == "__main__":
    main()
