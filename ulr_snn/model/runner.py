"""Runs of a bound model for evaluation: deterministic, or with noise at the level of the end of training."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ulr_snn.kernels.precision import widened
from ulr_snn.model.activity import counting
from ulr_snn.model.batch import Batch
from ulr_snn.model.bound import BoundModel
from ulr_snn.model.call import check_outputs, copied
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.noise.random import Noise

Run = tuple[Tensor, Mapping[str, Tensor]]  # outputs, and activity [B] by name


@dataclass(frozen=True)
class Runner:
    """Runs a bound model for evaluation. level: the noise level of stochastic runs."""

    bound: BoundModel
    level: NoiseLevel

    def runs(self, batch: Batch, step: int, copies: int, seed: int, counts: Collection[str]) -> list[Run]:
        """Returns outputs and activity of each copy of a batch. With copies=0, a single run fires deterministically."""
        found: list[Run] = []
        x, lengths, size = batch.x, batch.lengths, (batch.steps, batch.samples)
        for copy in range(max(copies, 1)):
            noise = None
            if copies:
                sample = torch.arange(batch.samples, dtype=torch.int32, device=x.device)
                noise = Noise(seed, step, sample, torch.full_like(sample, copy))
                self.bound.measure_levels(self.level, partial(self._outputs, x, noise, lengths))
            with counting(self.bound.model, self.bound.layers, counts, *size, lengths) as activity:
                outputs = widened(self._outputs(x, noise, lengths))
            check_outputs(outputs, *size, lengths is not None)
            found.append((outputs, activity))
        return found

    def _outputs(self, x: Tensor, noise: Noise | None, lengths: Tensor | None) -> Tensor:
        """Returns the outputs of one run. A model may change its input in place."""
        return self.bound.outputs(copied(x), self.level, noise, lengths)[0]
