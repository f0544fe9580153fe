"""What likelihood ratios are compared with: `METHODS`, by the name that `compare` takes."""

from functools import partial

from ulr_snn.peers.alignment import FeedbackAlignment
from ulr_snn.peers.evolution import EvolutionStrategies, RankOneNoise
from ulr_snn.peers.expected import ExpectedGradientBPTT
from ulr_snn.peers.surrogate import SurrogateBPTT

METHODS = {
    "surrogate": SurrogateBPTT,
    "expected": ExpectedGradientBPTT,
    "alignment": FeedbackAlignment,
    "evolution": EvolutionStrategies,
    "evolution-rank1": partial(EvolutionStrategies, noise=RankOneNoise()),
    "zeroth-order": partial(EvolutionStrategies, copies=1, antithetic=False),
}
