"""Training spiking neural networks without surrogate gradients, by likelihood ratios.

`runs/session.py` is the loop to read first, `credit/formula.py` the formula; docs/extending.md maps the folders.

The package loads when one of its names is first used: `import ulr_snn` alone imports neither torch nor NumPy.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; SOURCES says the same to Python
    from ulr_snn import data
    from ulr_snn.adapters.nir.export import to_nir
    from ulr_snn.adapters.nir.reader import from_nir
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
    from ulr_snn.sampling.kinds import Adaptive, AdaptiveCopies, Antithetic, Independent, LayerByLayer, Sobol
    from ulr_snn.train import Result, train

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
    "from_nir",
    "plan",
    "to_nir",
    "train",
]

# The modules of the package, and what each adds to its names.
SOURCES: dict[str, tuple[str, ...]] = {
    "data": (),
    "adapters.nir.export": ("to_nir",),
    "adapters.nir.reader": ("from_nir",),
    "compare": ("Comparison", "compare"),
    "credit.kinds": ("Auto", "Feedback", "Global", "Residual"),
    "diagnose": ("Diagnosis", "diagnose"),
    "errors": ("UsageError",),
    "estimators.base": ("Attachment", "Estimate", "Estimator"),
    "estimators.online": ("Online",),
    "estimators.ulr": ("ULR", "attach"),
    "evaluate": ("evaluate",),
    "losses.named": ("SpikeBudget",),
    "model.neurons": ("LIF", "Fold", "LeakyReadout", "RecurrentLIF", "TimeAverage"),
    "noise.firing": ("Gaussian", "Logistic"),
    "noise.kinds": ("CurrentNoise", "OutputNoise", "WeightNoise"),
    "plan": ("Plan", "plan"),
    "sampling.kinds": ("Adaptive", "AdaptiveCopies", "Antithetic", "Independent", "LayerByLayer", "Sobol"),
    "train": ("Result", "train"),
}


class Package(ModuleType):
    """The class of this package, which loads its modules when an attribute is missing."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            for source, names in SOURCES.items():
                module = importlib.import_module(f"{self.__name__}.{source}")
                for given in names:
                    vars(self).setdefault(given, getattr(module, given))
            if name in vars(self):
                return vars(self)[name]
        raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets a function where Python's import sets a submodule of the same name, such as `train`."""
        if isinstance(value, ModuleType) and name in SOURCES.get(name, ()):
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *__all__})


sys.modules[__name__].__class__ = Package
