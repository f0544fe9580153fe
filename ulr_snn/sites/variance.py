"""What a choice of noise costs: E|∂ log P / ∂W|², the expected squared length of one sample's score.

A likelihood ratio's gradient is the mean of loss times score, so that at equal losses its variance goes by this, the
trace of the Fisher information of the noise (arXiv 2305.08960 goes by dimensions): for firing noise it grows with the
spikes that are drawn near their thresholds, for noise on n weights it is Σ n / σ².
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ulr_snn.errors import UsageError
from ulr_snn.noise.kinds import WeightNoise
from ulr_snn.sites.flipout import check_by_sample
from ulr_snn.sites.records import Record
from ulr_snn.sites.weights import named, parameters_of, scale_of

SAMPLES = 8  # that the mean is taken of, at most
BY_SAMPLE = WeightNoise(per_sample=True)


def of_firing(record: Record, parameters: Mapping[str, nn.Parameter]) -> float:
    """Of the site's own noise, with respect to these parameters."""
    score, wanted = record.score(), list(parameters.values())
    count = min(SAMPLES, score.shape[1])
    total = 0.0
    for row in range(count):
        own = torch.zeros_like(score)
        own[:, row] = score[:, row]
        found = torch.autograd.grad(record.x, wanted, own, retain_graph=True, allow_unused=True)
        total += sum(float(g.square().sum()) for g in found if g is not None)
    return total / count


def of_weights(noise: WeightNoise, parameters: Mapping[str, Tensor]) -> float:
    """Of noise on these parameters."""
    return sum(q.numel() / scale_of(noise, q) ** 2 for q in parameters.values())


def own_weights(model: nn.Module, record: Record, sources: Mapping[str, list[str]]) -> dict[str, nn.Parameter]:
    """Trainable parameters whose gradient comes from this site alone."""
    return parameters_of(model, [name for name, found in sources.items() if found == [record.site]])


def by_sample(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether every sample can have noise of its own on these parameters."""
    try:
        for name in parameters:
            check_by_sample(model, name)
    except UsageError:
        return False
    return bool(parameters)


def calmer_weights(
    model: nn.Module, record: Record, sources: Mapping[str, list[str]], taken: Collection[str]
) -> list[str]:
    """Names of the weights that a site alone trains, if noise on them, of every sample its own, is expected to vary
    less than the site's; else none. taken: names of parameters or modules whose noise is not to be chosen."""
    own = own_weights(model, record, sources)
    if not by_sample(model, own) or any(named(name, list(taken)) for name in own):
        return []
    return list(own) if of_weights(BY_SAMPLE, own) < of_firing(record, own) else []
