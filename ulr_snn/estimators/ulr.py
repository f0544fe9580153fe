"""`ULR`: what to estimate the gradient with, and `attach` for loops of one's own."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ulr_snn.credit.kinds import CreditKind, Global, credit_of
from ulr_snn.errors import UsageError
from ulr_snn.estimators.attachment import LearnedAttachment
from ulr_snn.estimators.base import Attachment, Estimator
from ulr_snn.estimators.config import NoiseByName
from ulr_snn.losses.named import LossSpec
from ulr_snn.memory.chunks import TimeChunks
from ulr_snn.memory.one_step import OneTimeStep
from ulr_snn.memory.step import Memory
from ulr_snn.memory.whole import CopiesInTurn
from ulr_snn.noise.firing import Firing, Logistic
from ulr_snn.noise.kinds import CurrentNoise, OutputNoise, WeightNoise
from ulr_snn.sampling.kinds import Adaptive, Sampling, sampling_of
from ulr_snn.sites.flow import FLOWS

MAPS = ("auto", "exact", "learned")
MEMORY = ("auto", "replay")
MOVED = {  # fields of earlier versions, and where they are now
    "refresh": "credit=Feedback(refresh=...)",
    "time_functions": "credit=Feedback(time_functions=...)",
    "feedback_rate": "credit=Feedback(rate=...)",
    "reward_to_go": "credit=Global(reward_to_go=True) or Residual(reward_to_go=True)",
    "multi_sample": "sampling=Independent(copies, multi_sample=True)",
}


@dataclass(frozen=True, init=False)
class ULR:
    """The unified likelihood ratio (arXiv 2305.08960). The default is meant to be a good choice everywhere.

    credit: what every spike is credited with: `Auto()`, `Global()`, `Feedback()`, `Residual()`, or their names. "auto"
        is feedback where the loss is differentiable in the outputs, or noise on these makes it so, otherwise global.
    maps: what spikes of a layer do to the input current of the next, for credit. "auto": the vector-Jacobian product of
        the modules between the two at fixed spikes where they are differentiable (max pooling of spikes counts as an
        OR), and recurrent weights as they are; a learned map where a step function such as rounding lies between.
        "exact": the same, and UsageError where there is no product. "learned": maps are learned by regression on
        forward passes, so that no weights are transported backwards.
    sampling: how copies of a sample are drawn: `Independent`, `Antithetic`, `Sobol`, `Adaptive`, `LayerByLayer`, or a
        number of antithetic copies. None: antithetic, one copy for feedback, 8 for global and mixes with a loss without
        a gradient, 4 for residual.
    firing: distribution of the threshold noise, and its scale.
    noise: by name, noise elsewhere: {module: CurrentNoise()} on a module's input current, {parameter or module:
        WeightNoise()} on parameters, {parameter or module: None} none on parameters, {"outputs": OutputNoise()} on the
        outputs where a loss has no gradient, {"outputs": None} none there. Of its own accord noise comes on the current
        of modules that cut the graph, on parameters that no other noise reaches, and with credit "auto" on outputs that
        are no spikes, or else on weights where that is expected to vary less than the firing (see `plan`).
    flow: by name, how a module or parameter learns: "ulr" by a likelihood ratio even where a derivative would do (noise
        on the parameters, unless it fires), "backprop" by the exact gradient of what is differentiable alone, and never
        by noise of its own, "frozen" not at all: it runs as in evaluation. What is not named learns by whichever of the
        first two it can.
    memory: what a step keeps. "replay": time goes by in chunks, whose spikes are drawn again from the same noise, so
        that memory does not grow with the number of time steps; every chunk runs twice (of many, more often), for
        credit "feedback" and models that run their modules one after another. With credit "global", "replay" runs one
        copy after another, each of them twice, so that memory does not grow with the number of copies. "auto": the
        whole sequence at once while that is small, else "replay" where it can be.
    on_nonfinite: "stop" raises on a loss that is not finite, "skip" leaves that step out.

    copies, antithetic, quasi_monte_carlo, layerwise are shorthands for `sampling`: a number of copies or `Adaptive()`;
    whether they come in pairs (default True); in Sobol sets in place of pairs; layer by layer.
    """

    credit: CreditKind
    maps: str
    sampling: Sampling
    firing: Firing
    noise: NoiseByName = field(hash=False)
    flow: Mapping[str, str] = field(hash=False)
    memory: str | Memory
    on_nonfinite: str

    def __init__(
        self,
        credit: CreditKind | str = "auto",
        maps: str = "auto",
        sampling: Sampling | int | None = None,
        firing: Firing | None = None,
        noise: NoiseByName | None = None,
        flow: Mapping[str, str] | None = None,
        memory: str | Memory = "auto",
        on_nonfinite: str = "stop",
        *,
        copies: int | Adaptive | None = None,
        antithetic: bool | None = None,
        quasi_monte_carlo: bool | None = None,
        layerwise: bool | None = None,
        **moved: Any,
    ) -> None:
        if moved:
            name = next(iter(moved))
            where = MOVED.get(name)
            raise UsageError(f"ULR has no {name}; " + (f"use {where}" if where else "see help(ulr_snn.ULR)"))
        fields = {
            "credit": credit_of(credit),
            "maps": maps,
            "sampling": sampling_of(sampling, copies, antithetic, quasi_monte_carlo, layerwise),
            "firing": Logistic() if firing is None else firing,
            "noise": {} if noise is None else noise,
            "flow": {} if flow is None else flow,
            "memory": memory,
            "on_nonfinite": on_nonfinite,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        if self.maps not in MAPS:
            raise UsageError(f"ULR got maps={self.maps!r}; it is one of {', '.join(MAPS)}")
        if self.memory == "bits":
            warnings.warn("memory='bits' is memory='replay' now, which keeps less", DeprecationWarning, stacklevel=4)
            object.__setattr__(self, "memory", "replay")
        if self.memory == "stream":
            warnings.warn("ULR(memory='stream') is ulr_snn.Online() now; use that", DeprecationWarning, stacklevel=4)
            object.__setattr__(self, "memory", OneTimeStep())
        if isinstance(self.memory, str) and self.memory not in MEMORY:
            raise UsageError(f"ULR got memory={self.memory!r}; it is one of {', '.join(MEMORY)}")
        if self.on_nonfinite not in ("stop", "skip"):
            raise UsageError(f"ULR got on_nonfinite={self.on_nonfinite!r}; it is 'stop' or 'skip'")
        if not isinstance(self.firing, Firing):
            raise UsageError(f"ULR got firing={self.firing!r}; it is Logistic() or Gaussian()")
        check_noise(self.noise)
        check_flows(self.flow)
        self.sampling.check()
        self.credit.check(self.sampling)
        in_turn = self.memory == "replay" and isinstance(self.credit, Global)
        if in_turn and self.sampling.by_layer:
            raise UsageError("ULR got memory='replay' with layerwise; copies in turn are for all layers together")
        if self.memory == "replay" and self.sampling.adaptive:
            raise UsageError("ULR got memory='replay' with Adaptive copies; give it a number of copies")

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
        return LearnedAttachment(model, self, self._memory(), *about)

    def _memory(self) -> Memory:
        if not isinstance(self.memory, str):
            return self.memory
        if self.memory == "replay":
            return CopiesInTurn() if isinstance(self.credit, Global) else TimeChunks()
        return TimeChunks(asked=False)


def check_noise(noise: NoiseByName) -> None:
    """Raises UsageError for what is no noise by name."""
    if not isinstance(noise, Mapping):
        raise UsageError(f"ULR got noise={noise!r}; give it by name, as in noise={{'0.weight': WeightNoise()}}")
    for name, site in noise.items():
        if not (site is None or isinstance(site, CurrentNoise | WeightNoise | OutputNoise)):
            raise UsageError(f"ULR got noise={site!r} for {name!r}; it is CurrentNoise(), WeightNoise() or None")
        if isinstance(site, OutputNoise) and name != "outputs":
            raise UsageError(f"ULR got {site} for {name!r}; noise on the outputs goes by the name 'outputs'")


def check_flows(flow: Mapping[str, str]) -> None:
    """Raises UsageError for what is no flow by name."""
    if not isinstance(flow, Mapping):
        raise UsageError(f"ULR got flow={flow!r}; give it by name, as in flow={{'0': 'frozen'}}")
    for name, kind in flow.items():
        if kind not in FLOWS:
            raise UsageError(f"ULR got flow={kind!r} for {name!r}; it is one of {', '.join(FLOWS)}")


def or_default(estimator: Estimator | None) -> Estimator:
    """`ULR()` where none is given. Raises UsageError for what is no estimator."""
    if estimator is not None and not callable(getattr(estimator, "attach", None)):
        raise UsageError(f"{estimator!r} is no estimator; give an object such as ulr_snn.ULR(credit='global')")
    return ULR() if estimator is None else estimator


def attach(
    model: nn.Module,
    estimator: Estimator | None = None,
    loss: LossSpec = "ce_count",
    seed: int = 0,
    time_first: bool = True,
    total_steps: int | None = None,
) -> Attachment:
    """For one's own loop: `with attach(model) as ulr: ... estimate = ulr.backward(x, y); optimizer.step()`.

    total_steps: length of the training, over which the firing noise is annealed; without it the noise stays at
    the geometric mean of its first and last level.
    loss: a name (see `ulr_snn.losses.named`) or a callable (outputs, targets) -> [B].
    Raises UsageError if nothing in the model can get noise; where modules of one's own may, the first `backward` tells.
    """
    return or_default(estimator).attach(model, loss, seed, time_first, total_steps)
