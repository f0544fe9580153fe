"""Throughput of `ulr_snn.data.loader`: recordings in memory against recordings that stay in the cache file.

    python -m benchmarks.streaming                 # both cases, a few minutes, 1.5 GB of disk under --folder
    python -m benchmarks.streaming --table

Events are uniform noise in the number and the sensor size of DVS128 Gesture and of N-MNIST. Each row is one epoch of
shuffled batches in a process of its own. `cold`: the file was dropped from the page cache before the epoch.
`mb_a_second` counts the bytes of the records that the batches were made of. `anonymous_mb` is the memory that the
process cannot give back, at the end of the epoch; pages of the mapped file are not part of it.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from benchmarks.accuracy import machine
from ulr_snn import data
from ulr_snn.data.binning import Recordings

RESULTS = Path(__file__).parent / "results" / "streaming.csv"
CHUNK = 100


@dataclass(frozen=True)
class Case:
    recordings: int
    events: int  # of a recording
    side: int  # of the sensor
    span_us: int
    bin_us: int
    batch: int


CASES = {
    "gesture": Case(1_077, 200_000, 128, 6_000_000, 100_000, 16),
    "nmnist": Case(20_000, 4_200, 34, 300_000, 15_000, 64),
}


def noise(case: Case) -> Iterator[Recordings]:
    draw = np.random.default_rng(0)
    for start in range(0, case.recordings, CHUNK):
        count = min(CHUNK, case.recordings - start)
        size = count * case.events
        time, feature = draw.integers(0, case.span_us, size), draw.integers(0, 2 * case.side**2, size)
        yield Recordings(time, feature, np.arange(count + 1) * case.events, np.arange(count) % 10)


def register(name: str, case: Case) -> None:
    def read() -> data.Raw:
        none = np.empty(0, np.int64)
        nothing = Recordings(none, none, np.zeros(1, np.int64), none)
        return data.Raw((2, case.side, case.side), 10, {"train": noise(case), "test": [nothing]})

    entry = data.Entry(case.span_us, case.bin_us, lambda root: data.Recorded(str(case), "1", read))
    data.register(name, entry)


def measured(name: str, mode: str, sparse: bool, augment: bool, folder: Path) -> dict:
    case = CASES[name]
    register(f"noise-{name}", case)
    changes = data.Augmentation(shift=4) if augment else None
    start = perf_counter()
    train, _ = data.load(f"noise-{name}", cache_dir=folder, stream=mode != "memory", augment=changes)
    loaded = perf_counter() - start
    records = getattr(train._source, "timed" if augment else "binned").records
    if mode == "stream cold":
        with records._place[0].open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start, seen = perf_counter(), 0
    for x, _ in data.loader(train, case.batch, shuffle=True, sparse=sparse):
        seen += x.shape[1]
    seconds = perf_counter() - start
    status = Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]
    return {
        "case": name, "mode": mode, "batches": "sparse" if sparse else "dense", "augmented": augment,
        "batch": case.batch, "file_mb": round(records.nbytes / 1e6), "load_seconds": round(loaded, 2),
        "samples_a_second": round(seen / seconds), "mb_a_second": round(records.nbytes / 1e6 / seconds),
        "anonymous_mb": round(int(status) / 1e3), "threads": torch.get_num_threads(), "machine": machine(),
        "python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def run(names: list[str], folder: Path, path: Path) -> None:
    rows = []
    for name in names:
        for augment in (False, True):
            build = ["--measure", json.dumps([name, "stream", True, augment])]
            for arguments in [build] + [
                ["--measure", json.dumps([name, mode, sparse, augment])]
                for mode in ("memory", "stream", "stream cold")
                for sparse in (False, True)
            ]:
                command = [sys.executable, "-m", "benchmarks.streaming", "--folder", str(folder), *arguments]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(found, file=sys.stderr)
                if arguments is not build:  # which also builds the cache
                    rows.append(found)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def show(path: Path) -> None:
    print("| case | batches | events | memory | streamed | streamed, cold |\n|---|---|---|---|---|---|")
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in csv.DictReader(path.read_text().splitlines()):
        key = row["case"], row["batches"], "augmented" if row["augmented"] == "True" else "as cached"
        found.setdefault(key, {})[row["mode"]] = f"{row['samples_a_second']} samples/s, {row['mb_a_second']} MB/s"
    for key, modes in found.items():
        print("| " + " | ".join([*key, *modes.values()]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/streaming"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, mode, sparse, augment = json.loads(arguments.measure)
        print(json.dumps(measured(name, mode, sparse, augment, arguments.folder)))
    elif arguments.table:
        show(arguments.out)
    else:
        run(arguments.cases, arguments.folder, arguments.out)
        show(arguments.out)


if __name__ == "__main__":
    main()
