"""Time and memory of a training step of each data set's reference network (`ulr-snn train NAME`).

    python -m benchmarks.references                # all data sets, about ten minutes
    python -m benchmarks.references --table

Batches are uniform noise with the shape and the number of bins that the reference network gets, and with `events` in
a recording, so nothing needs to be downloaded. `seconds_a_step`: of 12 steps without the first 4. `minutes_an_epoch` is
for the number of training recordings of the whole data set. `peak_mb` is the largest resident memory of the process, of
which the libraries take about 400 MB; the recordings come on top of it, or stay on disk (`stream=True`).
"""

import argparse
import csv
import datetime
import json
import platform
import resource
import subprocess
import sys
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from time import perf_counter

import torch

import ulr_snn
from benchmarks.accuracy import machine
from ulr_snn.data.registry import ENTRIES
from ulr_snn.data.view import View
from ulr_snn.runs.models import reference

RESULTS = Path(__file__).parent / "results" / "references.csv"
BATCH, WARM, STEPS = 64, 4, 12


@dataclass(frozen=True)
class Noise:
    recordings: int  # of the whole training set
    shape: tuple[int, ...]
    classes: int
    events: int  # of a recording, in round numbers


SETS = {
    "digits": Noise(1_438, (2, 16, 16), 10, 1_000),
    "nmnist": Noise(60_000, (2, 34, 34), 10, 4_000),
    "shd": Noise(8_156, (700,), 20, 8_000),
    "ssc": Noise(75_466, (700,), 35, 8_000),
    "dvsgesture": Noise(1_077, (2, 128, 128), 11, 300_000),
    "cifar10dvs": Noise(9_000, (2, 128, 128), 10, 200_000),
    "ncaltech101": Noise(6_967, (2, 180, 240), 101, 100_000),
    "ncars": Noise(15_422, (2, 100, 120), 2, 4_000),
    "asldvs": Noise(80_640, (2, 180, 240), 24, 30_000),
    "smnist": Noise(60_000, (99,), 10, 1_000),
}


def measured(name: str) -> dict:
    noise, chosen, entry = SETS[name], reference(name), ENTRIES[name]
    shape, bins = View(**chosen.options).shape(noise.shape), ceil(entry.span_us / entry.bin_us)
    torch.manual_seed(0)
    model = chosen.model(shape, noise.classes)
    cells = torch.Size((bins, BATCH, *shape))
    x = torch.zeros(cells.numel(), dtype=torch.uint8)
    x[torch.randint(cells.numel(), (noise.events * BATCH,))] = 1
    batch = x.view(cells), torch.randint(noise.classes, (BATCH,))
    marks: list[float] = []

    def batches():
        for _ in range(STEPS):
            marks.append(perf_counter())
            yield batch

    ulr_snn.train(model, Batches(batches), epochs=1, device="cpu", progress=False)
    seconds = (perf_counter() - marks[WARM]) / (STEPS - WARM)
    return {
        "data": name, "network": chosen.model.__name__, "options": json.dumps(dict(chosen.options)), "batch": BATCH,
        "bins": bins, "shape": "x".join(map(str, shape)), "events": noise.events, "seconds_a_step": round(seconds, 3),
        "recordings": noise.recordings, "minutes_an_epoch": round(seconds * ceil(noise.recordings / BATCH) / 60, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3), "threads": torch.get_num_threads(),
        "machine": machine(), "python": platform.python_version(), "torch": torch.__version__,
        "library": f"ulr-snn {ulr_snn.__version__}", "date": datetime.date.today().isoformat(),
    }  # fmt: skip


class Batches:  # a loader that makes its batches when they are asked for
    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return self.make()

    def __len__(self):
        return STEPS


def run(names: list[str], path: Path) -> None:
    before = {row["data"]: row for row in csv.DictReader(path.read_text().splitlines())} if path.exists() else {}
    for name in names:
        command = [sys.executable, "-m", "benchmarks.references", "--measure", name]
        before[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(before[name], file=sys.stderr)
        rows = [before[known] for known in SETS if known in before]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def show(path: Path) -> None:
    print("| data | network | a step of 64 | an epoch | memory |\n|---|---|---|---|---|")
    for row in csv.DictReader(path.read_text().splitlines()):
        kind = row["network"].removesuffix("_model").replace("default", "dense")
        step, epoch = f"{float(row['seconds_a_step']):.2f} s", f"{float(row['minutes_an_epoch']):.1f} min"
        print(
            f"| {row['data']} | {kind}, {row['bins']} bins of {row['shape']} | {step} | {epoch} | {row['peak_mb']} MB |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--measure", choices=SETS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measured(arguments.measure)))
    else:
        if not arguments.table:
            run(arguments.sets, arguments.out)
        show(arguments.out)


if __name__ == "__main__":
    main()
