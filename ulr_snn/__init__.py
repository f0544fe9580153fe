"""Training spiking neural networks without surrogate gradients, by likelihood ratios."""

from ulr_snn import data
from ulr_snn.compare import Comparison, compare
from ulr_snn.diagnose import Diagnosis, diagnose
from ulr_snn.errors import UsageError
from ulr_snn.estimators.ulr import ULR, Attachment, Estimate, attach
from ulr_snn.evaluate import evaluate
from ulr_snn.losses.named import SpikeBudget
from ulr_snn.model.neurons import LIF, Fold, LeakyReadout, RecurrentLIF, TimeAverage
from ulr_snn.noise.level import CurrentNoise, Gaussian, Logistic, OutputNoise, WeightNoise
from ulr_snn.plan import Plan, plan
from ulr_snn.sampling.adaptive import AdaptiveCopies
from ulr_snn.train import Result, train

__version__ = "0.1.0"

__all__ = [
    "LIF",
    "ULR",
    "AdaptiveCopies",
    "Attachment",
    "Comparison",
    "CurrentNoise",
    "Diagnosis",
    "Estimate",
    "Fold",
    "Gaussian",
    "LeakyReadout",
    "Logistic",
    "OutputNoise",
    "Plan",
    "RecurrentLIF",
    "Result",
    "SpikeBudget",
    "TimeAverage",
    "UsageError",
    "WeightNoise",
    "attach",
    "compare",
    "data",
    "diagnose",
    "evaluate",
    "plan",
    "train",
]
