"""`Online`: online learning, with an update at every time step."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ulr_snn.estimators.attachment import Attaches
from ulr_snn.estimators.config import NoiseByName
from ulr_snn.estimators.ulr import ULR
from ulr_snn.memory.one_step import OneTimeStep
from ulr_snn.noise.firing import Firing, Logistic


@dataclass(frozen=True)
class Online(Attaches):
    """Online learning: credit "feedback" with an update at every time step, for sums over time ("ce_rate", "mse").

    Memory does not grow with the number of time steps. The gradient leaves out the effect of a spike on later time
    steps (through membranes, resets and recurrent weights), as in OTTT (arXiv 2210.04195) and e-prop (Bellec et al.
    2020); memory/one_step.py has the equations. `train` makes an update at every time step. A loop of your own does so
    by `for estimate in ulr.steps(x, y): optimizer.step(); optimizer.zero_grad()`.

    maps, firing, noise, flow, on_nonfinite: as in `ULR`; "skip" leaves out single time steps.
    """

    maps: str = "auto"
    firing: Firing = field(default_factory=Logistic)
    noise: NoiseByName = field(default_factory=dict, hash=False)
    flow: Mapping[str, str] = field(default_factory=dict, hash=False)
    on_nonfinite: str = "stop"

    def __post_init__(self) -> None:
        config = self.config  # raises UsageError for a wrong field; None is the default
        for name in ("firing", "noise", "flow"):
            object.__setattr__(self, name, getattr(config, name))

    @property
    def config(self) -> ULR:
        return ULR("auto", self.maps, None, self.firing, self.noise, self.flow, on_nonfinite=self.on_nonfinite)

    @property
    def strategy(self) -> OneTimeStep:
        return OneTimeStep()
