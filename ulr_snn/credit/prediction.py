"""What a spike does to the loss, as far as it is known: direct, learned, within the layer, together."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ulr_snn.credit.base import Credit
from ulr_snn.credit.direct import direct_credit, direct_effect, in_parts
from ulr_snn.credit.feedback import ENTRIES, PRODUCTS, RICH, UNEXPLAINED, LearnedFeedback, Pace, edge
from ulr_snn.credit.maps import Path
from ulr_snn.credit.recurrence import Recurrence, StepRecurrence, recurrence_of
from ulr_snn.credit.response import Response
from ulr_snn.credit.structure import Structure
from ulr_snn.kernels.precision import full_precision
from ulr_snn.model.neurons import shaped
from ulr_snn.model.passes import Pass
from ulr_snn.sites.records import CurrentRecord, Record

WARM_UP = 8  # first steps, each of which refreshes the feedback that needs pairs, which starts from zero


@dataclass(frozen=True)
class RegressionBatch:
    """What a step learns all C into one layer from: its current, and the spikes of the sources along their paths, at
    rows (t, b). before: 1 where spikes act a step later, so that row t is of the spikes at t and the current at t + 1.
    paired: what is compared is the copies of pairs, not samples. step: at which it is."""

    target: str
    paths: dict[str, Path]
    before: int
    paired: bool
    rows: tuple[Tensor, Tensor]
    step: int


class Prediction:
    """The predictor a of a model's layers, and how it is learned. structure: once the first pass has shown it."""

    def __init__(self, feedback: LearnedFeedback, seed: int) -> None:
        self.feedback, self.seed = feedback, seed
        self.structure: Structure | None = None

    def take(self, structure: Structure) -> None:
        """What a first pass has shown; paths whose C is known to share no weights are taken as such."""
        self.structure = structure
        for source, paths in structure.feeds.items():
            full = {target: path.unshared(ENTRIES) for target, path in paths.items()}
            known = {t: path for t, path in full.items() if self.feedback.weight(edge(source, t), path) is not None}
            paths.update(known)

    @full_precision()
    def credit(self, p: Pass, later: dict[str, Tensor] | None = None) -> list[Credit]:
        """From the last layer to the first: what a layer's spikes do is known once that of the next layers is.

        later: of a pass over a part of time, g [rows, ...] of each site at the step after it, which becomes that of its
        first step."""
        error = None if p.error is None else self.structure.summarise_error(p.error)
        currents: dict[str, Tensor] = {}  # ∂L/∂J of the layers done so far
        predictions: list[Credit] = []
        for record in reversed(p.records):
            a = self._exact(p, record, currents)
            for target, path in self.structure.feeds[record.site].items():
                if target in currents:
                    a = added(a, self.feedback.from_layer(edge(record.site, target), path, currents[target]))
            from_outputs = None
            if record.site in self.structure.from_outputs and error is not None:
                from_outputs = self.feedback.from_outputs(record.site, record.x.detach(), error)
            if isinstance(record, CurrentRecord):
                a = added(self._response(record).credit(a), from_outputs)
                if a is not None:
                    currents[record.site] = a / record.scale
            else:
                a = added(a, from_outputs)
                if a is not None:
                    totals = self.structure.credit.unbiased or record.entry is None
                    after = None if later is None else later.setdefault(record.site, a.new_zeros(a.shape[1:]))
                    made_here = not totals and self._made_here(a, p, currents)
                    a, currents[record.site] = self._recurrence(record).credit(a, totals, after, made_here)
            predictions.append(Credit(a, currents.get(record.site)))
        return predictions[::-1]

    @staticmethod
    def _made_here(a: Tensor, p: Pass, currents: dict[str, Tensor]) -> bool:
        """Whether nobody else sees the memory of a. A product over sums and shapes alone may give back its input."""
        others = [*currents.values(), *(gradient for _, gradient in p.ends)]
        return a.untyped_storage().data_ptr() not in {other.untyped_storage().data_ptr() for other in others}

    def _exact(self, p: Pass, record: Record, currents: dict[str, Tensor]) -> Tensor | None:
        """Credit of a layer's spikes through the modules that follow: to the loss, and to ∂L/∂J of other layers."""
        ends = list(p.ends) if record.site in self.structure.direct else []
        for other in p.records:
            if other.site in currents and other.site in self.structure.exact[record.site]:
                ends += zip(other.arrived, in_parts(currents[other.site], other.arrived), strict=True)
        return direct_credit(ends, record)

    @full_precision()
    def credit_at_once(self, p: Pass) -> dict[str, Tensor]:
        """∂L/∂J [T, B, ...] by site, of what spikes do within their own time step alone."""
        found: dict[str, Tensor] = {}
        for record in reversed(p.records):
            a = self._exact(p, record, found)
            for target, path in self.structure.feeds[record.site].items():
                if target in found:
                    a = added(a, self.feedback.from_layer(edge(record.site, target), path, found[target]))
            if a is not None:
                found[record.site] = record.response_of_membrane().mul_(a)
        return found

    @full_precision()
    def learn_layers(self, passes: list[Pass], step: int) -> None:
        """Learns what the spikes of a layer do to the input currents of those that they feed, and to its own."""
        if self.structure.all_exact or not passes[0].records:
            return
        sites = {name: [p.records[i] for p in passes] for i, name in enumerate(r.site for r in passes[0].records)}
        spikes = {name: [r.spikes.detach() for r in records] for name, records in sites.items()}
        valid = joined([p.records[0].own_steps() for p in passes])  # [T, rows]
        batch = passes[0].loss.shape[1]
        for regression in self.regressions(list(sites), valid, batch, step):
            records, size = sites[regression.target], len(valid) - regression.before
            current = [r.fed_back[1:] if regression.before else r.current for r in records]
            pairs = batch if regression.paired else None
            across = partial(contrast, batch=pairs, valid=valid[regression.before :], rows=regression.rows)
            seen = {name: across([s[:size] for s in spikes[name]]) for name in regression.paths}
            self.learn(regression, seen, across(current))
        for target, records in sites.items():
            if isinstance(records[0], CurrentRecord) and records[0].elementwise:
                z = joined([r.innovation() for r in records])
                self.feedback.learn_response(target, deviations(joined(spikes[target]), valid), z, valid)

    def regressions(self, sites: list[str], valid: Tensor, batch: int, step: int) -> Iterator[RegressionBatch]:
        """Those due at a step whose rows are valid at [T, rows], of so many samples a copy; sites in order of their
        execution."""
        structure, pairs = self.structure, valid.shape[1] // batch // 2 * 2 * batch
        for target in sites:
            paths = {name: path for name, path in self._paths(target).items() if name in sites}
            paired = target in structure.paired
            pace = self._pace(target, 0)
            if paths and (pairs or not paired) and self._due(target, paths, step):
                compared = valid[:, : pairs // 2] if paired else valid
                yield RegressionBatch(target, paths, 0, paired, self._rows(paths, compared, step, pace.rich), step)
            pace = self._pace(target, 1)
            if target in structure.recurrent and len(valid) > 1 and pace.wants(step):
                paths = {target: structure.recurrent[target]}
                yield RegressionBatch(target, paths, 1, False, self._rows(paths, valid[1:], step, pace.rich), step)

    def wants_pairs(self, step: int, every: int) -> bool:
        """Whether a step learns from pairs of copies: one of the first or of every so many, where something that only
        pairs can teach is due."""
        if step >= WARM_UP and step % every:
            return False
        due = (self._due(target, self._paths(target), step) for target in self.structure.paired)
        return bool(self.structure.from_outputs) or any(due)

    def _paths(self, target: str) -> dict[str, Path]:
        """Of all layers that feed one."""
        return {name: paths[target] for name, paths in self.structure.feeds.items() if target in paths}

    def _due(self, target: str, paths: dict[str, Path], step: int) -> bool:
        """Whether all C into a layer are to be learned at a step; what is not known always is."""
        unknown = any(self.feedback.weight(edge(name, target), path) is None for name, path in paths.items())
        return unknown or self._pace(target, 0).wants(step)

    def _pace(self, target: str, before: int) -> Pace:
        """Of the regressions for a layer or, a step later, for itself."""
        return self.feedback.paces.setdefault(edge(target, target) if before else target, Pace())

    @full_precision()
    def learn(self, regression: RegressionBatch, spikes: dict[str, Tensor], current: Tensor) -> None:
        """A step of all C into one layer, from what its current [n, *target] and the spikes [n, *source] differ by."""
        named = {edge(name, regression.target): path for name, path in regression.paths.items()}
        spikes = {edge(name, regression.target): rows for name, rows in spikes.items()}
        before, after = self.feedback.refresh_layer(named, spikes, current)
        self._pace(regression.target, regression.before).see(before, after, regression.step)
        if after > UNEXPLAINED and not regression.before:  # what is shared cannot learn weights that differ
            for name, path in regression.paths.items():
                full = path.unshared(ENTRIES)
                if full != path:
                    self.structure.feeds[name][regression.target] = full
                    self.feedback.paces[regression.target] = Pace()  # nothing is known of that matrix yet

    @full_precision()
    def refresh(self, passes: list[Pass]) -> None:
        """Regresses what the copies' differences leave unexplained by direct effects on their innovations, where there
        is feedback from the outputs and more than one copy."""
        if not self.structure.from_outputs or sum(len(p.copies) for p in passes) < 2:
            return
        batch = passes[0].loss.shape[1]
        drawn = [[record.innovation() for record in p.records] for p in passes]
        unexplained = [self._unexplained(p, d) for p, d in zip(passes, drawn, strict=True)]
        z = {
            record.site: self.feedback.project(half_differences([d[i].flatten(2) for d in drawn], batch, 1))
            for i, record in enumerate(passes[0].records)
            if record.site in self.structure.from_outputs
        }
        self.feedback.refresh_outputs(z, half_differences(unexplained, batch, 0))

    def _unexplained(self, p: Pass, innovations: list[Tensor]) -> Tensor:
        """Outputs [rows, O] less what the credit in use says that the pass's innovations did to them."""
        moved, spikes = self._responses(p, innovations)
        left = self.structure.summarise(p.outputs.detach() - direct_effect([p.outputs], p.records, spikes)[0])
        for record, change in zip(p.records, moved, strict=True):
            if record.site in self.feedback.outputs:
                left = left - self.feedback.to_outputs(record.site, change)
        return left

    def _response(self, record: CurrentRecord) -> Response:
        kernel = self.feedback.responses.get(record.site, (None, 0))[0]
        return Response(record, kernel if record.elementwise else None)

    def _responses(self, p: Pass, innovations: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Innovations with what they do to what is drawn later, by way of resets, of recurrent weights and of the
        layers they feed, and what that does to spikes: the same linear map as `credit`, forwards."""
        arriving: dict[str, Tensor] = {}  # changes of input currents
        moved, spikes = [], []
        for record, e in zip(p.records, innovations, strict=True):
            change = arriving.get(record.site)
            if isinstance(record, CurrentRecord):
                moved.append(e if change is None else e + change / record.scale)
                spikes.append(self._response(record).response(moved[-1]))
            else:
                moved.append(self._recurrence(record).response(e, change))
                spikes.append(moved[-1])
            for target, path in self.structure.feeds[record.site].items():
                change = self.feedback.to_layer(edge(record.site, target), path, spikes[-1])
                if change is not None:
                    arriving[target] = arriving.get(target, 0) + change
            for target in [r for r in p.records if r.site in self.structure.exact[record.site]]:
                change = direct_effect(target.arrived, [record], [spikes[-1]])
                change = change[0] if target.whole else torch.stack(change)
                arriving[target.site] = arriving.get(target.site, 0) + change
        return moved, spikes

    def _recurrence(self, record: Record) -> Recurrence | StepRecurrence:
        path = self.structure.recurrent.get(record.site)
        weight = None if path is None else self.feedback.weight(edge(record.site, record.site), path)
        return recurrence_of(record, self.structure.products, path, weight)

    def _rows(self, paths: dict[str, Path], valid: Tensor, step: int, rich: bool) -> tuple[Tensor, Tensor]:
        """What a step learns from: of time steps and samples [T, B] as many (t, b) as it can afford, at random, no
        padding, those of one sample side by side."""
        size, generator = int(valid.sum()), torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        count = min([size, *(affordable_rows(path, rich) for path in paths.values())])
        if 4 * count < size:  # in long sequences: no list of all rows; of the few that are drawn twice one is left out
            rows = torch.randint(size, (count,), generator=generator).unique()
        else:
            rows = torch.randperm(size, generator=generator)[:count].sort().values
        rows = rows.to(valid.device)
        if size < valid.numel():
            rows = valid.T.flatten().nonzero().squeeze(1)[rows]
        return rows % len(valid), rows // len(valid)


def added(a: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Their sum, where there are both; else the one that there is."""
    return part if a is None else a if part is None else a + part


def affordable_rows(path: Path, rich: bool) -> int:
    """Rows n, at least one, whose regression takes no more multiply-adds than it may: of m = n positions inputs of
    width D and results of width M, m D (min(m, D) + 2 M). rich: it may take more, up to twice as many equations as
    unknowns."""
    (inputs, results), positions = path.size, path.positions

    def affordable(budget: int) -> float:
        few = math.sqrt(results**2 + budget / inputs) - results  # m, if there are more unknowns than equations
        return few if few < inputs else budget / (inputs * (inputs + 2 * results))

    count = affordable(PRODUCTS)
    if rich:
        count = max(count, min(affordable(RICH * PRODUCTS), 2 * inputs))
    return max(1, int(count / positions))


def contrast(passes: list[Tensor], batch: int | None, valid: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
    """What these rows (t, b) of all passes [T, rows, ...] differ by: copies of a pair, of a batch of so many samples,
    or else samples from their mean."""
    if batch is not None:
        return half_differences(passes, batch, 1)[rows]
    sequence = joined(passes)
    mean = means(sequence, valid)
    return sequence[rows] - (mean[rows[0], 0] if len(mean) == len(sequence) else mean[0, rows[1]])


def joined(passes: list[Tensor]) -> Tensor:
    """Rows [T, rows, ...] of all passes side by side."""
    return passes[0] if len(passes) == 1 else torch.cat(passes, 1)


def half_differences(passes: list[Tensor], batch: int, dim: int) -> Tensor:
    """(even - odd) / 2 of paired copies; rows along `dim`, those of all passes together, copy by copy.

    Of an odd number of independent copies the last has no partner and is left out.
    """
    copies = torch.cat([x.unflatten(dim, (-1, batch)) for x in passes], dim)
    pairs = copies.shape[dim] // 2
    even, odd = copies.narrow(dim, 0, 2 * pairs).unflatten(dim, (-1, 2)).unbind(dim + 1)
    return ((even - odd) / 2).flatten(dim, dim + 1)


def deviations(rows: Tensor, valid: Tensor) -> Tensor:
    """Rows [T, B, ...] less their mean, see `means`."""
    return rows - means(rows, valid)


def means(rows: Tensor, valid: Tensor) -> Tensor:
    """Mean of rows [T, B, ...] that are valid [T, B], at each time [T, 1, ...]; of a lone one, in time [1, 1, ...]."""
    dim = 1 if rows.shape[1] > 1 else 0
    if valid.all():
        return rows.mean(dim, keepdim=True)
    weight = shaped(valid.to(rows.dtype), rows)
    return (rows * weight).sum(dim, keepdim=True) / weight.sum(dim, keepdim=True).clamp(min=1)
