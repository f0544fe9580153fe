"""Nets that generate the signals of eight dynamical systems: `ULR()` against tuned BPTT, FORCE and full-FORCE.

    python -m benchmarks.dynamics              # tunes, trains, tests, prints; stop and start it at will
    python -m benchmarks.dynamics --table      # prints the table and draws the picture of what there is

A row a run in results/dynamics.csv; results/dynamics.png has targets and outputs. See README.md beside this file.
"""

import argparse
import csv
import datetime
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.force import Force, FullForce
from benchmarks.search import Block, Score, Settings, key, search
from benchmarks.zoo import append, machine
from ulr_snn import ULR, LeakyReadout, RecurrentLIF, data, train
from ulr_snn.data.dynamics import SYSTEMS, TRIAL, clock
from ulr_snn.data.dynamics import trial as whole_trial
from ulr_snn.peers import SurrogateBPTT
from ulr_snn.runs.directory import versions

RESULTS = Path(__file__).resolve().parent / "results"
OUTPUTS = Path("runs/dynamics")  # outputs of the first seed, for the picture
TITLES = {"ulr": "ULR(), untuned", "bptt": "BPTT, tuned", "force": "FORCE, tuned", "full-force": "full-FORCE, tuned"}
METHODS = tuple(TITLES)
DT, NEURONS, LEAK, READOUT_LEAK, BATCH = 0.005, 128, 0.95, 0.8, 8
STEPS = 600  # of training by ULR and BPTT; a step sees 8 windows of 1 s
FORCE_TRIALS = 100  # of 2 s, for FORCE and full-FORCE
TRIALS, WINDOWS = 3, 8  # of a test: trials without a reset, from so many phases
NOISES = (0.05, 0.1, 0.2, 0.4, 0.8)
TUNE_SEED, SHORT, KEEP, ROUNDS = 100, 0.3, 0.25, 1
LONG = 2.5  # times the steps or trials, in a longer training with the same settings
QUICK = 0.01  # part of the effort that a quick run makes
RESERVOIR = {"ordered": {"gain": [0.05, 0.1, 0.2], "feedback": [10.0, 30.0], "drive": [20.0, 40.0]}}
GRIDS: dict[str, dict[str, Any]] = {
    "bptt": {"ordered": {"lr": [0.005, 0.01], "slope": [10.0, 25.0, 60.0]}, "choices": {"readout": [1, 6]}},
    "force": RESERVOIR,
    "full-force": RESERVOIR,
}
RUN = ("stage", "system", "method", "settings", "seed", "effort")  # stage: tune, final or long; effort: steps or trials
NOISY = tuple(f"error_noise_{level:g}" for level in NOISES)
MEASURED = ("error", "error_trial_1", "error_trial_2", "error_trial_3", "rate", *NOISY, "noise_doubling", "seconds")
COLUMNS = (*RUN, *MEASURED, "note", "machine", "ulr_snn", "torch", "date")
Row = dict[str, Any]


class Generates(Protocol):
    """A trained net."""

    def run(self, x: np.ndarray, noise: float, seed: int) -> tuple[np.ndarray, float]:
        """Returns outputs [T, B, D] for inputs [T, B, C], and spikes of a neuron a second.

        noise: standard deviation that noise in the current alone gives a membrane, over threshold minus reset.
        """
        ...


def signals(system: str, seed: int, seconds: float, samples: int) -> tuple[data.SignalDataset, data.SignalDataset]:
    name: Any = f"dynamics/{system}"
    return data.load(name, seconds=seconds, dt=DT, seed=seed, samples=samples)


