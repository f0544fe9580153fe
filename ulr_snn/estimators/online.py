"""`Online`: an update at every time step."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from ulr_snn.estimators.attachment import LearnedAttachment
from ulr_snn.estimators.config import NoiseByName
from ulr_snn.estimators.ulr import ULR
from ulr_snn.losses.named import LossSpec
from ulr_snn.memory.one_step import OneTimeStep
from ulr_snn.noise.firing import Firing, Logistic


@dataclass(frozen=True)
class Online:
    """Credit "feedback" with an update at every time step, for losses that are sums over time ("ce_rate", "mse").

    Memory does not grow with the number of time steps. The gradient leaves out what a spike does to later time steps,
    through membranes, resets and recurrent weights: a truncation, as in OTTT (arXiv 2210.04195) and e-prop (Bellec et
    al. 2020); see memory/one_step.py for what it is. `train` makes an update at every time step by itself; in a loop of
    one's own, `for estimate in ulr.steps(x, y): optimizer.step(); optimizer.zero_grad()`.

    maps, firing, noise, flow, on_nonfinite: as of `ULR`; "skip" leaves a time step out.
    """

    maps: str = "auto"
    firing: Firing = field(default_factory=Logistic)
    noise: NoiseByName = field(default_factory=dict)
    flow: Mapping[str, str] = field(default_factory=dict)
    on_nonfinite: str = "stop"

    def __post_init__(self) -> None:
        self.config  # noqa: B018  # raises UsageError for a wrong field

    @property
    def config(self) -> ULR:
        """The same as fields of `ULR`."""
        about = {"maps": self.maps, "firing": self.firing, "noise": self.noise, "flow": self.flow}
        return ULR(**about, on_nonfinite=self.on_nonfinite)

    def attach(
        self,
        model: nn.Module,
        loss: LossSpec,
        seed: int,
        time_first: bool,
        total_steps: int | None = None,
        *,
        progress: float | None = None,
        rates: bool = False,
    ) -> LearnedAttachment:
        """What `train` steps with; see `Estimator.attach`."""
        about = loss, seed, time_first, total_steps, progress, rates
        return LearnedAttachment(model, self.config, OneTimeStep(), *about)
