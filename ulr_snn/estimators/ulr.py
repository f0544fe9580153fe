"""`ULR`, the likelihood-ratio estimator, and `attach`, for training loops of your own."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from torch import nn

from ulr_snn.credit.kinds import CreditKind, Global, credit_of
from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import Count, Flag, Whole, checked, one_of, where
from ulr_snn.estimators.attachment import Attaches
from ulr_snn.estimators.base import Attachment, Estimator, offers
from ulr_snn.estimators.config import NoiseByName
from ulr_snn.losses.named import LossSpec
from ulr_snn.memory.chunks import TimeChunks
from ulr_snn.memory.one_step import OneTimeStep
from ulr_snn.memory.step import Memory
from ulr_snn.memory.whole import CopiesInTurn
from ulr_snn.model.interface import Interface
from ulr_snn.model.mode import check_model, trainable
from ulr_snn.noise.firing import Firing, Logistic
from ulr_snn.noise.kinds import CurrentNoise, OutputNoise, WeightNoise
from ulr_snn.sampling.kinds import Adaptive, Sampling, sampling_of
from ulr_snn.sites.flow import FLOWS

Maps = Annotated[str, one_of("auto", "exact", "learned")]
OnNonfinite = Annotated[str, one_of("stop", "skip", "shrink")]
FiringKind = Annotated[Firing, where("Logistic() or Gaussian()", lambda value: isinstance(value, Firing))]
MEMORY = ("auto", "replay")
MOVED = {  # fields of earlier versions, and their replacements
    "refresh": "credit=Feedback(refresh=...)",
    "time_functions": "credit=Feedback(time_functions=...)",
    "feedback_rate": "credit=Feedback(rate=...)",
    "reward_to_go": "credit=Global(reward_to_go=True) or Residual(reward_to_go=True)",
    "multi_sample": "sampling=Independent(copies, multi_sample=True)",
}


@dataclass(frozen=True, init=False)
class ULR(Attaches):
    """The unified likelihood-ratio estimator (arXiv 2305.08960). Raises UsageError for options that do not fit.

    credit: learning signal of a spike: `Auto()`, `Global()`, `Feedback()`, `Residual()`, or their names. "auto" is
        feedback if the loss is differentiable in the outputs, or noise on the outputs makes it so; otherwise global.
    maps: effect of a layer's spikes on the current of the next layer, for credit. "auto": vector-Jacobian products
        of the modules in between at fixed spikes (max pooling of spikes counts as an OR), and recurrent weights as
        they are; a learned map if a step function such as rounding lies in between. "exact": products only, and
        UsageError where there is none. "learned": regression on forward passes, without weight transport.
    sampling: how copies of a sample are drawn: `Independent`, `Antithetic`, `Sobol`, `Adaptive`, `LayerByLayer`, or a
        number of antithetic copies. None: antithetic copies, 1 for feedback, 4 for residual, 8 for global and for
        mixes that contain a loss without a gradient.
    firing: distribution of the threshold noise, and its scale.
    noise: noise elsewhere, by name. {module: CurrentNoise()}: on a module's input current. {parameter or module:
        WeightNoise()}: on parameters; None: never on these. {"outputs": OutputNoise()}: on the outputs, for losses
        without a gradient; None: never. By default noise is on the current of modules that cut the graph, and on
        parameters that no other noise reaches. With credit "auto" it is also on outputs that are no spikes, or else
        on weights where its expected variance is less than that of the firing (see `plan`).
    flow: how a module or parameter learns, by name. "ulr": by a likelihood ratio, even if it is differentiable (by
        weight noise, unless the module fires). "backprop": only by the exact gradient of differentiable paths.
        "frozen": not at all; the module runs as in evaluation. By default by whichever of the first two is possible.
    memory: what a step keeps. "replay" with credit "feedback": recomputation in time chunks with the same noise, so
        that memory does not grow with the number of time steps. Every chunk runs at least twice, and the model must
        run its modules one after another. "replay" with credit "global": one copy after another, each run twice, so
        that memory does not grow with the number of copies. "auto": the whole sequence if it is small, else "replay"
        if possible.
    on_nonfinite: "stop" raises FloatingPointError for a loss that is not finite, "skip" leaves the step out,
        "shrink" also halves the steps of `train` that follow, until many were good.

    Shorthands for `sampling` follow.
    copies: a number of copies, or `Adaptive()`. antithetic: copies come in pairs (default True).
    quasi_monte_carlo: copies come in Sobol sets instead of pairs. layerwise: copies are those of `LayerByLayer`.
    """

    credit: CreditKind
    maps: str
    sampling: Sampling
    firing: Firing
    noise: NoiseByName = field(hash=False)
    flow: Mapping[str, str] = field(hash=False)
    memory: str | Memory
    on_nonfinite: str

    @checked
    def __init__(
        self,
        credit: CreditKind | str = "auto",
        maps: Maps = "auto",
        sampling: Sampling | Count | None = None,
        firing: FiringKind | None = None,
        noise: NoiseByName | None = None,
        flow: Mapping[str, str] | None = None,
        memory: str | Memory = "auto",
        on_nonfinite: OnNonfinite = "stop",
        *,
        copies: Count | Adaptive | None = None,
        antithetic: Flag | None = None,
        quasi_monte_carlo: Flag | None = None,
        layerwise: Flag | None = None,
        **moved: Any,
    ) -> None:
        if moved:
            name = next(iter(moved))
            advice = f"use {MOVED[name]}" if name in MOVED else "see help(ulr_snn.ULR)"
            raise UsageError(f"ULR has no {name}; {advice}")
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
        if self.memory == "bits":
            warnings.warn("memory='bits' is deprecated; use memory='replay'", DeprecationWarning, stacklevel=4)
            object.__setattr__(self, "memory", "replay")
        if self.memory == "stream":
            warnings.warn("ULR(memory='stream') is deprecated; use ulr_snn.Online()", DeprecationWarning, stacklevel=4)
            object.__setattr__(self, "memory", OneTimeStep())
        if not offers(self.memory, "estimates") and self.memory not in MEMORY:
            raise UsageError(f"ULR got memory={self.memory!r}; it is one of {', '.join(MEMORY)}")
        check_noise(self.noise)
        check_flows(self.flow)
        self.sampling.check()
        self.credit.check(self.sampling)
        in_turn = self.memory == "replay" and isinstance(self.credit, Global)
        if in_turn and self.sampling.by_layer:
            raise UsageError("ULR got memory='replay' with layerwise; copies in turn are for all layers together")
        if self.memory == "replay" and self.sampling.adaptive:
            raise UsageError("ULR got memory='replay' with Adaptive copies; give it a number of copies")

    def with_noise(self, noise: NoiseByName) -> "ULR":
        return replace(self, noise=noise)

    @property
    def config(self) -> "ULR":
        return self

    @property
    def strategy(self) -> Memory:
        if not isinstance(self.memory, str):
            return self.memory
        if self.memory == "replay":
            return CopiesInTurn() if isinstance(self.credit, Global) else TimeChunks()
        return TimeChunks(asked=False)


def check_noise(noise: NoiseByName) -> None:
    """Raises UsageError unless `noise` maps names to noise."""
    if not isinstance(noise, Mapping):
        raise UsageError(f"ULR got noise={noise!r}; give it by name, as in noise={{'0.weight': WeightNoise()}}")
    for name, site in noise.items():
        if not (site is None or isinstance(site, CurrentNoise | WeightNoise | OutputNoise)):
            raise UsageError(f"ULR got noise={site!r} for {name!r}; it is CurrentNoise(), WeightNoise() or None")
        if isinstance(site, OutputNoise) and name != "outputs":
            raise UsageError(f"ULR got {site} for {name!r}; noise on the outputs goes by the name 'outputs'")


def check_flows(flow: Mapping[str, str]) -> None:
    """Raises UsageError unless `flow` maps names to flows."""
    if not isinstance(flow, Mapping):
        raise UsageError(f"ULR got flow={flow!r}; give it by name, as in flow={{'0': 'frozen'}}")
    for name, kind in flow.items():
        if kind not in FLOWS:
            raise UsageError(f"ULR got flow={kind!r} for {name!r}; it is one of {', '.join(FLOWS)}")


def or_default(estimator: Estimator | None) -> Estimator:
    """Returns the estimator, or `ULR()` for None. Raises UsageError for anything else."""
    if estimator is not None and not offers(estimator, "attach"):
        raise UsageError(f"{estimator!r} is no estimator; give an object such as ulr_snn.ULR(credit='global')")
    return ULR() if estimator is None else estimator


@checked
def attach(
    model: nn.Module,
    estimator: Estimator | None = None,
    loss: LossSpec = "ce_count",
    seed: Whole = 0,
    time_first: bool = True,
    total_steps: Count | None = None,
    layout: str | None = None,
    output: Any = None,
) -> Attachment:
    """Attaches an estimator to a model, for a loop of your own.

    Use it as in `with attach(model) as ulr: ... estimate = ulr.backward(x, y); optimizer.step()`. estimator: default
    `ULR()`. loss: a name (see `ulr_snn.losses.named`) or a callable (outputs, targets) -> [B]. total_steps: length of
    the training, over which the firing noise is annealed. None keeps the noise at the geometric mean of its first and
    last level. time_first, layout, output: see `train`. Raises UsageError, here or in the first `backward`, if no
    module can get noise.

    Under torch.distributed, every rank calls `backward` on its own share of a joined batch, and gets the gradient of
    the joined batch; see docs/distributed.md. The model may be in a DistributedDataParallel, which averages no
    gradients by itself until the attachment is closed.
    """
    wrapper, model = model, check_model(model)
    if any(True for _ in model.parameters()):  # a model of neurons alone may be measured
        trainable(model)
    interface = Interface.of(time_first, layout, output)
    attachment = or_default(estimator).attach(model, loss, seed, interface, total_steps)
    attachment.averages_for(wrapper)
    return attachment
