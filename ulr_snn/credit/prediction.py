"""The prediction of credit: direct, learned and within the layer, together."""

from functools import partial

import torch
from torch import Tensor

from ulr_snn.credit.base import Credit
from ulr_snn.credit.direct import direct_credit, direct_effect, in_parts
from ulr_snn.credit.feedback import LearnedFeedback, edge
from ulr_snn.credit.formula import PassLike
from ulr_snn.credit.map_learning import MapLearning, contrast, deviations, half_differences, joined
from ulr_snn.credit.recurrence import Recurrence, StepRecurrence, recurrence_of
from ulr_snn.credit.response import Response
from ulr_snn.credit.structure import Structure
from ulr_snn.kernels import ranks
from ulr_snn.kernels.precision import full_precision
from ulr_snn.model.passes import Pass
from ulr_snn.sites.records import CurrentRecord, Record


class Prediction:
    """Predicts a for a model's layers, and learns the feedback for it. structure: as observed in a first pass."""

    def __init__(self, structure: Structure, feedback: LearnedFeedback, seed: int) -> None:
        self.structure, self.feedback, self.maps = structure, feedback, MapLearning(structure, feedback, seed)

    @full_precision()
    def credit(self, p: PassLike, later: dict[str, Tensor] | None = None) -> list[Credit]:
        """Predicts credit from the last layer to the first, because a layer's credit depends on the next layers'.
        later: for a time chunk, g [rows, ...] of each site at the step after it; overwritten by g of its first step."""
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
                    totals = self.structure.credit.unbiased or record.current_handle is None
                    after = None if later is None else later.setdefault(record.site, a.new_zeros(a.shape[1:]))
                    made_here = not totals and self._made_here(a, p, currents)
                    a, currents[record.site] = self._recurrence(record).credit(a, totals, after, made_here)
            predictions.append(Credit(a, currents.get(record.site)))
        return predictions[::-1]

    @staticmethod
    def _made_here(a: Tensor, p: PassLike, currents: dict[str, Tensor]) -> bool:
        """Returns whether no other tensor shares the memory of a. A product may return its own input."""
        others = [*currents.values(), *(gradient for _, gradient in p.ends)]
        return a.untyped_storage().data_ptr() not in {other.untyped_storage().data_ptr() for other in others}

    def _exact(self, p: PassLike, record: Record, currents: dict[str, Tensor]) -> Tensor | None:
        """Returns credit of a layer's spikes through the next modules, from the loss and from ∂L/∂J of other layers."""
        ends = list(p.ends) if record.site in self.structure.direct else []
        for other in p.records:
            if other.site in currents and other.site in self.structure.exact[record.site]:
                ends += zip(other.arrived, in_parts(currents[other.site], other.arrived), strict=True)
        return direct_credit(ends, record)

    @full_precision()
    def credit_at_once(self, p: PassLike) -> dict[str, Tensor]:
        """Returns ∂L/∂J [T, B, ...] by site, from the effects of spikes within their own time step alone."""
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
        """Learns the effect of a layer's spikes on the input currents of the layers that they feed, and on its own."""
        if self.structure.all_exact or not passes[0].records:
            return
        sites = {name: [p.records[i] for p in passes] for i, name in enumerate(r.site for r in passes[0].records)}
        spikes = {name: [r.spikes.detach() for r in records] for name, records in sites.items()}
        valid = joined([p.records[0].valid_steps() for p in passes])  # [T, rows]
        passes[0].check_times(len(valid), "a learned map")
        batch = passes[0].loss.shape[1]
        for regression in self.maps.regressions(list(sites), ranks.all_rows(valid), ranks.joined(batch), step):
            records, size = sites[regression.target], len(valid) - regression.before
            currents = [r.fed_back if regression.before else r.current for r in records]
            current = [c[regression.before :] for c in currents if c is not None]
            pairs = batch if regression.paired else None
            across = partial(contrast, batch=pairs, valid=valid[regression.before :], rows=regression.rows)
            seen = {name: across([s[:size] for s in spikes[name]]) for name in regression.paths}
            self.maps.learn(regression, seen, across(current))
        for target, records in sites.items():
            if isinstance(records[0], CurrentRecord) and records[0].elementwise:
                z = joined([r.innovation() for r in records])
                self.feedback.learn_response(target, deviations(joined(spikes[target]), valid), z, valid)

    def wants_pairs(self, step: int, every: int) -> bool:
        """Returns whether a step learns from pairs of copies."""
        return self.maps.wants_pairs(step, every)

    @full_precision()
    def refresh(self, passes: list[Pass]) -> None:
        """Regresses the unexplained differences of the copies' outputs on their innovations. It does nothing without
        feedback from the outputs, or with a single copy."""
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
        """Returns outputs [rows, O] minus the effect of the pass's innovations that the credit in use predicts."""
        moved, spikes = self._responses(p, innovations)
        left = self.structure.summarise(p.outputs.detach() - direct_effect([p.outputs], p.records, spikes)[0])
        for record, change in zip(p.records, moved, strict=True):
            if record.site in self.feedback.outputs:
                left = left - self.feedback.to_outputs(record.site, change)
        return left

    def _response(self, record: CurrentRecord) -> Response:
        """Returns the learned response of a black box."""
        kernel = self.feedback.responses.get(record.site, (None, 0))[0]
        return Response(record, kernel if record.elementwise else None)

    def _responses(self, p: Pass, innovations: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Returns innovations plus their effect on later draws, and the change of spikes: the transpose of `credit`.
        The effect goes through resets, recurrent weights and the layers that are fed."""
        arriving: dict[str, Tensor] = {}  # changes of input currents
        moved: list[Tensor] = []
        spikes: list[Tensor] = []
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
            for fed in [r for r in p.records if r.site in self.structure.exact[record.site]]:
                parts = direct_effect(fed.arrived, [record], [spikes[-1]])
                effect = parts[0] if fed.whole else torch.stack(parts)
                arriving[fed.site] = arriving.get(fed.site, 0) + effect
        return moved, spikes

    def _recurrence(self, record: Record) -> Recurrence | StepRecurrence:
        path = self.structure.recurrent.get(record.site)
        weight = None if path is None else self.feedback.weight(edge(record.site, record.site), path)
        return recurrence_of(record, self.structure.products, path, weight)


def added(a: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Returns the sum of both, or the one that is not None."""
    return part if a is None else a if part is None else a + part
