"""Response of a black box: what noise on its input current does to what it gives, learned by a likelihood ratio.

Where outputs belong to inputs one by one, with Gaussian noise z of scale σ on the current J of neuron i,

    D_ki = E[s_{t+k,i} z_ti] = σ E[∂s_{t+k,i}/∂J_ti],     k = 0 .. LAGS - 1    (Stein's lemma)

is estimated from the samples and times of every pass, less the mean of s over the samples: no derivative of the box is
asked for. It takes the place of p' and of what a neuron's state carries on: with a = ∂L/∂s from what comes after,

    ∂L/∂z_t = sum_k D_k a_{t+k},     ∂L/∂J_t = ∂L/∂z_t / σ

and the other way, δs_t = sum_k D_k (z + δJ / σ)_{t-k}. D is a mean over samples and times, and so is the credit biased
by how much the single case differs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ulr_snn.model.neurons import shaped
from ulr_snn.sites.records import CurrentRecord

LAGS = 16
WINDOW = 50  # passes that D is a mean of, nearly


@dataclass
class Response:
    """One pass of one black box, linearised by its learned response [LAGS, ...]; None: nothing learned yet."""

    record: CurrentRecord
    kernel: Tensor | None

    def credit(self, a: Tensor | None) -> Tensor | None:
        """∂L/∂z [T, B, ...] from ∂L/∂s [T, B, ...]."""
        if a is None or self.kernel is None:
            return None
        found = torch.zeros_like(a)
        for k, weight in enumerate(self.kernel[: len(a)]):
            found[: len(a) - k] += weight * a[k:]
        return found

    def response(self, drawn: Tensor) -> Tensor:
        """δs [T, B, ...] of what the noise z is moved by, [T, B, ...]."""
        found = torch.zeros_like(self.record.spikes)
        for k, weight in enumerate(() if self.kernel is None else self.kernel[: len(drawn)]):
            found[k:] += weight * drawn[: len(drawn) - k]
        return found


def learned(kernel: Tensor | None, passes: int, spikes: Tensor, z: Tensor, valid: Tensor) -> Tensor:
    """D after one more pass. spikes: deviations from the mean over samples; z: noise, zero on padding; both
    [T, B, ...]; valid: [T, B]; passes: that D has seen so far."""
    steps = len(z)
    own = shaped(valid.to(z.dtype), z)
    now = z.new_zeros(LAGS, *z.shape[2:])
    for k in range(min(LAGS, steps)):
        pairs = own[k:] * z[: steps - k]
        count = valid[k:].sum().clamp(min=1)
        now[k] = (spikes[k:] * pairs).sum((0, 1)) / count
    return now if kernel is None else torch.lerp(kernel, now, max(1 / (passes + 1), 1 / WINDOW))
