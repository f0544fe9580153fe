"""The questions of the paper on unified likelihood ratios (arXiv 2305.08960), on our data: one figure a question.

    python -m benchmarks.paper [--questions ...] [--seeds 0 1 2]

Rows go to results/paper.csv, those that are there are not made again; figures to results/paper_QUESTION.png. Recordings
are looked for under ULR_SNN_DATA, else ../shared/data beside the repository. See README.md beside this file.
"""

import argparse
import csv
import datetime
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy import machine
from benchmarks.tasks import TASKS
from ulr_snn import (
    LIF,
    ULR,
    AdaptiveCopies,
    CurrentNoise,
    Fold,
    Independent,
    TimeAverage,
    WeightNoise,
    data,
    diagnose,
    evaluate,
    train,
)
from ulr_snn.peers import METHODS, SurrogateBPTT
from ulr_snn.sites.binding import bind_sites, spiking_layers

HERE = Path(__file__).resolve().parent
COLUMNS = ("question", "seed", "task", "method", "setting", "measure", "value", "machine", "torch", "date")
Row = tuple[str, str, str, str, float]  # task, method, setting, measure, value
ONE_POINT = ULR(credit="global", copies=1, antithetic=False)
REDUCTIONS = {
    "one point": ONE_POINT,
    "pair": ULR(credit="global", copies=2),
    "8 copies": ULR(credit="global", copies=8, antithetic=False),
    "8 in pairs": ULR(credit="global", copies=8),
    "8, Sobol": ULR(credit="global", copies=8, antithetic=False, quasi_monte_carlo=True),
    "layerwise, 4": ULR(credit="global", copies=4, layerwise=True),
    "4 to 32, adaptive": ULR(credit="global", copies=AdaptiveCopies(most=32)),
    "residual, 8": ULR(credit="residual", copies=8),
    "feedback": ULR(),
}


def root() -> str:
    return os.environ.get("ULR_SNN_DATA", str(HERE.parents[1] / "shared" / "data"))


def trained(task: str, seed: int, net: Callable[[], nn.Module] | None = None, **options: Any) -> nn.Module:
    """The task's net, trained for its epochs."""
    about = TASKS[task]
    train_set, _ = about.recordings(root())
    torch.manual_seed(seed)
    model = (net or about.net)()
    batches = data.loader(about.view(train_set), 64, shuffle=True, seed=seed)
    options = {"epochs": about.epochs} | options
    train(model, batches, seed=seed, device="cpu", progress=False, **options)
    return model


def tests(task: str) -> Any:
    return data.loader(TASKS[task].view(TASKS[task].recordings(root())[1]), 256)


def accuracy(task: str, model: nn.Module) -> float:
    return evaluate(model, tests(task), device="cpu")["accuracy"]


# -- the questions -----------------------------------------------------------------------------------------


def reductions(seed: int) -> Iterator[Row]:
    """What does each variance reduction give? Gradients on saccade-mnist's dense net, accuracy on digits."""
    task = "saccade-mnist-dense"
    train_set, _ = TASKS[task].recordings(root())
    batch = next(iter(data.loader(TASKS[task].view(train_set), 64, shuffle=True, seed=seed)))
    estimators = REDUCTIONS | {"surrogate": SurrogateBPTT()}
    for when, epochs in (("at first", 0), ("after an epoch", 1)):
        torch.manual_seed(seed)
        model = trained(task, seed, epochs=epochs, max_steps=None) if epochs else TASKS[task].net()
        found = diagnose(model, batch, estimators, draws=16, reference_draws=48, progress=epochs / 5, seed=seed)
        for row in found.rows:
            for measure in ("variance", "cosine", "step_cosine", "passes"):
                if row[measure] is not None:
                    yield task, row["estimator"], f"{when}, {row['layer']}", measure, row[measure]
    for name, estimator in REDUCTIONS.items():
        yield "digits", name, "trained", "accuracy", accuracy("digits", trained("digits", seed, estimator=estimator))


def convolution() -> nn.Sequential:
    return nn.Sequential(
        Fold(nn.Conv2d(2, 8, 5, stride=2, padding=2)), LIF(), nn.Flatten(2), TimeAverage(), nn.Linear(8 * 64, 10)
    )


