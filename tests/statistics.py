"""Statistical comparisons under one false-alarm budget: a correct library fails the whole suite by chance
with probability at most 1e-3.

Every family of comparisons owns a share of the budget and says how many comparisons it makes at most
(Bonferroni): each one is made at level share / comparisons, and making more than were declared is an error.
Seeds are fixed, so a passing suite passes again; the budget says how surprised one should be when a change
of seeds or noise fails it.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy
import scipy.stats
import torch
from torch import Tensor

BUDGET = 1e-3
SHARES = {  # family: (share of the budget, most comparisons; room for a second device included)
    "unbiased": (4e-4, 2000),
    "noise": (3e-4, 2000),
    "zero gradient": (1e-4, 200),
    "exact direct credit": (1e-4, 100),
    "firing frequency": (1e-4, 200),
}
assert sum(share for share, _ in SHARES.values()) <= BUDGET * (1 + 1e-12)

GROUP = 24  # draws between two looks at their spread, so that a t-test has 23 degrees of freedom at least
_made: Counter[str] = Counter()


def level(family: str) -> float:
    """The false-alarm level of one comparison."""
    share, comparisons = SHARES[family]
    return share / comparisons


def spend(family: str, comparisons: int) -> None:
    """Counts comparisons against what the family declared."""
    _made[family] += comparisons
    assert _made[family] <= SHARES[family][1], f"{family} makes more comparisons than its share of the budget allows"


@dataclass(frozen=True)
class Verdict:
    """worst: the smallest p-value; error: the largest standard error; agrees: nothing below the family's
    level."""

    worst: float
    error: float
    agrees: bool


def compare_means(family: str, draws: Tensor, expected: Tensor, spending: bool = True) -> Verdict:
    """Two-sided t-tests, one an entry: do independent draws [S, n] have the mean `expected` [n]?

    Each draw is itself a mean over thousands of samples, so that Student's t with S - 1 degrees of freedom
    holds. An entry without any spread must agree to rounding. spending=False where a wrong formula is to be
    rejected: that comparison cannot raise a false alarm.
    """
    if spending:
        spend(family, expected.numel())
    draws, expected = draws.double().cpu().numpy(), expected.double().cpu().numpy()
    error = draws.std(0, ddof=1) / len(draws) ** 0.5
    distance = numpy.abs(draws.mean(0) - expected)
    rounding = 1e-12 * (1 + numpy.abs(expected))
    with numpy.errstate(divide="ignore", invalid="ignore"):
        p = 2 * scipy.stats.t.sf(distance / error, len(draws) - 1)
    p = numpy.where(error > rounding, p, (distance <= 10 * rounding).astype(float))
    return Verdict(float(p.min()), float(error.max()), bool(p.min() >= level(family)))


def chi_square(family: str, counts: Tensor, expected: Tensor) -> Verdict:
    """Pearson's test of counts [n] against expected counts (each in the hundreds or more), n - 1 degrees of
    freedom."""
    spend(family, 1)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    p = float(scipy.stats.chi2.sf(statistic, len(counts) - 1))
    return Verdict(p, float("nan"), p >= level(family))


def uncorrelated(family: str, a: Tensor, b: Tensor) -> Verdict:
    """z-test: are these pairs of uniforms uncorrelated? The mean of 12 (a - ½)(b - ½) has variance 1/n."""
    spend(family, 1)
    products = 12 * (a.double() - 0.5) * (b.double() - 0.5)
    z = float(products.mean()) * products.numel() ** 0.5
    p = float(2 * scipy.stats.norm.sf(abs(z)))
    return Verdict(p, products.numel() ** -0.5, p >= level(family))


def frequency(family: str, hits: Tensor, draws: int, probability: Tensor) -> Verdict:
    """Exact two-sided binomial tests, one an entry of hits [n] out of `draws` at `probability` [n]."""
    spend(family, hits.numel())
    hits, probability = hits.cpu().numpy(), probability.double().cpu().numpy()
    below = scipy.stats.binom.cdf(hits, draws, probability)
    above = scipy.stats.binom.sf(hits - 1, draws, probability)
    p = float(numpy.minimum(1, 2 * numpy.minimum(below, above)).min())
    return Verdict(p, float("nan"), p >= level(family))


def gradient_draws(
    ulr,
    batch,
    parameters: list[Tensor],
    steps: int,
    warm_up: int = 0,
    enough: Callable[[Tensor], bool] | None = None,
) -> Tensor:
    """Gradients of `steps` independent steps of `ulr.backward(*batch)`, flattened, [steps, n]. enough: asked after
    every `GROUP` draws whether these are enough."""
    rows = []
    for step in range(warm_up + steps):
        for parameter in parameters:
            parameter.grad = None
        ulr.backward(*batch)
        if step >= warm_up:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in parameters]
            rows.append(torch.cat([g.flatten() for g in grads]))
            if enough is not None and len(rows) % GROUP == 0 and enough(torch.stack(rows)):
                break
    return torch.stack(rows)
