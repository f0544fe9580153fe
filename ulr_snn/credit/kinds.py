"""Kinds of credit for `ULR(credit=...)`: `Auto`, `Global`, `Feedback` and `Residual`.

kind       λ   a (prediction of ∂E[L]/∂spike)                       what it is
Global     1   0                                                    unbiased, the paper's estimator
Feedback   0   direct credit + feedback of the copy itself          slightly biased, very low variance
Residual   1   the same, from independent copies                    unbiased, a as control variate

λ and a are those of credit/formula.py.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from ulr_snn.credit.base import NOTHING, Credit
from ulr_snn.credit.feedback import FeedbackLimits
from ulr_snn.credit.residual import from_other_copies
from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import Count, Flag, Positive, check_fields
from ulr_snn.model.passes import Group, Pass
from ulr_snn.sampling.kinds import Sampling


class Predictor(Protocol):
    """The part of a `Prediction` that kinds of credit use."""

    def credit(self, p: Pass) -> list[Credit]: ...
    def learn_layers(self, passes: list[Pass], step: int) -> None: ...
    def refresh(self, passes: list[Pass]) -> None: ...
    def wants_pairs(self, step: int, every: int) -> bool: ...


@dataclass(frozen=True)
class CreditKind:
    """The base of all kinds of credit. unbiased: λ is 1, so losses weight scores. default_copies: copies per sample."""

    name: ClassVar[str]
    unbiased: ClassVar[bool]
    default_copies: ClassVar[int]
    by_losses: ClassVar[bool] = False  # passes need only the losses of other passes
    goes_back: ClassVar[bool] = True  # credit is predicted from the gradient of the loss in the outputs

    def check(self, sampling: Sampling) -> None:
        """Raises UsageError if the credit cannot be used with this sampling."""
        if sampling.multi_sample and self.unbiased and self.goes_back:
            raise UsageError("ULR got multi_sample copies with credit='residual'; use 'auto', 'feedback' or 'global'")
        if sampling.adaptive and not self.unbiased:
            raise UsageError(
                f"ULR got Adaptive copies with credit={self.name!r}; it takes credit 'global' or 'residual'"
            )
        if sampling.by_layer and not self.unbiased:
            raise UsageError(f"ULR got layerwise with credit={self.name!r}; it is for 'global' and 'residual'")

    @property
    def reward_to_go(self) -> bool:
        return False

    def predict(self, prediction: Predictor, passes: list[Pass], group: int) -> list[list[Credit]]:
        """Predicts a for each pass and record. group: number of copies that depend on each other."""
        raise NotImplementedError

    def learn_before(self, prediction: Predictor, passes: list[Pass], step: int) -> None:
        """Learns feedback that may be used in the same passes."""

    def learn_after(self, prediction: Predictor, groups: list[Group], step: int) -> None:
        """Learns feedback that may be used only in later passes."""

    def wants_pair(self, prediction: Predictor, step: int) -> bool:
        """Returns whether a step should run at least two copies, to learn from their difference."""
        return False

    def describe(self, parts: str) -> str:
        """Describes a site's credit for `plan`. parts: the sources of the prediction."""
        raise NotImplementedError


@dataclass(frozen=True)
class Learned(CreditKind):
    """The base of kinds with learned feedback.

    refresh: number of steps between antithetic pairs. Pairs are needed only where feedback cannot be learned from a
        single pass: from the outputs, and into layers that depend on the events without passing spikes.
    time_functions: number of smooth functions of time in the learned feedback; 1: constant in time.
    rate: bound of the feedback's step, in units of samples / (neurons * functions).
    limits: see `FeedbackLimits`.
    """

    refresh: Count = 4
    time_functions: Count = 8
    rate: Positive = 0.1
    limits: FeedbackLimits = field(default_factory=FeedbackLimits, repr=False)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Auto(Learned):
    """Uses `Feedback` where the loss is differentiable in the outputs, or output noise makes it so; otherwise `Global`.
    In a mix of losses, the losses without a gradient get the credit of `Global`."""

    name: ClassVar[str] = "auto"
    unbiased: ClassVar[bool] = False
    default_copies: ClassVar[int] = 1

    def chosen(self, differentiable: bool) -> "Feedback | Global":
        """Returns the kind for a loss that is, or is not, differentiable in the outputs."""
        return Feedback(self.refresh, self.time_functions, self.rate, self.limits) if differentiable else Global()


