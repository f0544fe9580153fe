"""What a spike does to the loss, as far as it is known: direct credit, learned feedback, and the reset, together."""

import torch
from torch import Tensor

from ulr_snn.credit.direct import direct_credit, direct_effect
from ulr_snn.credit.feedback import PRODUCTS, Feedback
from ulr_snn.credit.reset import ResetPath
from ulr_snn.passes import Pass
from ulr_snn.sites import Record
from ulr_snn.structure import Structure

WARM_UP = 8  # first steps, each of which refreshes the feedback, which starts from zero, from every time step


class Prediction:
    """The predictor a of a model's layers, and how it is learned. structure: set once the first pass has shown it."""

    def __init__(self, feedback: Feedback, seed: int) -> None:
        self.feedback, self.seed = feedback, seed
        self.structure: Structure | None = None

    def credit(self, p: Pass) -> list[Tensor | None]:
        """From the last layer to the first: what a layer's spikes do is known once that of the next layers is."""
        direct = direct_credit(p.outputs, p.error, [record.spikes for record in p.records])
        error = self.structure.summarise_error(p.error)
        currents: dict[str, Tensor] = {}  # ∂L/∂J of the layers done so far
        predictions: list[Tensor | None] = []
        for record, a in zip(reversed(p.records), reversed(direct), strict=True):
            learned = []
            if record.site in self.structure.from_outputs:
                learned.append(self.feedback.from_outputs(record.site, record.spikes, error))
            for target in self.structure.feeds[record.site]:
                if target in currents:
                    learned.append(self.feedback.from_layer(record.site, target, record.spikes, currents[target]))
            for part in learned:
                if part is not None:
                    a = part if a is None else a + part
            if a is not None:
                a, currents[record.site] = reset_path(record).credit(a)
            predictions.append(a)
        return predictions[::-1]

    def refresh(self, passes: list[Pass], step: int) -> None:
        """Regresses what the copies' differences leave unexplained by direct effects on their innovations."""
        structure, batch = self.structure, passes[0].loss.shape[1]

        def differences(tensors: list[Tensor], dim: int) -> Tensor:
            """Half-differences of paired copies, rows of all passes together."""
            return _half_differences(torch.cat([x.unflatten(dim, (-1, batch)) for x in tensors], dim), dim)

        names = [record.site for record in passes[0].records]
        if structure.from_outputs:
            drawn = [[record.innovation() for record in p.records] for p in passes]
            unexplained = [self._unexplained(p, d) for p, d in zip(passes, drawn, strict=True)]
            z = {
                name: self.feedback.project(differences([d[i].flatten(2) for d in drawn], 1))
                for i, name in enumerate(names)
                if name in structure.from_outputs
            }
            self.feedback.refresh_outputs(z, differences(unexplained, 0))
        # A layer's input current depends on the spikes that feed it and on nothing else drawn, so that here the
        # spikes themselves leave less unexplained than their innovations.
        for i, target in enumerate(names):
            sources = {
                name: differences([p.records[j].spikes.detach().flatten(2) for p in passes], 1)
                for j, name in enumerate(names)
                if target in structure.feeds[name]
            }
            if sources:
                change = differences([p.records[i].current.flatten(2) for p in passes], 1)
                self.feedback.refresh_layer(target, sources, change, self._times(sources, change, step))

    def _unexplained(self, p: Pass, innovations: list[Tensor]) -> Tensor:
        """Outputs [rows, O] less what the credit in use says that the pass's innovations did to them."""
        responses = self._responses(p, innovations)
        direct = direct_effect(p.outputs, [record.spikes for record in p.records], responses)
        left = self.structure.summarise(p.outputs.detach() - direct)
        for record, response in zip(p.records, responses, strict=True):
            if record.site in self.feedback.outputs:
                left = left - self.feedback.to_outputs(record.site, response)
        return left

    def _responses(self, p: Pass, innovations: list[Tensor]) -> list[Tensor]:
        """Innovations with what they do, by way of resets and of the layers they feed, to later spikes: the same
        linear map as `credit`, forwards."""
        arriving: dict[str, Tensor] = {}  # changes of input currents
        responses = []
        for record, e in zip(p.records, innovations, strict=True):
            responses.append(reset_path(record).response(e, arriving.get(record.site)))
            for target in self.structure.feeds[record.site]:
                change = self.feedback.to_layer(record.site, target, responses[-1])
                if change is not None:
                    shape = next(r.current.shape for r in p.records if r.site == target)
                    arriving[target] = arriving.get(target, 0) + change.view(shape)
        return responses

    def _times(self, sources: dict[str, Tensor], change: Tensor, step: int) -> Tensor:
        """Time steps to learn from in this refresh: as many as its budget of products allows, spread over time."""
        steps, rows, width = change.shape
        affordable = PRODUCTS // (2 * rows * width * sum(z.shape[2] for z in sources.values()))
        count = steps if step < WARM_UP else max(1, min(steps, affordable))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return torch.randperm(steps, generator=generator)[:count]


def reset_path(record: Record) -> ResetPath:
    return ResetPath(record.neuron, record.slope / record.scale, record.spikes.detach(), record.membrane)


def _half_differences(copies: Tensor, dim: int) -> Tensor:
    """(even - odd) / 2 of paired copies along `dim` [.., K, B, ..], pairs and samples flattened together.

    Of an odd number of independent copies the last has no partner and is left out.
    """
    pairs = copies.shape[dim] // 2
    even, odd = copies.narrow(dim, 0, 2 * pairs).unflatten(dim, (-1, 2)).unbind(dim + 1)
    return ((even - odd) / 2).flatten(dim, dim + 1)
