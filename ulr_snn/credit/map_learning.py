"""Regressions that learn maps between layers: which are due at a step, from which rows, and what they learn."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ulr_snn.credit.feedback import FeedbackLimits, LearnedFeedback, RegressionSchedule, edge
from ulr_snn.credit.maps import Path
from ulr_snn.credit.structure import Structure
from ulr_snn.errors.arguments import seed_of
from ulr_snn.kernels import ranks
from ulr_snn.kernels.precision import full_precision
from ulr_snn.model.neurons import shaped


@dataclass(frozen=True)
class RegressionBatch:
    """The regression of a layer's current on the spikes of its sources at rows (t, b), which learns all C into it.
    before: 1 if spikes act a step later, so that row t has the spikes at t and the current at t + 1; else 0. paired:
    compare the copies of pairs, not samples. step: the training step."""

    target: str
    paths: dict[str, Path]
    before: int
    paired: bool
    rows: tuple[Tensor, Tensor]
    step: int


class MapLearning:
    """Learns the maps C of a model's layers. Paths of the structure are unshared where their known C is."""

    def __init__(self, structure: Structure, feedback: LearnedFeedback, seed: int) -> None:
        self.structure, self.feedback, self.seed, self.limits = structure, feedback, seed, feedback.limits
        for source, paths in structure.feeds.items():
            full = {target: path.unshared(self.limits.entries) for target, path in paths.items()}
            known = {t: path for t, path in full.items() if self.feedback.weight(edge(source, t), path) is not None}
            paths.update(known)

    def regressions(self, sites: list[str], valid: Tensor, batch: int, step: int) -> Iterator[RegressionBatch]:
        """Yields the regressions that are due at a step. sites: in the order of execution; valid: [T, rows]; batch: the
        number of samples per copy."""
        structure, pairs = self.structure, valid.shape[1] // batch // 2 * 2 * batch
        for target in sites:
            paths = {name: path for name, path in self._paths(target).items() if name in sites}
            paired = target in structure.paired
            pace = self._pace(target, 0)
            if paths and (pairs or not paired) and self._due(target, paths, step):
                compared = valid[:, : pairs // 2] if paired else valid
                yield RegressionBatch(target, paths, 0, paired, self._rows(paths, compared, step, pace.large), step)
            pace = self._pace(target, 1)
            if target in structure.recurrent and len(valid) > 1 and pace.wants(step):
                paths = {target: structure.recurrent[target]}
                yield RegressionBatch(target, paths, 1, False, self._rows(paths, valid[1:], step, pace.large), step)

    def wants_pairs(self, step: int, every: int) -> bool:
        """Returns whether a step learns from pairs of copies. It does in the first steps, and then every `every` steps,
        if feedback that needs pairs is due."""
        if step >= self.limits.warm_up and step % every:
            return False
        due = (self._due(target, self._paths(target), step) for target in self.structure.paired)
        return bool(self.structure.from_outputs) or any(due)

    def _paths(self, target: str) -> dict[str, Path]:
        """Returns the paths of all layers that feed the target."""
        return {name: paths[target] for name, paths in self.structure.feeds.items() if target in paths}

    def _due(self, target: str, paths: dict[str, Path], step: int) -> bool:
        """Returns whether all C into a layer are due at a step. Unknown C is always due."""
        unknown = any(self.feedback.weight(edge(name, target), path) is None for name, path in paths.items())
        return unknown or self._pace(target, 0).wants(step)

    def _pace(self, target: str, before: int) -> RegressionSchedule:
        """Returns the pace of the regressions into a layer, or of its recurrent current (before = 1)."""
        return self.feedback.paces.setdefault(edge(target, target) if before else target, RegressionSchedule())

    @full_precision()
    def learn(self, regression: RegressionBatch, spikes: dict[str, Tensor], current: Tensor) -> None:
        """Updates all C into one layer from differences of its current [n, *target] and of spikes [n, *source]."""
        named = {edge(name, regression.target): path for name, path in regression.paths.items()}
        spikes = {edge(name, regression.target): rows for name, rows in spikes.items()}
        before, after = self.feedback.refresh_layer(named, spikes, current)
        self._pace(regression.target, regression.before).note(before, after, regression.step)
        if after > self.limits.unexplained and not regression.before:  # shared weights cannot fit weights that differ
            for name, path in regression.paths.items():
                full = path.unshared(self.limits.entries)
                if full != path:
                    self.structure.feeds[name][regression.target] = full
                    self.feedback.paces[regression.target] = RegressionSchedule()  # that matrix is unknown yet

    def _rows(self, paths: dict[str, Path], valid: Tensor, step: int, large: bool) -> tuple[Tensor, Tensor]:
        """Returns random rows (t, b) without padding, as many as a step can afford. Rows of a sample are adjacent."""
        size, generator = int(valid.sum()), torch.Generator().manual_seed(seed_of(self.seed * 1_000_003 + step))
        count = min([size, *(affordable_rows(path, large, self.limits) for path in paths.values())])
        if 4 * count < size:  # long sequences: without a list of all rows, and without the few repeated draws
            rows = torch.randint(size, (count,), generator=generator).unique()
        else:
            rows = torch.randperm(size, generator=generator)[:count].sort().values
        rows = rows.to(valid.device)
        if size < valid.numel():
            rows = valid.T.flatten().nonzero().squeeze(1)[rows]
        return rows % len(valid), rows // len(valid)


def affordable_rows(path: Path, large: bool, limits: FeedbackLimits) -> int:
    """Returns the number of rows n, at least one, whose regression stays within the allowed multiply-adds. The cost is
    m D (min(m, D) + 2 M) for m = n * positions, inputs of width D and results of width M. large: more are allowed, up
    to twice as many equations as unknowns."""
    (inputs, results), positions = path.size, path.positions

    def affordable(budget: int) -> float:
        few = math.sqrt(results**2 + budget / inputs) - results  # m, if there are more unknowns than equations
        return few if few < inputs else budget / (inputs * (inputs + 2 * results))

    count = affordable(limits.products)
    if large:
        count = max(count, min(affordable(limits.large * limits.products), 2 * inputs))
    return max(1, int(count / positions))


def contrast(passes: list[Tensor], batch: int | None, valid: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
    """Returns differences of all passes [T, rows, ...] at rows (t, b): half-differences of the copies of pairs, with
    `batch` samples per copy, or deviations of samples from their mean if batch is None. rows: rows of the ranks' joined
    batch; the other arguments are this rank's."""
    mine, places = ranks.own(rows[1])
    times = rows[0][mine]
    if batch is not None:
        return ranks.filled(half_differences(passes, batch, 1)[times, places], mine)
    sequence = joined(passes)
    mean = means(sequence, valid)
    found = sequence[times, places] - (mean[times, 0] if len(mean) == len(sequence) else mean[0, places])
    return ranks.filled(found, mine)


def joined(passes: list[Tensor]) -> Tensor:
    """Concatenates the rows of all passes [T, rows, ...]."""
    return passes[0] if len(passes) == 1 else torch.cat(passes, 1)


def half_differences(passes: list[Tensor], batch: int, dim: int) -> Tensor:
    """Returns (even - odd) / 2 of paired copies, with the rows of all passes along `dim`, copy by copy. The last of an
    odd number of independent copies has no partner and is left out."""
    copies = torch.cat([x.unflatten(dim, (-1, batch)) for x in passes], dim)
    pairs = copies.shape[dim] // 2
    even, odd = copies.narrow(dim, 0, 2 * pairs).unflatten(dim, (-1, 2)).unbind(dim + 1)
    return ((even - odd) / 2).flatten(dim, dim + 1)


def deviations(rows: Tensor, valid: Tensor) -> Tensor:
    """Returns rows [T, B, ...] minus their mean, see `means`."""
    return rows - means(rows, valid)


def means(rows: Tensor, valid: Tensor) -> Tensor:
    """Returns the mean over valid [T, B] rows of [T, B, ...]: [T, 1, ...], or over time [1, 1, ...] if B is 1."""
    dim = 1 if ranks.joined(rows.shape[1]) > 1 else 0
    if ranks.share() is None and valid.all():
        return rows.mean(dim, keepdim=True)
    weight = shaped(valid.to(rows.dtype), rows)
    total, count = ranks.sums((rows * weight).sum(dim, keepdim=True), weight.sum(dim, keepdim=True))
    return total / count.clamp(min=1)
