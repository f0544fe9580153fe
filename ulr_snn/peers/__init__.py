"""Other estimators, for comparison with likelihood ratios. `METHODS` lists them by the name that `compare` takes."""

from collections.abc import Callable
from functools import partial

from ulr_snn.estimators.base import Estimator
from ulr_snn.peers.alignment import FeedbackAlignment as FeedbackAlignment
from ulr_snn.peers.evolution import EvolutionStrategies as EvolutionStrategies
from ulr_snn.peers.evolution import RankOneNoise as RankOneNoise
from ulr_snn.peers.expected import ExpectedGradientBPTT as ExpectedGradientBPTT
from ulr_snn.peers.surrogate import SurrogateBPTT as SurrogateBPTT

METHODS: dict[str, Callable[[], Estimator]] = {
    "surrogate": SurrogateBPTT,
    "expected": ExpectedGradientBPTT,
    "alignment": FeedbackAlignment,
    "evolution": EvolutionStrategies,
    "evolution-rank1": partial(EvolutionStrategies, noise=RankOneNoise()),
    "zeroth-order": partial(EvolutionStrategies, copies=1, antithetic=False),
}
