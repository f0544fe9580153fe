"""How fast two processes train on one joined batch, against one process, and how much travels between them.

    python -m benchmarks.ranks [--cases dense recurrent conv] [--rounds 9]

One process with one thread, one with two threads, and two processes with one thread each (gloo), in turn, on the same
joined batches: a whole step, from events to Adam. Of each round the mean over STEPS steps counts, over rounds the
median, with the first and third quartile. Of two processes rank 0 counts, which waits for the other. bytes: what a
rank hands to collectives in a step; collectives: their number. Rows go to results/ranks.csv.
"""

import argparse
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.nets import CASES
from benchmarks.speed import HERE, about, batches_of, likelihood_ratio, write

WAYS = ((1, 1), (1, 2), (2, 1))  # processes, and threads of each
WARM_UP, STEPS = 24, 8


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes that this rank hands to each collective within the context."""
    usual, found = (dist.all_reduce, dist.all_gather), []

    def reduce(tensor: Any, *options: Any) -> Any:
        found.append(tensor.numel() * tensor.element_size())
        return usual[0](tensor, *options)

    def gather(tensors: Any, tensor: Any, *options: Any) -> Any:
        found.append(tensor.numel() * tensor.element_size())
        return usual[1](tensors, tensor, *options)

    dist.all_reduce, dist.all_gather = reduce, gather
    try:
        yield found
    finally:
        dist.all_reduce, dist.all_gather = usual


def measure(rank: int, size: int, threads: int, name: str, rounds: int, port: int, path: str) -> None:
    """Runs as one rank. Rank 0 writes the seconds of a step in every round, and bytes and collectives of a step."""
    torch.set_num_threads(threads)
    if size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=size)
    case = CASES[name]
    own = slice(case.batch * rank // size, case.batch * (rank + 1) // size)
    step, batches = likelihood_ratio(case, "cpu"), batches_of(case, "cpu")
    for x, y in islice(batches, WARM_UP):
        step(x[:, own], y[own])
    seconds = []
    with counted() as sent:
        for _ in range(rounds):
            begun = time.perf_counter()
            for x, y in islice(batches, STEPS):
                step(x[:, own], y[own])
            seconds.append((time.perf_counter() - begun) / STEPS)
    if rank == 0:
        every = STEPS * rounds
        Path(path).write_text(json.dumps([seconds, sum(sent) / every, len(sent) / every]))
    if size > 1:
        dist.destroy_process_group()


def measured(name: str, size: int, threads: int, rounds: int) -> tuple[list[float], float, float]:
    """Measures one way in fresh processes."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        path = f"{folder}/found"
        spawn(measure, (size, threads, name, rounds, port, path), nprocs=size)
        return json.loads(Path(path).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["dense", "recurrent", "conv"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes of each way, in turn")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    for name in arguments.cases:
        found: dict[tuple[int, int], list[Any]] = {way: [] for way in WAYS}
        for _ in range(arguments.repeats):
            for way in WAYS:
                found[way].append(measured(name, *way, arguments.rounds))
        case, rows = CASES[name], []
        for (size, threads), runs in found.items():
            low, middle, high = quantiles([s for seconds, *_ in runs for s in seconds], n=4)
            row = {"case": name, "processes": size, "threads": threads, "batch": case.batch, "steps": case.steps,
                   "ms": round(1e3 * middle, 2), "ms_low": round(1e3 * low, 2), "ms_high": round(1e3 * high, 2),
                   "samples_per_s": round(case.batch / middle), "bytes": round(runs[0][1]),
                   "collectives": round(runs[0][2], 1), **about("ulr", "cpu")}  # fmt: skip
            rows.append(row)
            print(f"{name:10} {size} x {threads} threads {1e3 * middle:8.2f} ms ({1e3 * low:.2f} to {1e3 * high:.2f}), "
                  f"{case.batch / middle:7.0f} samples a second, {runs[0][1]:9.0f} bytes, {runs[0][2]:.1f} collectives",
                  flush=True)  # fmt: skip
        write(arguments.results / "ranks.csv", rows)


if __name__ == "__main__":
    main()