def normalised_error(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Returns Σ (z - f)² / Σ f²; infinite if an output is not finite."""
    error = float(((outputs - targets) ** 2).sum() / (targets**2).sum())
    return error if math.isfinite(error) else math.inf


def doubling(clean: float, noisy: list[float]) -> float | None:
    """Returns the noise at which the error is twice `clean`, linear between the levels; None if it is beyond them."""
    levels, errors = (0.0, *NOISES), (clean, *noisy)
    for i in range(1, len(levels)):
        if errors[i] >= 2 * clean:
            part = (2 * clean - errors[i - 1]) / (errors[i] - errors[i - 1])
            return levels[i - 1] + part * (levels[i] - levels[i - 1])
    return None


# -- nets ----------------------------------------------------------------------------------------------------


class Recurrent:
    """The net that ULR and BPTT train: clock - linear - recurrent LIF - linear - leaky readout."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.spiking = RecurrentLIF(NEURONS, LEAK)
        layers = nn.Linear(inputs, NEURONS), self.spiking, nn.Linear(NEURONS, outputs), LeakyReadout(READOUT_LEAK)
        self.model = nn.Sequential(*layers)

    @torch.no_grad()
    def run(self, x: np.ndarray, noise: float, seed: int) -> tuple[np.ndarray, float]:
        first, spiking, linear, readout = self.model
        current = first(torch.from_numpy(x).float())
        if noise:
            drawn = torch.randn(current.shape, generator=torch.Generator().manual_seed(seed))
            current = current + noise * math.sqrt(1 - LEAK**2) * drawn
        spikes = spiking(current)
        return readout(linear(spikes)).numpy(), float(spikes.mean()) / DT


class Batches:
    """Shuffled batches of windows: inputs [T, B, C], targets [T, B, D]."""

    def __init__(self, windows: data.SignalDataset, size: int, seed: int) -> None:
        self.windows, self.size = windows, size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.windows) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.windows), generator=self.generator)
        for chosen in order[: len(self) * self.size].split(self.size):
            yield self.windows.inputs[:, chosen], self.windows.targets[:, chosen]


def optimizer_of(model: nn.Sequential, settings: Settings) -> dict[str, Any]:
    """Returns the optimizer's arguments for `train`; that of ULR() is the default."""
    if "lr" not in settings:
        return {}
    lr, readout = settings["lr"], list(model[2].parameters())
    rest = [*model[0].parameters(), *model[1].parameters()]
    groups = [{"params": rest}, {"params": readout, "lr": settings["readout"] * lr}]
    return {"optimizer": torch.optim.Adam(groups, lr), "clip": 1.0}


