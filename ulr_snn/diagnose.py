"""`diagnose`: compares gradient estimates, layer by layer, with the mean of many unbiased ones."""

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.adapters.memories import duplicate
from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import Draws, Fraction, Natural, Whole, checked, shown
from ulr_snn.estimators.attachment import Attaches
from ulr_snn.estimators.base import Estimator
from ulr_snn.estimators.ulr import ULR, or_default
from ulr_snn.kernels import ranks
from ulr_snn.losses.named import LossSpec
from ulr_snn.model.call import same_generators
from ulr_snn.model.interface import Interface
from ulr_snn.model.mode import Model, mode_of, trainable
from ulr_snn.model.reading import read

ALL = "all layers"
COLUMNS = ("estimator", "layer", "cosine", "variance", "cosine of a step", "passes")


@dataclass
class Moments:
    """Moments of the gradients of independent steps, by layer: sums over even and over odd steps, and squares."""

    sums: tuple[dict[str, Tensor], dict[str, Tensor]] = field(default_factory=lambda: ({}, {}))
    squares: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    passes: float = 0.0  # forward passes of a sample in a step

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        half = self.sums[self.steps % 2]
        for layer, g in gradients.items():
            half[layer] = half[layer] + g if layer in half else g.clone()
            self.squares[layer] = self.squares.get(layer, 0.0) + float(g.square().sum())
        self.steps += 1

    def mean(self, layer: str) -> Tensor:
        return (self.sums[0][layer] + self.sums[1][layer]) / self.steps

    def power(self, layer: str) -> float:
        """Estimates |E[g]|² without bias, as the product of the means of two independent halves."""
        even, odd = self.sums[0][layer], self.sums[1][layer]
        return float((even * odd).sum()) / ((self.steps + 1) // 2 * (self.steps // 2))

    def variance(self, layer: str) -> float:
        """Estimates trace(cov) of a step's gradient."""
        spread = self.squares[layer] - self.steps * float(self.mean(layer).square().sum())
        return max(0.0, spread) / (self.steps - 1)  # rounding may make it negative


@dataclass
class Diagnosis:
    """The result of `diagnose`, printed as a table. rows: a dict for each estimator and layer; see `diagnose`."""

    rows: list[dict[str, Any]]
    advice: str

    def row(self, estimator: str, layer: str = ALL) -> dict[str, Any]:
        """Returns the row of an estimator and a layer. Raises UsageError if there is none."""
        found = {(row["estimator"], row["layer"]): row for row in self.rows}
        if (estimator, layer) not in found:
            names = ", ".join(map(repr, dict.fromkeys(name for pair in found for name in pair)))
            raise UsageError(f"there is no row of {estimator!r} and {layer!r}; the names are {names}")
        return found[estimator, layer]

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


@checked
@torch.inference_mode(False)
@same_generators()
def diagnose(
    model: Model,
    batch: Any,
    estimators: Mapping[str, Estimator] | None = None,
    *,
    loss: LossSpec = "ce_count",
    draws: Draws = 64,
    reference: ULR | None = None,
    reference_draws: Draws = 256,
    warm_up: Natural = 32,
    progress: Fraction = 0.0,
    seed: Whole = 0,
    time_first: bool = True,
    layout: str | None = None,
    output: Any = None,
) -> Diagnosis:
    """Compares each estimator's gradient of this batch with the true gradient of its expected loss.

    The model does not change. Rows are by estimator and layer (module with parameters), with "cosine" of the mean
    gradient with the true one (1 if there is no bias in direction), "variance" (trace(cov) of a step's gradient over
    the squared norm of the true one), "step_cosine" of a single step, <mean, true> / (|true| sqrt(|mean|² +
    trace(cov))), and "passes", the forward passes of a sample in a step. Products of independent halves remove the
    noise of the means. A figure is None if the draws do not resolve the mean.

    batch: as from a loader. time_first, layout, output: see `train`. estimators: by name, such as {"mine":
    ULR(copies=4)} (default: feedback, residual, global and, if it knows the model, surrogate-gradient BPTT). draws:
    steps of every estimator with independent noise. reference: an unbiased estimator, whose mean is the true gradient
    (default ULR(credit="residual", copies=8), or "global" for a loss without a gradient, with the noise of the
    estimators). reference_draws: steps of the reference. warm_up: steps before the draws, in which feedback learns.
    progress: fraction of the training, which sets the level of the firing noise. Raises UsageError for fewer than 4
    draws, or estimators of different nets without a reference.
    """
    trainable(model)
    interface = Interface.of(time_first, layout, output)
    if estimators is None:
        estimators = usual(model, batch, loss, progress, interface, seed)
    if not isinstance(estimators, Mapping) or not estimators:
        raise UsageError(f"diagnose got estimators={shown(estimators)}; give some by name, as in {{'mine': ULR()}}")
    estimators = {name: or_default(estimator) for name, estimator in estimators.items()}
    options = (batch, loss, warm_up, progress, interface)
    if reference is None:
        true = unbiased(model, estimators, *options, reference_draws, seed + 1)
    else:
        true = measured(model, reference, *options, reference_draws, seed + 1)
    rows = []
    for name, estimator in estimators.items():
        found = measured(model, estimator, *options, draws, seed)
        rows += [{"estimator": name, "layer": layer} | compared(found, true, layer) for layer in true.sums[0]]
    return Diagnosis(rows, advice(rows, true))


def usual(
    model: nn.Module, batch: Any, loss: LossSpec, progress: float, interface: Interface, seed: int
) -> dict[str, Estimator]:
    """Returns the default estimators, without those that do not know the model or the loss."""
    from ulr_snn.peers import METHODS

    known: dict[str, Estimator] = {name: ULR(credit=name) for name in ("feedback", "residual", "global")}
    found = {}
    for name, estimator in (known | {"surrogate": METHODS["surrogate"]()}).items():
        with suppress(UsageError):
            measured(model, estimator, batch, loss, 0, progress, interface, 1, seed)
            found[name] = estimator
    return found


def unbiased(model: nn.Module, estimators: Mapping[str, Estimator], *conditions: Any) -> Moments:
    """Measures an unbiased estimator for the estimators' net and objective. UsageError if these differ."""
    own = [estimator.config for estimator in estimators.values() if isinstance(estimator, Attaches)] or [ULR()]
    kinds = [(e.firing, dict(e.noise), dict(e.flow), e.sampling.multi_sample) for e in own]
    if kinds[0][-1] or any(kind != kinds[0] for kind in kinds):
        raise UsageError(
            "diagnose got estimators of different nets or objectives (firing, noise, flow, multi_sample); give it the "
            "reference= that they are to be compared with"
        )
    same: dict[str, Any] = {"firing": own[0].firing, "noise": own[0].noise, "flow": own[0].flow}
    try:
        return measured(model, ULR(credit="residual", copies=8, **same), *conditions)
    except UsageError:  # a loss without a gradient
        return measured(model, ULR(credit="global", copies=8, **same), *conditions)


def measured(
    model: nn.Module,
    estimator: Estimator,
    batch: Any,
    loss: LossSpec,
    warm_up: int,
    progress: float,
    interface: Interface,
    steps: int,
    seed: int,
) -> Moments:
    """Measures the moments of an estimator's gradients of one batch, on a copy of the model."""
    model = duplicate(model)
    x, targets, lengths = read(batch, model)
    found = Moments()
    with ExitStack() as stack:
        stack.enter_context(ranks.alone())  # one rank may ask
        stack.enter_context(mode_of(model, training=True))
        attached = stack.enter_context(estimator.attach(model, loss, seed, interface, progress=progress))
        for step in range(warm_up + steps):
            model.zero_grad()
            if step == warm_up:
                before = attached.forward_passes
            estimate = attached.backward(x, targets, None, lengths)
            if step >= warm_up:
                found.add(by_layer(model))
        found.passes = (attached.forward_passes - before) / steps / len(estimate.loss)
    return found


def by_layer(model: nn.Module) -> dict[str, Tensor]:
    """Returns the gradient of each module's own parameters as a vector, after that of all parameters."""
    layers: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        own = [q for q in module._parameters.values() if q is not None and q.requires_grad]
        if own:
            parts = [torch.zeros_like(q).flatten() if q.grad is None else q.grad.flatten() for q in own]
            layers[name or type(model).__name__] = torch.cat(parts).double()
    return {ALL: torch.cat(list(layers.values()))} | layers


def compared(found: Moments, true: Moments, layer: str) -> dict[str, Any]:
    """Returns the figures of a row of `Diagnosis`."""
    norm, power = true.power(layer), found.power(layer)
    product = float((found.mean(layer) * true.mean(layer)).sum())
    variance = found.variance(layer)
    step = power + variance
    resolved = power > variance / found.steps  # else the mean is mostly noise

    def cosine(square: float) -> float:  # an unbiased quotient may exceed 1
        return max(-1.0, min(1.0, product / (norm * square) ** 0.5))

    return {
        "cosine": cosine(power) if norm > 0 and resolved else None,
        "variance": variance / norm if norm > 0 else None,
        "step_cosine": cosine(step) if norm > 0 and step > 0 else None,
        "passes": found.passes,
    }


def advice(rows: list[dict[str, Any]], true: Moments) -> str:
    """Says which estimator's single step points best, in one sentence."""
    whole = [row for row in rows if row["layer"] == ALL and row["step_cosine"] is not None]
    if not whole or true.power(ALL) < true.variance(ALL) / true.steps:
        return "The reference is mostly noise: raise reference_draws, or the samples in the batch."
    best = max(whole, key=lambda row: row["step_cosine"])
    return (
        f"{best['estimator']} points best in a single step: cosine {best['step_cosine']:.2f} with the true gradient, "
        f"at {best['passes']:g} forward pass{'' if best['passes'] == 1 else 'es'} a sample."
    )
