"""How much memory many copies of a step take: whole, and one after another.

    python -m benchmarks.copies [--copies 2 8 32] [--repeats 3]

Of every figure a fresh process: the peak of what is resident (VmHWM) after a step of K copies, less that after a step
of one; median over repeats. "firing": the dense saccade-mnist net, credit "global"; "in turn": with memory="replay";
"currents": threshold units in the place of neurons, with noise on their currents. stored: bytes that the noise or score
of a neuron and time step takes. Rows go to results/copies.csv.
"""

import argparse
import json
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.memory import MB, in_fresh_process, peak
from benchmarks.nets import CASES
from benchmarks.speed import HERE, about, events_of, write
from ulr_snn import LIF, ULR, CurrentNoise, TimeAverage, attach

KINDS = {"firing": 4, "firing, in turn": 0, "currents": 4, "currents, in turn": 0}


class Hard(nn.Module):
    """[..., N] -> 0 or 1."""

    def forward(self, current: Tensor) -> Tensor:
        return (current.detach() > 0).to(current.dtype)


def net(kind: str) -> nn.Sequential:
    unit = LIF if kind.startswith("firing") else Hard
    layers = [nn.Linear(2312, 256), unit(), nn.Linear(256, 256), unit(), TimeAverage(), nn.Linear(256, 10)]
    return nn.Sequential(nn.Flatten(2), *layers)


def estimator(kind: str, copies: int) -> ULR:
    noise = {} if kind.startswith("firing") else dict.fromkeys(("2", "4"), CurrentNoise())
    memory = "replay" if kind.endswith("in turn") else "auto"
    return ULR(credit="global", copies=copies, antithetic=copies > 1, noise=noise, memory=memory)


def measure(kind: str, copies: int) -> float:
    """In this process: MB above what a step of one copy takes."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    x, y = events_of(CASES["dense"], "cpu")
    found = []
    for k in (1, copies):
        torch.manual_seed(0)
        model = net(kind)
        with attach(model, estimator(kind, k), seed=0) as ulr:
            for _ in range(2):
                model.zero_grad()
                ulr.backward(x, y)
        found.append(peak())
    return (found[1] - found[0]) / MB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", nargs="+", type=int, default=[2, 8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]))))
        return
    rows = []
    for kind, stored in KINDS.items():
        for copies in arguments.copies:
            found = sorted(in_fresh_process("copies", kind, str(copies)) for _ in range(arguments.repeats))
            low, middle, high = (round(value, 1) for value in (found[0], median(found), found[-1]))
            row = {"kind": kind, "copies": copies, "stored": stored, "mb": middle, "mb_low": low, "mb_high": high}
            rows.append(row | about("ulr", "cpu"))
            print(f"{kind:20} K={copies:<4} {median(found):8.1f} MB ({found[0]:.1f} to {found[-1]:.1f})", flush=True)
    write(arguments.results / "copies.csv", rows)


if __name__ == "__main__":
    main()
