"""The cost of a choice of noise: E|∂ log P / ∂W|², the expected squared length of one sample's score.

A likelihood ratio's gradient is the mean of loss times score. At equal losses its variance is therefore proportional to
this cost, the trace of the Fisher information of the noise (arXiv 2305.08960 compares dimensions instead). For firing
noise it grows with the number of neurons near their thresholds. For noise on n weights it is Σ n / σ².
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ulr_snn.errors import UsageError
from ulr_snn.kernels import ranks
from ulr_snn.noise.kinds import WeightNoise
from ulr_snn.sites.flipout import check_by_sample
from ulr_snn.sites.records import Record
from ulr_snn.sites.weights import named, parameters_of, scale_of

SAMPLES = 8  # most samples in the mean
BY_SAMPLE = WeightNoise(per_sample=True)


def of_firing(record: Record, parameters: Mapping[str, nn.Parameter]) -> float:
    """Returns the cost of the site's own noise with respect to these parameters."""
    score, wanted = record.score(), list(parameters.values())
    first, total = ranks.first_sample(), 0.0
    for row in range(max(0, min(SAMPLES - first, score.shape[1]))):
        own = torch.zeros_like(score)
        own[:, row] = score[:, row]
        gradients = torch.autograd.grad(record.x, wanted, own, retain_graph=True, allow_unused=True)
        total += sum(float(g.square().sum()) for g in gradients if g is not None)
    (found,) = ranks.sums(torch.tensor(total, dtype=torch.float64, device=score.device))
    return float(found) / min(SAMPLES, ranks.joined(score.shape[1]))


def of_weights(noise: WeightNoise, parameters: Mapping[str, Tensor]) -> float:
    """Returns the cost of noise on these parameters."""
    return sum(q.numel() / scale_of(noise, q) ** 2 for q in parameters.values())


def own_weights(model: nn.Module, record: Record, sources: Mapping[str, list[str]]) -> dict[str, nn.Parameter]:
    """Returns the trainable parameters whose gradient comes from this site alone."""
    return parameters_of(model, [name for name, found in sources.items() if found == [record.site]])


def by_sample(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> bool:
    """Returns whether noise on these parameters can differ between samples."""
    try:
        for name in parameters:
            check_by_sample(model, name)
    except UsageError:
        return False
    return bool(parameters)


def lower_variance_weights(
    model: nn.Module, record: Record, sources: Mapping[str, list[str]], taken: Collection[str]
) -> list[str]:
    """Returns the names of the weights that only this site trains, if per-sample noise on them costs less than the
    site's noise; otherwise none. taken: names of parameters or modules whose noise is fixed."""
    own = own_weights(model, record, sources)
    if not by_sample(model, own) or any(named(name, list(taken)) for name in own):
        return []
    return list(own) if of_weights(BY_SAMPLE, own) < of_firing(record, own) else []
