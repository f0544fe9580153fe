"""How near kernels and training steps come to what the machine can do.

    python -m benchmarks.roofline [--device cuda] [--kernels ...] [--cases dense recurrent conv] [--sizes T B N]

What the machine can do is measured: the bytes a second of a copy that no cache holds, and the multiply-adds a second of
a square product in float32, as torch computes it by default. Every number that a kernel must read or write counts once.
A kernel can overlap both, so its bound is the larger of the two times. A step consists of many operations, so its bound
is their sum. Rows of kernels go to results/roofline_kernels.csv, rows of steps to results/roofline.csv.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.nets import CASES, Case
from benchmarks.speed import HERE, WARM_UP, about, batches_of, likelihood_ratio, write
from ulr_snn.kernels import dispatch
from ulr_snn.kernels.state import Draw
from ulr_snn.noise.random import Noise

KERNELS = ("scan", "recurrent scan", "credit", "recurrent credit", "leaky filter")
REPEATS = 20


@dataclass(frozen=True)
class Sizes:
    """Time steps, rows and neurons of a kernel; side of the square product; numbers of the copy."""

    kernel: tuple[int, int, int]
    square: int
    copied: int


SIZES = {"cpu": Sizes((100, 64, 256), 1024, 1 << 25), "cuda": Sizes((500, 128, 1024), 8192, 1 << 28)}
TINY = Sizes((3, 2, 8), 32, 1 << 12)


def timed(run: Callable[[], Any], device: str) -> float:
    """Seconds."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ceilings(device: str, sizes: Sizes) -> tuple[float, float]:
    """Multiply-adds and bytes a second of this machine."""
    a, source = torch.randn(sizes.square, sizes.square, device=device), torch.ones(sizes.copied, device=device)
    target = torch.zeros_like(source)
    products = min(timed(lambda: a @ a, device) for _ in range(REPEATS))
    copies = min(timed(lambda: target.copy_(source), device) for _ in range(REPEATS))
    return sizes.square**3 / products, 2 * 4 * sizes.copied / copies


# -- kernels -----------------------------------------------------------------------------------------------


def kernel(name: str, device: str, sizes: tuple[int, int, int]) -> tuple[Callable[[], Any], float, float]:
    """A call of a kernel by `dispatch`, its multiply-adds with recurrent weights, and its bytes. On a CPU, neurons that
    are silent take no multiply-adds in a recurrent scan."""
    steps, rows, neurons = sizes
    torch.manual_seed(0)
    current = torch.randn(sizes).to(device)
    weight = (torch.randn(neurons, neurons) / (4 * neurons**0.5)).to(device)  # credit stays finite over all steps
    beta, threshold, scale = (torch.tensor(value, device=device) for value in (0.9, 1.0, 1.0))
    sample = torch.arange(rows, dtype=torch.int32, device=device)
    words = Noise(0, 0, sample, torch.zeros_like(sample)).words(0, 0, steps)
    recurrent = weight if name.startswith("recurrent") else None
    scan = partial(dispatch.scan, current, recurrent, beta, threshold, "subtract", Draw("logistic", scale, words, None))
    done = scan(None)
    if done is None:
        raise SystemExit(f"no kernel runs {name!r} on {device}")
    spikes, x, _ = done
    credit = partial(dispatch.credit, current, x, "logistic", scale, None, spikes, beta, threshold, "subtract")
    later, numbers, square = torch.zeros_like(current[0]), steps * rows * neurons, neurons**2
    share = float(spikes.mean()) if device == "cpu" else 1.0
    if name == "scan":
        return partial(scan, None), 0, 4 * 3 * numbers
    if name == "recurrent scan":
        return partial(scan, None), share * numbers * neurons, 4 * (4 * numbers + square)
    if name == "credit":
        return partial(credit, later, True), 0, 4 * 4 * numbers
    if name == "recurrent credit":
        return partial(credit, later, True, weight=weight), numbers * neurons, 4 * (4 * numbers + square)
    return partial(dispatch.leaky, current, None, beta, "none"), 0, 4 * 2 * numbers


