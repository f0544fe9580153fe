"""How long a training step takes: likelihood ratios against surrogate-gradient BPTT in three libraries.

    python -m benchmarks.speed [--cases dense recurrent conv] [--compiled] [--device cpu]
    python -m benchmarks.speed --sweep steps | width | batch [--sizes ...]     # cases at growing sizes
    python -m benchmarks.speed --cases published --libraries spikingjelly      # each method takes 4 GB

Every method sees the same uint8 events and does a whole step: conversion, passes, gradient, Adam. Methods take turns in
one process; of each round the mean time of a step counts, over rounds the median, with the first and third quartile. A
round is eight steps, so that those which learn the feedback count in proportion, or fewer of what takes a second and
more; Adam is that of `train`, with its rate (fused, which is the fastest), and batches differ, so that weights move as
in a training. Rows go to results/.
"""

import argparse
import csv
import datetime
import importlib.metadata
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import machine
from benchmarks.nets import CASES, CLASSES, LOOPS, NETS, Case, ours
from ulr_snn import ULR, Online, attach

HERE = Path(__file__).resolve().parent
WARM_UP, STEPS, ROUNDS = 24, 8, 9
SECONDS = 8.0  # that a round may take
RATE = 1e-2
BATCHES = 8
SWEEPS = {"steps": (10, 30, 100, 300, 1000), "width": (256, 1024, 4096), "batch": (8, 32, 128, 512)}
Step = Callable[[Tensor, Tensor], None]
Nets = dict[str, Callable[[Case], torch.nn.Module]]


def events_of(case: Case, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random events of the case's density, and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.empty(case.steps, case.batch, *case.sample, dtype=torch.uint8)
    for step in x:  # one at a time: what is measured is the memory of others
        step.copy_(torch.rand(step.shape, generator=generator) < case.density)
    y = torch.randint(0, case.width if case.kind == "wide" else CLASSES, (case.batch,), generator=generator)
    return x.to(device), y.to(device)


def batches_of(case: Case, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """A few batches, over and over: one alone is soon known by heart, and its gradients too small for usual numbers."""
    return cycle([events_of(case, device, seed) for seed in range(BATCHES)])


def likelihood_ratio(case: Case, device: str, memory: str = "auto") -> Step:
    """memory: of `ULR`; "stream" updates at every time step, by a loss of each."""
    torch.manual_seed(0)
    streams = memory == "stream"
    model = ours(case, averaged=not streams).to(device)
    optimizer = torch.optim.Adam(model.parameters(), RATE, fused=True)
    attached = attach(
        model, Online() if streams else ULR(memory=memory), "ce_rate" if streams else "ce_count", total_steps=1000
    )

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        if streams:
            for _ in attached.steps(x, y):
                optimizer.step()
                optimizer.zero_grad()
            return
        attached.backward(x, y)
        optimizer.step()

    return step


def bptt(case: Case, device: str, library: str, compiled: bool = False, nets: Nets = NETS) -> Step:
    torch.manual_seed(0)
    model = nets[library](case).to(device)
    optimizer = torch.optim.Adam(model.parameters(), RATE, fused=True)
    run = torch.compile(model) if compiled else model

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(run(x.float()), y).backward()
        optimizer.step()

    return step


def methods(case: Case, device: str, compiled: bool, libraries: Iterable[str]) -> Iterator[tuple[str, Step]]:
    yield "ulr", likelihood_ratio(case, device)
    for library in libraries:
        try:
            importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
        yield f"{library} BPTT", bptt(case, device, library)
        if library in LOOPS and case.kind == "recurrent":
            yield f"{library} BPTT, own loop", bptt(case, device, library, nets=LOOPS)
        if compiled:
            yield f"{library} BPTT, torch.compile", bptt(case, device, library, compiled=True)


def rows_of(
    case: Case, device: str, compiled: bool, rounds: int = ROUNDS, libraries: Iterable[str] = NETS
) -> list[dict[str, Any]]:
    """Measures one case; prints the table."""
    batches = batches_of(case, device)
    steps = dict(methods(case, device, compiled, libraries))
    times: dict[str, list[float]] = {name: [] for name in steps}

    def run(step: Step, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            step(*next(batches))
        if device != "cpu":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / count

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries
        counts = {}
        for name, step in steps.items():
            counts[name] = max(1, min(STEPS, int(1e3 * SECONDS / min(run(step, 1), run(step, 1)))))
            run(step, counts[name] * WARM_UP // STEPS)
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(run(step, counts[name]))
    middle = {name: median(found) for name, found in times.items()}
    fastest = min((name for name in times if name != "ulr"), key=middle.get, default="ulr")
    rows = []
    for name, found in times.items():
        low, _, high = quantiles(found, n=4)
        ratio = median(mine / other for mine, other in zip(found, times[fastest], strict=True))
        rows.append(
            {"case": case.name, "method": name, "steps": case.steps, "batch": case.batch, "width": case.width,
             "density": case.density, "device": device, "threads": torch.get_num_threads(), "dtype": "float32",
             "ms": round(middle[name], 2), "ms_low": round(low, 2), "ms_high": round(high, 2), "ratio": round(ratio, 3),
             **about(name.split()[0], device)}
        )  # fmt: skip
        print(f"{case.name:10} T={case.steps:<5} B={case.batch:<4} N={case.width:<6} {name:32} {middle[name]:9.2f} ms "
              f"({low:.2f} to {high:.2f}), {ratio:.2f} of {fastest}", flush=True)  # fmt: skip
    return rows


def about(library: str, device: str) -> dict[str, str]:
    name = "ulr-snn" if library == "ulr" else library
    where = machine() if device == "cpu" else torch.cuda.get_device_name()
    return {"machine": where, "torch": torch.__version__, "library": f"{name} {importlib.metadata.version(name)}",
            "date": datetime.date.today().isoformat()}  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["dense", "recurrent", "conv"])
    parser.add_argument("--sweep", choices=SWEEPS)
    parser.add_argument("--sizes", nargs="+", type=int, help="of the sweep, in place of all")
    parser.add_argument("--libraries", nargs="+", choices=NETS, default=list(NETS), help="peers; each takes its memory")
    parser.add_argument("--compiled", action="store_true", help="the peers by torch.compile as well")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help=f"at least 2 (default: {ROUNDS}, of a sweep 3)")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    if arguments.sizes and not arguments.sweep:
        parser.error("--sizes are those of a --sweep; name one")
    torch.set_num_threads(arguments.threads)
    cases = [CASES[name] for name in arguments.cases]
    rounds = arguments.rounds or (3 if arguments.sweep else ROUNDS)
    if arguments.sweep:
        sizes = arguments.sizes or SWEEPS[arguments.sweep]
        cases = [case.at(**{arguments.sweep: size}) for case in cases for size in sizes]
    for case in cases:
        found = rows_of(case, arguments.device, arguments.compiled, rounds, arguments.libraries)
        write(arguments.results / "speed.csv", found)


if __name__ == "__main__":
    main()