@dataclass(frozen=True)
class Global(CreditKind):
    """Credits every spike with the loss minus a baseline (arXiv 2305.08960): unbiased, with high variance.

    reward_to_go: a spike is credited only with the loss from its time on. This is for losses that are sums over time
        ("ce_rate", "mse", "negative_return", or a `NamedLoss` with `steps`) and models that do not look ahead.
    """

    name: ClassVar[str] = "global"
    unbiased: ClassVar[bool] = True
    default_copies: ClassVar[int] = 8
    by_losses: ClassVar[bool] = True
    goes_back: ClassVar[bool] = False
    reward_to_go: Flag = False

    def __post_init__(self) -> None:
        check_fields(self)

    def predict(self, prediction: Predictor, passes: list[Pass], group: int) -> list[list[Credit]]:
        return [[NOTHING] * len(p.records) for p in passes]

    def describe(self, parts: str) -> str:
        return "loss minus baseline, times the score"


@dataclass(frozen=True)
class Feedback(Learned):
    """Credits each spike with its predicted effect on the loss in its own pass: slight bias, very low variance."""

    name: ClassVar[str] = "feedback"
    unbiased: ClassVar[bool] = False
    default_copies: ClassVar[int] = 1

    def predict(self, prediction: Predictor, passes: list[Pass], group: int) -> list[list[Credit]]:
        return [[] if p.linked else prediction.credit(p) for p in passes]  # autograd carries credit in a linked pass

    def learn_before(self, prediction: Predictor, passes: list[Pass], step: int) -> None:
        # The effect of spikes on the next layer is deterministic, so learning it from its own pass adds no bias.
        prediction.learn_layers(passes, step)

    def learn_after(self, prediction: Predictor, groups: list[Group], step: int) -> None:
        for group in groups:  # feedback from the outputs must not enter its own regression
            prediction.refresh(group.passes)

    def wants_pair(self, prediction: Predictor, step: int) -> bool:
        return prediction.wants_pairs(step, self.refresh)

    def describe(self, parts: str) -> str:
        return parts


@dataclass(frozen=True)
class Residual(Learned):
    """Credits each spike with the loss minus its prediction from independent copies: unbiased, with less variance the
    better the prediction. reward_to_go: see `Global`."""

    name: ClassVar[str] = "residual"
    unbiased: ClassVar[bool] = True
    default_copies: ClassVar[int] = 4
    reward_to_go: Flag = False

    def check(self, sampling: Sampling) -> None:
        super().check(sampling)
        if sampling.copies is not None and sampling.copies < 2 * sampling.group:
            raise UsageError(
                f"ULR got credit='residual' with copies={sampling.copies}; its predictions come from other copies, "
                f"use at least {2 * sampling.group}"
            )

    def predict(self, prediction: Predictor, passes: list[Pass], group: int) -> list[list[Credit]]:
        return from_other_copies([prediction.credit(p) for p in passes], passes, group)

    def learn_after(self, prediction: Predictor, groups: list[Group], step: int) -> None:
        for group in groups:
            prediction.refresh(group.passes)
            prediction.learn_layers(group.passes, step)

    def describe(self, parts: str) -> str:
        return f"loss times score, less {parts} of other copies"


KINDS: dict[str, CreditKind] = {kind.name: kind for kind in (Auto(), Global(), Feedback(), Residual())}


def credit_of(credit: CreditKind | str) -> CreditKind:
    """Returns the kind of this name, or the given kind."""
    if isinstance(credit, CreditKind):
        return credit
    if not isinstance(credit, str) or credit not in KINDS:
        raise UsageError(f"ULR got credit={credit!r}; it is one of {', '.join(KINDS)}")
    return KINDS[credit]
