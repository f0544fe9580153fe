"""How much memory a training step takes: likelihood ratios against surrogate-gradient BPTT in three libraries.

    python -m benchmarks.memory [--cases dense recurrent] [--steps 100 500 1000] [--repeats 5] [--device cuda]

Of every figure a fresh process: the peak of what is resident (VmHWM; on a GPU, of what torch has allocated there) after
three steps at T time steps, less that after three steps at T = 1, less what the batch of uint8 events itself has more;
median over repeats. Above weights, their gradients and the optimizer's state, therefore; what the feedback takes
counts, as far as it grows with T at all. Where every time step is an update ("ulr stream") there are as many steps as
make UPDATES, at every T: what Python's own pools of objects touch grows a little over the first thousands. The C
library and MKL are told to give back what is freed (see ALLOCATOR): what the first holds on to else grows with the
number of updates, and the second keeps its last scratch.
Rows go to results/memory.csv.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.nets import CASES, NETS
from benchmarks.speed import HERE, about, bptt, events_of, likelihood_ratio, write

METHODS = ("ulr replay", "ulr stream", "ulr auto", *(f"{library} BPTT" for library in NETS))
MB = 1 << 20
UPDATES = 3000  # of a method that makes one at every time step
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",  # of glibc
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MKL_DISABLE_FAST_MM": "1",
}


def peak(device: str = "cpu") -> int:
    """Of what this process had resident, or allocated on a GPU, in bytes."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(name: str, method: str, steps: int, updates: int, device: str = "cpu") -> dict[str, float]:
    """In this process: peaks after steps at T = 1 and at T, in bytes, and the batch."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    case = CASES[name].at(steps=steps)
    found = {}
    for label, now in (("first", case.at(steps=1)), ("peak", case)):
        x, y = events_of(now, device)
        library, _, kind = method.partition(" ")
        step = None  # the first model goes, with all that is its own
        gc.collect()
        step = likelihood_ratio(now, device, kind) if library == "ulr" else bptt(now, device, library)
        for _ in range(-(-updates // steps) if label == "peak" and method == "ulr stream" else 3):
            step(x, y)
        found[label] = peak(device)
        found[f"{label}_batch"] = x.numel()
    return found


def in_fresh_process(benchmark: str, *what: str) -> Any:
    """What a benchmark prints last, as JSON, when it is asked for this one figure alone."""
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--one", *what]
    environment = os.environ | ALLOCATOR
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def fresh(name: str, method: str, steps: int, updates: int = UPDATES, device: str = "cpu") -> float:
    """MB above what a step at T = 1 takes, and above the batch."""
    found = in_fresh_process("memory", name, method, str(steps), str(updates), device)
    return (found["peak"] - found["first"] - (found["peak_batch"] - found["first_batch"])) / MB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["dense", "recurrent"])
    parser.add_argument("--steps", nargs="+", type=int, default=[100, 500, 1000])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, method, steps, updates, device = arguments.one
        print(json.dumps(measure(name, method, int(steps), int(updates), device)))
        return
    for name in arguments.cases:
        for steps in arguments.steps:
            rows: list[dict[str, Any]] = []
            for method in arguments.methods:
                found = sorted(fresh(name, method, steps, device=arguments.device) for _ in range(arguments.repeats))
                rows.append({"case": name, "method": method, "steps": steps, "batch": CASES[name].batch,
                             "width": CASES[name].width, "mb": round(median(found), 1), "mb_low": round(found[0], 1),
                             "mb_high": round(found[-1], 1), **about(method.split()[0], arguments.device)})  # fmt: skip
                print(f"{name:10} T={steps:<5} {method:20} {median(found):8.1f} MB ({found[0]:.1f} to {found[-1]:.1f})",
                      flush=True)  # fmt: skip
            write(arguments.results / "memory.csv", rows)


if __name__ == "__main__":
    main()