def trained(system: str, method: str, settings: Settings, seed: int, effort: int) -> Generates:
    """Trains a net on the training windows of a seed. Raises FloatingPointError if it diverges."""
    if method in ("force", "full-force"):
        windows, _ = signals(system, seed, effort * TRIAL, samples=4)
        x, y = (part.double().numpy() for part in windows[0])
        reservoir = (Force if method == "force" else FullForce)(**settings)
        return reservoir.fit(np.ascontiguousarray(x), np.ascontiguousarray(y), DT, seed)
    windows, _ = signals(system, seed, seconds=1.0, samples=256)
    torch.manual_seed(seed)
    net = Recurrent(windows.inputs.shape[2], windows.targets.shape[2])
    estimator = ULR() if method == "ulr" else SurrogateBPTT("fast_sigmoid", settings["slope"])
    batches = Batches(windows, BATCH, seed)
    options = {"seed": seed, "device": "cpu", "progress": False, "loss": "mse", "max_steps": effort}
    epochs = -(-effort // len(batches))
    train(net.model, batches, epochs, estimator=estimator, **options, **optimizer_of(net.model, settings))
    return net


def measured(net: Generates, windows: data.SignalDataset, noises: tuple[float, ...], seed: int) -> Row:
    """Returns the measured columns of a row."""
    x, y = windows.inputs.double().numpy(), windows.targets.double().numpy()
    outputs, rate = net.run(x, 0.0, seed)
    parts = zip(np.split(outputs, TRIALS), np.split(y, TRIALS), strict=True)
    row: Row = {"error": normalised_error(outputs, y), "rate": rate}
    row |= {f"error_trial_{i}": normalised_error(*part) for i, part in enumerate(parts, 1)}
    noisy = [normalised_error(net.run(x, level, seed)[0], y) for level in noises]
    row |= {f"error_noise_{level:g}": error for level, error in zip(noises, noisy, strict=True)}
    if noisy:
        row["noise_doubling"] = doubling(row["error"], noisy)
    return row


# -- all runs ------------------------------------------------------------------------------------------------


@dataclass
class Ledger:
    """The rows of all runs, on disk as soon as they are there. A run that has a row is not made again."""

    path: Path
    scale: float = 1.0  # of the effort

    def __post_init__(self) -> None:
        self.rows = {tuple(row[name] for name in RUN): row for row in rows(self.path)}

    def row(self, stage: str, system: str, method: str, settings: Settings, seed: int, part: float = 1.0) -> Row:
        """Returns the row of a run. part: of the whole effort."""
        whole = FORCE_TRIALS if method in ("force", "full-force") else STEPS
        effort = max(1, round(whole * part * self.scale))
        values = tuple(map(str, (stage, system, method, key(settings), seed, effort)))
        if values not in self.rows:
            run = dict(zip(RUN, values, strict=True))
            self.rows[values] = self._made(run, settings)
        return self.rows[values]

    def _made(self, run: Row, settings: Settings) -> Row:
        system, method, seed = run["system"], run["method"], int(run["seed"])
        tested, note, found = run["stage"] != "tune", "", {"error": math.inf}
        started = time.process_time()
        try:
            net = trained(system, method, settings, seed, int(run["effort"]))
            seconds = time.process_time() - started
            tests = signals(system, seed, TRIALS * TRIAL, samples=4 * WINDOWS)
            found = measured(net, tests[1] if tested else tests[0], NOISES if tested else (), seed)
            if run["stage"] == "final" and seed == 0:
                keep_outputs(net, system, method)
        except FloatingPointError:
            seconds, note = time.process_time() - started, "diverged"
        row = dict.fromkeys(COLUMNS, "") | run | {name: short(value) for name, value in found.items()}
        about = {"ulr_snn": versions()["ulr_snn"], "torch": torch.__version__, "date": str(datetime.date.today())}
        row |= {"seconds": f"{seconds:.1f}", "note": note, "machine": machine()} | about
        append(self.path, row, COLUMNS)
        print(*run.values(), f"error {row['error']}, {row['rate']} Hz, {row['seconds']} s", note, flush=True)
        return row


def short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def tuned(ledger: Ledger, system: str, method: str, rounds: int) -> Settings:
    """Returns the settings with the least error on training windows of the tuning seed; none for ULR()."""
    if method not in GRIDS:
        return {}

    def scores(points: list[Settings], part: float) -> list[Score]:
        found = [ledger.row("tune", system, method, point, TUNE_SEED, part) for point in points]
        return [(-float(row["error"]), 0.0) for row in found]

    best, interior = search([Block.of(GRIDS[method])], scores, SHORT, KEEP, rounds)
    print(f"{system} {method}: {key(best)} ({'interior' if interior else 'not shown to be interior'})", flush=True)
    return best


def run_all(ledger: Ledger, arguments: argparse.Namespace) -> None:
    for system in arguments.systems:
        for method in arguments.methods:
            settings = tuned(ledger, system, method, arguments.rounds)
            for seed in range(arguments.seeds):
                ledger.row("final", system, method, settings, seed)
                if arguments.long:
                    ledger.row("long", system, method, settings, seed, LONG)


# -- the table and the picture -------------------------------------------------------------------------------


def average(found: list[Row], column: str) -> float | None:
    """Returns the mean of a column; None if no row has it."""
    values = [float(row[column]) for row in found if row.get(column)]
    return mean(values) if values else None


def last(path: Path, stage: str) -> dict[tuple[str, str], list[Row]]:
    """Returns the rows of a stage by system and method, the last row of each seed."""
    found = {(row["system"], row["method"], row["seed"]): row for row in rows(path) if row["stage"] == stage}
    return {(s, m): [row for of, row in found.items() if of[:2] == (s, m)] for s in SYSTEMS for m in METHODS}


def table(path: Path) -> str:
    """Returns errors by system and method, of the whole test and of its third trial, and means over the systems.

    A longer search may leave rows of several settings for a seed. The last row counts.
    """
    by, longer = last(path, "final"), last(path, "long")
    heading = ["| | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    lines = []
    for title, found, column in (
        ("error", by, "error"),
        ("error in the third trial", by, "error_trial_3"),
        ("error after the longer training", longer, "error"),
        ("error in the third trial after the longer training", longer, "error_trial_3"),
    ):
        lines += ["", title, "", *heading]
        for system in SYSTEMS:
            values = [short(average(found[system, method], column)) for method in METHODS]
            lines.append(f"| {system} | " + " | ".join(values) + " |")
    lines += ["", "means over the systems", "", *heading]
    for title, column in (
        ("error", "error"),
        ("error in the first trial", "error_trial_1"),
        ("error in the second trial", "error_trial_2"),
        ("error in the third trial", "error_trial_3"),
        ("spikes of a neuron a second", "rate"),
        *((f"error with noise {level:g}", f"error_noise_{level:g}") for level in NOISES),
        ("noise at which the error doubles", "noise_doubling"),
        ("seconds of training", "seconds"),
    ):
        means = [[average(by[system, method], column) for system in SYSTEMS] for method in METHODS]
        values = [short(mean(known)) if (known := [v for v in m if v is not None]) else "" for m in means]
        lines.append(f"| {title} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def keep_outputs(net: Generates, system: str, method: str) -> None:
    """Writes the outputs of the second of two trials, for the picture."""
    steps = round(TRIAL / DT)
    outputs, _ = net.run(np.tile(clock(steps), (2, 1))[:, None], 0.0, 0)
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    np.save(OUTPUTS / f"{system}-{method}.npy", outputs[steps:, 0])


def draw(path: Path) -> None:
    """Draws targets and kept outputs, a row for each system and a column for each method."""
    figure = Figure(figsize=(11, 12), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(SYSTEMS), len(METHODS), sharex=True, sharey="row", squeeze=False)
    for system, line in zip(SYSTEMS, panels, strict=True):
        target = whole_trial(system, DT)
        time_axis = np.arange(len(target)) * DT
        line[0].set_ylabel(system, fontsize=8)
        line[0].set_ylim(1.4 * target.min(), 1.4 * target.max())
        for method, axes in zip(METHODS, line, strict=True):
            axes.plot(time_axis, target, color="#999999", linewidth=2)
            if (kept := OUTPUTS / f"{system}-{method}.npy").exists():
                axes.plot(time_axis, np.load(kept), color="#0072B2", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
    for method, axes in zip(METHODS, panels[0], strict=True):
        axes.set_title(TITLES[method], fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("seconds", fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dynamics", description=__doc__.split("\n")[0])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds of the final stage, from 0 on")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the search, among the neighbours of the best")
    parser.add_argument("--long", action="store_true", help=f"also trains {LONG:g} times as long, as stage long")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="seconds: does it run? results go to runs/dynamics-quick")
    parser.add_argument("--table", action="store_true", help="only the table and the picture")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.results, arguments.seeds, arguments.rounds = Path("runs/dynamics-quick"), 1, 0
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / "dynamics.csv"
    if not arguments.table:
        torch.set_num_threads(1)
        run_all(Ledger(path, QUICK if arguments.quick else 1.0), arguments)
    print(table(path))
    draw(arguments.results / "dynamics.png")


if __name__ == "__main__":
    main()
