"""diagnose: how good each estimator's gradient is, layer by layer, against a long-run mean of an unbiased one."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.errors import UsageError
from ulr_snn.estimators.ulr import ULR
from ulr_snn.losses.named import LossSpec
from ulr_snn.model.mode import mode_of

ALL = "all layers"
COLUMNS = ("estimator", "layer", "cosine", "variance", "cosine of a step", "passes")


@dataclass
class Moments:
    """Of the gradients of independent steps, by layer: sums over the even and over the odd steps, and squares."""

    sums: tuple[dict[str, Tensor], dict[str, Tensor]] = field(default_factory=lambda: ({}, {}))
    squares: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    passes: float = 0.0  # forward passes of a sample, a step

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        half = self.sums[self.steps % 2]
        for layer, g in gradients.items():
            half[layer] = half[layer] + g if layer in half else g.clone()
            self.squares[layer] = self.squares.get(layer, 0.0) + float(g.square().sum())
        self.steps += 1

    def mean(self, layer: str) -> Tensor:
        return (self.sums[0][layer] + self.sums[1][layer]) / self.steps

    def power(self, layer: str) -> float:
        """|E[g]|² without a bias: the product of the means of two independent halves."""
        even, odd = self.sums[0][layer], self.sums[1][layer]
        return float((even * odd).sum()) / ((self.steps + 1) // 2 * (self.steps // 2))

    def variance(self, layer: str) -> float:
        """trace(cov) of a step's gradient."""
        spread = self.squares[layer] - self.steps * float(self.mean(layer).square().sum())
        return max(0.0, spread) / (self.steps - 1)  # rounding may leave less than nothing


@dataclass
class Diagnosis:
    """What `diagnose` found; print it. rows: a dict an estimator and layer; see `diagnose` for what is in them."""

    rows: list[dict[str, Any]]
    advice: str

    def row(self, estimator: str, layer: str = ALL) -> dict[str, Any]:
        """The row of an estimator and a layer."""
        return next(row for row in self.rows if (row["estimator"], row["layer"]) == (estimator, layer))

    def __str__(self) -> str:
        def number(value: float | None) -> str:
            return "unresolved" if value is None else f"{value:.3g}"

        cells = [
            (
                row["estimator"],
                row["layer"],
                number(row["cosine"]),
                number(row["variance"]),
                number(row["step_cosine"]),
                f"{row['passes']:g}",
            )
            for row in self.rows
        ]
        lines = [COLUMNS, tuple("---" for _ in COLUMNS), *cells]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{self.advice}"

    def plot(self, path: str | PathLike[str]) -> None:
        """Draws cosines and variances by layer into a PNG file."""
        from ulr_snn.runs.plots import save_diagnosis

        save_diagnosis(self.rows, path)


def diagnose(
    model: nn.Module,
    batch: Sequence[Tensor],
    estimators: Mapping[str, Any] | None = None,
    *,
    loss: LossSpec = "ce_count",
    draws: int = 64,
    reference: ULR | None = None,
    reference_draws: int = 256,
    warm_up: int = 32,
    progress: float = 0.0,
    seed: int = 0,
    time_first: bool = True,
) -> Diagnosis:
    """Gradients of this batch by each estimator, against the true gradient of its expected loss.

    batch: (x, y) or (x, y, lengths). estimators: by name, such as {"mine": ULR(copies=4)} (default: feedback, residual,
    global and, where it knows the model, surrogate-gradient BPTT). The true gradient is the mean over `reference_draws`
    steps of `reference`, an unbiased estimator (default ULR(credit="residual", copies=8), "global" for a loss without a
    gradient, with the noise of the estimators); draws: steps of every estimator, each with noise of its own, after
    `warm_up` steps in which feedback learns; progress: of the training, which sets the level of the firing noise (the
    true gradient is that of the net with this noise). The model stays as it is.

    By layer (module with parameters) and estimator: "cosine" of the mean gradient with the true one: 1 means no bias in
    direction; "variance": trace(cov) of a step's gradient over the square of the true gradient's norm; "step_cosine":
    of a single step's gradient, what both leave together, as <mean, true> / (|true| sqrt(|mean|² + trace(cov)));
    "passes": forward passes of a sample in a step. Noise in means and reference is taken out by products of independent
    halves; None where the draws do not resolve a mean.
    """
    if draws < 4 or reference_draws < 4:
        raise UsageError(f"diagnose got draws={draws}, reference_draws={reference_draws}; give at least 4")
    if estimators is None:
        from ulr_snn.peers import METHODS

        estimators = {}
        known = {name: ULR(credit=name) for name in ("feedback", "residual", "global")}
        for name, estimator in {**known, "surrogate": METHODS["surrogate"]()}.items():
            with suppress(UsageError):  # of a model or a loss that it does not know
                measured(model, estimator, batch, loss, 0, progress, time_first, 1, seed)
                estimators[name] = estimator
    about = (batch, loss, warm_up, progress, time_first)
    if reference is None:
        true = unbiased(model, estimators, *about, reference_draws, seed + 1)
    else:
        true = measured(model, reference, *about, reference_draws, seed + 1)
    rows = []
    for name, estimator in estimators.items():
        found = measured(model, estimator, *about, draws, seed)
        rows += [{"estimator": name, "layer": layer} | compared(found, true, layer) for layer in true.sums[0]]
    return Diagnosis(rows, advice(rows, true))


