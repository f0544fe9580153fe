"""Training spiking neural networks without surrogate gradients, by likelihood ratios.

`train.py` is the loop to read first, `credit/formula.py` the formula; docs/extending.md has a map of the folders.
"""

from ulr_snn import data
from ulr_snn.compare import Comparison, compare
from ulr_snn.credit.kinds import Auto, Feedback, Global, Residual
from ulr_snn.diagnose import Diagnosis, diagnose
from ulr_snn.errors import UsageError
from ulr_snn.estimators.base import Attachment, Estimate, Estimator
from ulr_snn.estimators.online import Online
from ulr_snn.estimators.ulr import ULR, attach
from ulr_snn.evaluate import evaluate
from ulr_snn.losses.named import SpikeBudget
from ulr_snn.model.neurons import LIF, Fold, LeakyReadout, RecurrentLIF, TimeAverage
from ulr_snn.noise.firing import Gaussian, Logistic
from ulr_snn.noise.kinds import CurrentNoise, OutputNoise, WeightNoise
from ulr_snn.plan import Plan, plan
from ulr_snn.sampling.kinds import Adaptive, Antithetic, Independent, LayerByLayer, Sobol
from ulr_snn.train import Result, train

AdaptiveCopies = Adaptive  # the name of earlier versions
__version__ = "0.1.0"

__all__ = [
    "LIF",
    "ULR",
    "Adaptive",
    "AdaptiveCopies",
    "Antithetic",
    "Attachment",
    "Auto",
    "Comparison",
    "CurrentNoise",
    "Diagnosis",
    "Estimate",
    "Estimator",
    "Feedback",
    "Fold",
    "Gaussian",
    "Global",
    "Independent",
    "LayerByLayer",
    "LeakyReadout",
    "Logistic",
    "Online",
    "OutputNoise",
    "Plan",
    "RecurrentLIF",
    "Residual",
    "Result",
    "Sobol",
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