def sites(seed: int) -> Iterator[Row]:
    """For a convolution: noise on its kernels, on its output (the neurons' currents), or in the firing?"""
    ways = {
        "firing, global": ULR(credit="global"),
        "firing, feedback": ULR(),
        "currents, global": ULR(credit="global", noise={"1": CurrentNoise()}),
        "currents, feedback": ULR(noise={"1": CurrentNoise()}),
        "kernels": ULR(noise={"0": WeightNoise()}, copies=8),
        "kernels, per sample": ULR(noise={"0": WeightNoise(per_sample=True)}, copies=8),
    }
    for name, estimator in ways.items():
        model = trained("digits", seed, convolution, estimator=estimator)
        yield "digits", name, "convolution", "accuracy", accuracy("digits", model)


# of surrogate-gradient BPTT, as benchmarks/accuracy.py found them on a part of the training set
TUNED = {
    "digits": ({"function": "atan", "slope": 1.0}, {"lr": 0.016, "clip": 1.0}),
    "spoken-digits-recurrent": ({"function": "fast_sigmoid", "slope": 8.0}, {"lr": 0.008}),
    "saccade-mnist-dense": ({"function": "atan", "slope": 1.0}, {"lr": 0.016}),
}


class Hard(nn.Module):
    """A threshold, without state and without a derivative."""

    def forward(self, current: Tensor) -> Tensor:
        return (current.detach() > 0).to(current.dtype)


def threshold_net() -> nn.Sequential:
    """Of the events summed over time: a plain network of threshold units."""
    return nn.Sequential(
        nn.Flatten(2), nn.Linear(512, 128), Hard(), nn.Linear(128, 128), Hard(), TimeAverage(), nn.Linear(128, 10)
    )


def networks(seed: int) -> Iterator[Row]:
    """Likelihood ratios, backpropagation, evolution strategies, feedback alignment on three kinds of networks."""
    for task, net in (("digits", None), ("spoken-digits-recurrent", None), ("digits", threshold_net)):
        for name, method in {"ulr": ULR, "ulr, global": lambda: ULR(credit="global"), **METHODS}.items():
            if net is not None and name in ("surrogate", "expected", "alignment"):
                continue  # no derivative to stand in for: nobody knows this unit
            estimator, options = method(), {}
            if name == "surrogate":
                estimator, options = SurrogateBPTT(**TUNED[task][0]), TUNED[task][1]
            model = trained(task, seed, net, estimator=estimator, **options)
            yield "threshold units" if net else task, name, "trained", "accuracy", accuracy(task, model)


def attacked(model: nn.Module, x: Tensor, y: Tensor, strength: float, steps: int) -> Tensor:
    """x moved against the loss by at most `strength` an entry, along the sign of the surrogate gradient (steps=1: FGSM,
    more: PGD), within [0, 1]."""
    found = x.clone()
    for _ in range(steps):
        found.requires_grad_()
        with torch.enable_grad(), bind_sites(model, [SurrogateBPTT()] * len(spiking_layers(model)), None):
            loss = nn.functional.cross_entropy(model(found), y)
        (gradient,) = torch.autograd.grad(loss, found)
        moved = found.detach() + gradient.sign() * strength * (1 if steps == 1 else 2.5 / steps)
        found = moved.clamp(x - strength, x + strength).clamp(0, 1)
    return found


def disturbances(model: nn.Module) -> dict[str, tuple[tuple[float, ...], Callable[[Tensor, Tensor, float], Tensor]]]:
    draw = torch.Generator().manual_seed(0)

    def uniform(x: Tensor) -> Tensor:
        return torch.rand(x.shape, generator=draw)

    return {
        "FGSM": ((0.001, 0.003, 0.01), lambda x, y, s: attacked(model, x, y, s, 1)),
        "PGD": ((0.001, 0.003, 0.01), lambda x, y, s: attacked(model, x, y, s, 10)),
        "Gaussian noise": ((0.1, 0.2, 0.4), lambda x, y, s: x + s * torch.randn(x.shape, generator=draw)),
        "salt": ((0.01, 0.02, 0.05), lambda x, y, s: torch.where(uniform(x) < s, 1.0, x)),
        "dropped events": ((0.25, 0.5, 0.75), lambda x, y, s: x * (uniform(x) >= s)),
    }


@torch.no_grad()
def pruned(model: nn.Module, share: float) -> nn.Module:
    """The model with the smallest weights of each module set to zero."""
    import copy

    model = copy.deepcopy(model)
    for q in model.parameters():
        if q.ndim > 1:
            q[q.abs() <= q.abs().flatten().kthvalue(max(1, int(share * q.numel()))).values] = 0
    return model


