"""Response of a black box: the effect of noise on its input current on its output, learned by a likelihood ratio.

Where each output belongs to one input, with Gaussian noise z of scale σ on the current J of neuron i,

    D_ki = E[s_{t+k,i} z_ti] = σ E[∂s_{t+k,i}/∂J_ti],     k = 0 .. LAGS - 1    (Stein's lemma)

is estimated from the samples and times of every pass, after the mean of s over the samples is subtracted. It needs no
derivative of the box. It takes the place of p' and of the dynamics of a neuron's state: with a = ∂L/∂s from downstream,

    ∂L/∂z_t = sum_k D_k a_{t+k},     ∂L/∂J_t = ∂L/∂z_t / σ

and in the other direction, δs_t = sum_k D_k (z + δJ / σ)_{t-k}. D is a mean over samples and times. The credit is
biased by the deviation of each case from that mean.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ulr_snn.kernels import ranks
from ulr_snn.model.neurons import shaped
from ulr_snn.sites.records import CurrentRecord

LAGS = 16
WINDOW = 50  # passes in the moving average D, approximately


@dataclass
class Response:
    """One pass of one black box, linearised by its learned response `kernel` [LAGS, ...]; None: not learned yet."""

    record: CurrentRecord
    kernel: Tensor | None

    def credit(self, a: Tensor | None) -> Tensor | None:
        """Returns ∂L/∂z [T, B, ...] from ∂L/∂s [T, B, ...]."""
        if a is None or self.kernel is None:
            return None
        found = torch.zeros_like(a)
        for k, weight in enumerate(self.kernel[: len(a)]):
            found[: len(a) - k] += weight * a[k:]
        return found

    def response(self, drawn: Tensor) -> Tensor:
        """Returns δs [T, B, ...] for a change of the noise z, [T, B, ...]."""
        found = torch.zeros_like(self.record.spikes)
        for k, weight in enumerate(() if self.kernel is None else self.kernel[: len(drawn)]):
            found[k:] += weight * drawn[: len(drawn) - k]
        return found


def learned(kernel: Tensor | None, passes: int, spikes: Tensor, z: Tensor, valid: Tensor) -> Tensor:
    """Returns D after one more pass. spikes: deviations from the mean over samples [T, B, ...]; z: noise [T, B, ...],
    zero on padding; valid: [T, B]; passes: number of earlier passes."""
    steps = len(z)
    own = shaped(valid.to(z.dtype), z)
    now, counts = z.new_zeros(LAGS, *z.shape[2:]), z.new_ones(LAGS)
    for k in range(min(LAGS, steps)):
        pairs = own[k:] * z[: steps - k]
        now[k], counts[k] = (spikes[k:] * pairs).sum((0, 1)), valid[k:].sum()
    now, counts = ranks.sums(now, counts)
    now /= counts.clamp(min=1).view(-1, *[1] * (now.ndim - 1))
    return now if kernel is None else torch.lerp(kernel, now, max(1 / (passes + 1), 1 / WINDOW))