def rows_of_kernels(names: list[str], device: str, sizes: Sizes) -> list[dict[str, Any]]:
    macs, moved = ceilings(device, sizes)
    steps, batch, width = sizes.kernel
    rows = []
    for name in names:
        run, products, size = kernel(name, device, sizes.kernel)
        timed(run, device)
        seconds = median(timed(run, device) for _ in range(REPEATS))
        bound = max(products / macs, size / moved)
        rows.append({"kernel": name, "device": device, "steps": steps, "batch": batch, "width": width,
                     "products": round(products), "bytes": size, "products_a_second": round(products / seconds),
                     "bytes_a_second": round(size / seconds), "machine_products_a_second": round(macs),
                     "machine_bytes_a_second": round(moved), "bound_ms": round(1e3 * bound, 4),
                     "ms": round(1e3 * seconds, 4), "fraction": round(bound / seconds, 3),
                     **about("ulr", device)})  # fmt: skip
        print(f"{name:16} T={steps} B={batch} N={width}: {size / seconds / 1e9:.1f} of {moved / 1e9:.1f} GB/s, "
              f"{products / seconds / 1e9:.1f} of {macs / 1e9:.1f} G multiply-adds/s, {1e3 * seconds:.3f} ms, "
              f"{bound / seconds:.0%} of the bound", flush=True)  # fmt: skip
    return rows


# -- steps -------------------------------------------------------------------------------------------------


def demand(case: Case) -> tuple[float, float]:
    """Multiply-adds and bytes that a step cannot do without: products of the first layer with its events (forward and
    weights), dense ones of all later layers (forward, weights, credit); current, drive, spikes, slope and credit of
    every neuron at every time step, each written and read once."""
    rows, n = case.steps * case.batch, case.width
    if case.kind == "conv":
        first, second, last = 50 * 12 * 17 * 17, 108 * 24 * 9 * 9, 24 * 9 * 9 * n
        products, neurons = rows * (2 * first + 3 * second + 3 * last), 12 * 17 * 17 + 24 * 9 * 9 + n
    else:
        products = rows * 2 * case.density * case.inputs * n
        products += rows * 3 * n * n * {"dense": 1, "recurrent": 1, "wide": 0}[case.kind]
        neurons = n * {"dense": 2, "recurrent": 1, "wide": 1}[case.kind]
    return products, 2 * 5 * 4 * rows * neurons


def rows_of_steps(cases: list[Case], device: str, sizes: Sizes) -> list[dict[str, Any]]:
    macs, moved = ceilings(device, sizes)
    rows = []
    for case in cases:
        batches = batches_of(case, device)
        step = likelihood_ratio(case, device)
        for batch in islice(batches, WARM_UP):
            step(*batch)
        ms = 1e3 * median(timed(partial(step, *batch), device) for batch in islice(batches, 24))
        products, size = demand(case)
        bound = 1e3 * (products / macs + size / moved)
        rows.append({"case": case.name, "products": products, "bytes": size, "machine_products_a_second": macs,
                     "machine_bytes_a_second": moved, "bound_ms": round(bound, 2), "ms": round(ms, 2),
                     "fraction": round(bound / ms, 3), **about("ulr", device)})  # fmt: skip
        print(f"{case.name}: {products / 1e6:.0f} M multiply-adds at {macs / 1e9:.0f} G/s, {size / 1e6:.0f} MB at "
              f"{moved / 1e9:.1f} GB/s: {bound:.1f} ms; a step takes {ms:.1f} ms, {bound / ms:.0%}")  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="*", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--cases", nargs="*", choices=CASES, default=["dense", "recurrent", "conv"])
    parser.add_argument("--sizes", nargs=3, type=int, metavar=("T", "B", "N"), help="of the kernels")
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing, to try the command")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = TINY if arguments.tiny else SIZES[torch.device(arguments.device).type]
    if arguments.sizes:
        sizes = Sizes(tuple(arguments.sizes), sizes.square, sizes.copied)
    if arguments.kernels:
        found = rows_of_kernels(arguments.kernels, arguments.device, sizes)
        write(arguments.results / "roofline_kernels.csv", found)
    cases = [CASES[name] for name in arguments.cases]
    cases = [case.at(steps=3, batch=4, width=8) for case in cases] if arguments.tiny else cases
    if cases:
        write(arguments.results / "roofline.csv", rows_of_steps(cases, arguments.device, sizes))


if __name__ == "__main__":
    main()