def robustness(seed: int) -> Iterator[Row]:
    """Trained by likelihood ratios or by surrogate gradients: what is left under attacks, noise, and pruning?"""
    task = "saccade-mnist-dense"
    surrogate, tuned = TUNED[task]
    for name, estimator, options in (("ulr", ULR(), {}), ("surrogate", SurrogateBPTT(**surrogate), tuned)):
        model = trained(task, seed, estimator=estimator, **options).eval()
        yield task, name, "clean 0", "accuracy", accuracy(task, model)
        for kind, (strengths, change) in disturbances(model).items():
            for strength in strengths:
                right = total = 0
                for x, y in tests(task):
                    with torch.no_grad():
                        right += int((model(change(x.float(), y, strength)).argmax(1) == y).sum())
                    total += len(y)
                yield task, name, f"{kind} {strength:g}", "accuracy", right / total
        for share in (0.5, 0.8, 0.9):
            yield task, name, f"pruned {share:g}", "accuracy", accuracy(task, pruned(model, share))


def samples(seed: int) -> Iterator[Row]:
    """Several samples at inference: accuracy and calibration, of nets trained for one sample's loss and for a bound."""
    several = ULR(sampling=Independent(4, multi_sample=True))
    for name, estimator in {"ulr": ULR(), "ulr, 4 copies": ULR(copies=4), "bound of 4": several}.items():
        model = trained("spoken-digits-ff", seed, estimator=estimator)
        for count in (1, 2, 4, 8, 16):
            found = evaluate(model, tests("spoken-digits-ff"), device="cpu", samples=count, estimator=estimator)
            for measure in ("accuracy", "bound", "calibration_error", "disagreement"):
                yield "spoken-digits-ff", name, f"{count}", measure, found[measure]


QUESTIONS: dict[str, Callable[[int], Iterator[Row]]] = {
    "reductions": reductions,
    "sites": sites,
    "networks": networks,
    "robustness": robustness,
    "samples": samples,
}


# -- rows and figures --------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def draw(question: str, rows: list[dict[str, str]], path: Path) -> None:
    """Bars of the mean over seeds, a panel a task and measure, a group a setting, a bar a method."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in rows if not row["setting"].startswith(("at first, ", "after an epoch, "))
             or row["setting"].endswith("all layers")]  # fmt: skip
    panels = list(dict.fromkeys((row["task"], row["measure"]) for row in shown if row["measure"] != "passes"))
    methods = list(dict.fromkeys(row["method"] for row in shown))
    width = 7.5 if len(panels) == 1 else 4.6 * min(3, len(panels))
    figure = Figure(figsize=(width, 3.6 * -(-len(panels) // 3)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(-(-len(panels) // 3), min(3, len(panels)), squeeze=False).flatten()
    for axes, (task, measure) in zip(places, panels, strict=False):
        own = [row for row in shown if (row["task"], row["measure"]) == (task, measure)]
        settings = list(dict.fromkeys(row["setting"] for row in own))
        present = [m for m in methods if any(row["method"] == m for row in own)]
        for i, method in enumerate(present):
            values = [[float(r["value"]) for r in own if (r["method"], r["setting"]) == (method, s)] for s in settings]
            means = [sum(v) / len(v) if v else 0.0 for v in values]
            at = [n + 0.8 * (i + 0.5) / len(present) - 0.4 for n in range(len(settings))]
            colour = colormaps["viridis"](0.95 * methods.index(method) / max(1, len(methods) - 1))
            axes.bar(at, means, 0.8 / len(present), color=colour, label=method)
        axes.set_xticks(range(len(settings)), settings, rotation=90 if len(settings) > 5 else 0, fontsize=8)
        axes.set_title(f"{task}: {measure.replace('_', ' ')}", fontsize=10)
        if measure == "variance":
            axes.set_yscale("log")
        if measure == "accuracy" and min(float(row["value"]) for row in own) > 0.85:
            axes.set_ylim(0.85, 1)  # bars of the same height tell nothing
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    labels = {label: handle for axes in places for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.results / "paper.csv"
    about = {"machine": machine(), "torch": torch.__version__, "date": datetime.date.today().isoformat()}
    for question in arguments.questions:
        for seed in arguments.seeds:
            if any((row["question"], row["seed"]) == (question, str(seed)) for row in read(path)):
                continue
            rows = []
            for task, method, setting, measure, value in QUESTIONS[question](seed):
                print(f"{question} {seed}: {task}, {method}, {setting}: {measure} {value:.4g}", flush=True)
                row = {"task": task, "method": method, "setting": setting, "measure": measure, "value": f"{value:.6g}"}
                rows.append({"question": question, "seed": seed} | row | about)
            write(path, rows)
        rows = [row for row in read(path) if row["question"] == question]
        draw(question, rows, arguments.results / f"paper_{question}.png")


if __name__ == "__main__":
    main()