def unbiased(model: nn.Module, estimators: Mapping[str, Any], *about: Any) -> Moments:
    """Moments of an unbiased estimator of what the estimators are for. Raises UsageError where they are not for one."""
    own = [estimator for estimator in estimators.values() if isinstance(estimator, ULR)] or [ULR()]
    kinds = [(e.firing, dict(e.noise), dict(e.flow), e.sampling.multi_sample) for e in own]
    if kinds[0][-1] or any(kind != kinds[0] for kind in kinds):
        raise UsageError(
            "diagnose got estimators of different nets or objectives (firing, noise, flow, multi_sample); give it the "
            "reference= that they are to be compared with"
        )
    same = {"firing": own[0].firing, "noise": own[0].noise, "flow": own[0].flow}
    try:
        return measured(model, ULR(credit="residual", copies=8, **same), *about)
    except UsageError:  # a loss without a gradient
        return measured(model, ULR(credit="global", copies=8, **same), *about)


def measured(
    model: nn.Module,
    estimator: Any,
    batch: Sequence[Tensor],
    loss: LossSpec,
    warm_up: int,
    progress: float,
    time_first: bool,
    steps: int,
    seed: int,
) -> Moments:
    """Moments of an estimator's gradients of one batch, on a copy of the model."""
    model = copy.deepcopy(model)
    x, targets, lengths = (*batch, None)[:3]
    found = Moments()
    with mode_of(model, training=True), estimator.attach(model, loss, seed, time_first, progress=progress) as attached:
        for step in range(warm_up + steps):
            model.zero_grad()
            if step == warm_up:
                before = attached.forward_passes
            attached.backward(x, targets, lengths=lengths)
            if step >= warm_up:
                found.add(by_layer(model))
        found.passes = (attached.forward_passes - before) / steps / len(targets)
    return found


def by_layer(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of each module's own parameters as one vector; of all together first."""
    layers: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        own = [q for q in module._parameters.values() if q is not None and q.requires_grad]
        if own:
            parts = [torch.zeros_like(q).flatten() if q.grad is None else q.grad.flatten() for q in own]
            layers[name or type(model).__name__] = torch.cat(parts).double()
    return {ALL: torch.cat(list(layers.values()))} | layers


def compared(found: Moments, true: Moments, layer: str) -> dict[str, Any]:
    """A row of `Diagnosis`."""
    norm, power = true.power(layer), found.power(layer)
    product = float((found.mean(layer) * true.mean(layer)).sum())
    variance = found.variance(layer)
    step = power + variance
    resolved = power > variance / found.steps  # else the mean is mostly noise

    def cosine(square: float) -> float:  # without a bias, such a quotient may lie beyond 1
        return max(-1.0, min(1.0, product / (norm * square) ** 0.5))

    return {
        "cosine": cosine(power) if norm > 0 and resolved else None,
        "variance": variance / norm if norm > 0 else None,
        "step_cosine": cosine(step) if norm > 0 and step > 0 else None,
        "passes": found.passes,
    }


def advice(rows: list[dict[str, Any]], true: Moments) -> str:
    """Which estimator's single step points best, in one sentence."""
    whole = [row for row in rows if row["layer"] == ALL and row["step_cosine"] is not None]
    if not whole or true.power(ALL) < true.variance(ALL) / true.steps:
        return "The reference is mostly noise: raise reference_draws, or the samples in the batch."
    best = max(whole, key=lambda row: row["step_cosine"])
    return (
        f"{best['estimator']} points best in a single step: cosine {best['step_cosine']:.2f} with the true gradient, "
        f"at {best['passes']:g} forward pass{'' if best['passes'] == 1 else 'es'} a sample."
    )
