"""Does a likelihood-ratio correction of the feedback pay? λ between 0 and 1, at equal passes and at equal steps.

    python -m benchmarks.correction            # all networks, methods and seeds; stop and start it at will
    python -m benchmarks.correction --table

The gradient is that of the prediction a, times (1 - λ) k + λ p' (secants k, derivative p'), plus λ times that of the
scores, with a from the other copies as control variate: feedback with λ = 0, unbiased with λ = 1. "x2", "x4": so many
times the steps. A row a run in results/correction.csv; on six networks of the zoo and on the memory task, there on a
part of the training set that is held out.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from benchmarks.tasks import TASKS
from benchmarks.zoo import command_line, missing, note_run, rows, run_or_show, trained
from benchmarks.zoo_networks import ZOO, Network, Parts
from ulr_snn import ULR
from ulr_snn.credit.formula import Contribution, Formula
from ulr_snn.estimators.attachment import Attaches, LearnedAttachment
from ulr_snn.estimators.config import Config
from ulr_snn.memory.step import Memory, Step
from ulr_snn.model.passes import Group
from ulr_snn.sampling.kinds import Independent

NETWORKS = ("sj_csnn", "snn_t6_cnn", "v_deep4", "sj_seq_plain", "no_speech_lif", "v_spike_LIF", "memory")
STEPS = {"memory": 1000}  # others: 150


@dataclass(frozen=True)
class Mixed(Formula):
    """The formula with the summand of the scores times a factor."""

    factor: float = 1.0

    def of_group(self, group: Group, *others: Any) -> Iterator[Contribution]:
        for record in (r for p in group.passes for r in p.records):
            record.__dict__["slope"] = torch.lerp(record.response, record.slope, self.factor)  # in place of p'
        for one in super().of_group(group, *others):
            yield replace(one, gradient=one.gradient * self.factor) if one.by_score else one


@dataclass(frozen=True)
class MixedStep(Step):
    """A training step with this formula."""

    factor: float = 1.0

    @property
    def formula(self) -> Mixed:
        known = super().formula
        return Mixed(**{f.name: getattr(known, f.name) for f in fields(known)}, factor=self.factor)


class MixedAttachment(LearnedAttachment):
    """What `Corrected` attaches."""

    factor: float

    def prepared(self, *batch: Any) -> MixedStep:
        step = super().prepared(*batch)
        return MixedStep(step.config, step.learner, step.bound, step.batch, self.factor)


class Corrected(Attaches):
    """`ULR(credit="residual")` with the summand of the scores times a factor."""

    def __init__(self, factor: float, copies: int) -> None:
        self.factor = factor
        self.estimator = ULR(credit="residual", sampling=Independent(copies))

    @property
    def config(self) -> Config:
        return self.estimator.config

    @property
    def strategy(self) -> Memory:
        return self.estimator.strategy

    def attach(self, model: nn.Module, *options: Any, **others: Any) -> MixedAttachment:
        loss, seed, time_first, *total = options
        found = MixedAttachment(model, self.config, self.strategy, loss, seed, time_first, *total, **others)
        found.factor = self.factor
        return found


METHODS: dict[str, tuple[Any, int]] = {  # estimator, times the steps
    "feedback 1": (ULR(), 1),
    "feedback 1 x2": (ULR(), 2),
    "feedback 2": (ULR(copies=2, antithetic=False), 1),
    "lambda 0.1, 2": (Corrected(0.1, 2), 1),
    "lambda 0.3, 2": (Corrected(0.3, 2), 1),
    "lambda 1, 2": (Corrected(1.0, 2), 1),
    "feedback 1 x4": (ULR(), 4),
    "feedback 4": (ULR(copies=4), 1),
    "lambda 0.1, 4": (Corrected(0.1, 4), 1),
    "lambda 0.3, 4": (Corrected(0.3, 4), 1),
    "lambda 1, 4": (Corrected(1.0, 4), 1),
}


def memory(root: str) -> Parts:
    """The memory task, of whose training set a fifth is held out."""
    part, _ = TASKS["memory"].recordings(root)
    seen = TASKS["memory"].view(part)
    samples = [seen[i] for i in range(len(seen))]
    x = torch.stack([torch.as_tensor(sample[0]) for sample in samples])
    y = torch.tensor([int(sample[1]) for sample in samples])
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    held, kept = order[: len(y) // 5], order[len(y) // 5 :]
    return (x[kept], y[kept]), (x[held], y[held])


def network(name: str) -> Network:
    return ZOO[name] if name in ZOO else Network(TASKS["memory"].net, memory, "ce_count")


def run(arguments: argparse.Namespace) -> None:
    path = Path(arguments.out)
    for name, method, seed in missing(path, arguments.networks, METHODS, range(arguments.seeds)):
        estimator, times = METHODS[method]
        steps = times * STEPS.get(name, 150)
        found = trained(network(name), {"estimator": estimator}, seed, steps, arguments.root)
        note_run(path, name, method, seed, steps, found)


def show(path: Path) -> None:
    found = rows(path)
    names = [name for name in NETWORKS if any(r["network"] == name for r in found)]
    print("| method | " + " | ".join(names) + " | mean | time |\n|" + "---|" * (len(names) + 3))
    spent = {}
    for method in METHODS:
        cells = [[r for r in found if (r["network"], r["method"]) == (name, method)] for name in names]
        if not all(cells):
            continue
        accuracy = [mean(float(r["accuracy"]) for r in cell) for cell in cells]
        spent[method] = [mean(float(r["ms"]) * int(r["steps"]) for r in cell) for cell in cells]
        time = mean(a / b for a, b in zip(spent[method], spent["feedback 1"], strict=True))
        print(f"| {method} | " + " | ".join(f"{a:.1f}" for a in accuracy) + f" | {mean(accuracy):.1f} | {time:.2f} |")


def main() -> None:
    run_or_show(command_line(__doc__, NETWORKS, 2, "correction.csv"), run, show)


if __name__ == "__main__":
    main()
