"""What every spike is credited with: `Auto`, `Global`, `Feedback` and `Residual` are what `ULR(credit=...)` takes.

kind       λ   a (prediction of ∂E[L]/∂spike)                       what it is
Global     1   0                                                    unbiased, the paper's estimator
Feedback   0   direct credit + feedback of the copy itself          slightly biased, very low variance
Residual   1   the same, from independent copies                    unbiased, a as control variate

See credit/formula.py for what λ and a are in.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from ulr_snn.credit.base import NOTHING, Credit
from ulr_snn.credit.residual import from_other_copies
from ulr_snn.errors import UsageError
from ulr_snn.model.passes import Group, Pass
from ulr_snn.sampling.kinds import Sampling


class Predictor(Protocol):
    """What kinds of credit ask of a prediction, see `Prediction`."""

    def credit(self, p: Pass) -> list[Credit]: ...
    def learn_layers(self, passes: list[Pass], step: int) -> None: ...
    def refresh(self, passes: list[Pass]) -> None: ...
    def wants_pairs(self, step: int, every: int) -> bool: ...


@dataclass(frozen=True)
class CreditKind:
    """What all kinds share. unbiased: λ is 1, so that losses weight scores; default_copies: of a sample in a step."""

    name: ClassVar[str]
    unbiased: ClassVar[bool]
    default_copies: ClassVar[int]
    by_losses: ClassVar[bool] = False  # a pass needs of the others their losses alone
    goes_back: ClassVar[bool] = True  # credit is predicted, from the gradient of the loss in the outputs

    def check(self, sampling: Sampling) -> None:
        """Raises UsageError for copies that it cannot be used with."""
        if sampling.multi_sample and self.name == "residual":
            raise UsageError("ULR got multi_sample copies with credit='residual'; use 'auto', 'feedback' or 'global'")
        if sampling.adaptive and self.name not in ("global", "residual"):
            raise UsageError(
                f"ULR got Adaptive copies with credit={self.name!r}; it takes credit 'global' or 'residual'"
            )
        if sampling.by_layer and self.name not in ("global", "residual"):
            raise UsageError(f"ULR got layerwise with credit={self.name!r}; it is for 'global' and 'residual'")

    @property
    def reward_to_go(self) -> bool:
        return False

    def predict(self, prediction: Predictor, passes: list[Pass], group: int) -> list[list[Credit]]:
        """The prediction a of each pass and record. group: copies that are not independent of each other."""
        raise NotImplementedError

    def learn_before(self, prediction: Predictor, passes: list[Pass], step: int) -> None:
        """Learns what may be learned from the passes that it is used in."""

    def learn_after(self, prediction: Predictor, groups: list[Group], step: int) -> None:
        """Learns what must not be learned from the passes that it is used in, once they have been used."""

    def wants_pair(self, prediction: Predictor, step: int) -> bool:
        """Whether a step is to run at least two copies, to learn from their difference."""
        return False

    def describe(self, parts: str) -> str:
        """What a site's spikes are credited with, for `plan`. parts: where the prediction comes from."""
        raise NotImplementedError


@dataclass(frozen=True)
class Learned(CreditKind):
    """Kinds with learned feedback.

    refresh: number of steps between antithetic pairs. Pairs are needed only where feedback cannot be learned from a
        single pass: from the outputs, and into layers that see the events otherwise than by spikes.
    time_functions: number of smooth functions of time that resolve the learned feedback; 1: constant in time.
    rate: bound of the feedback's step, in units of samples / (neurons * functions).
    """

    refresh: int = 4
    time_functions: int = 8
    rate: float = 0.1

    def __post_init__(self) -> None:
        kind = type(self).__name__
        for name in ("refresh", "time_functions"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise UsageError(f"{kind} got {name}={value!r}; it must be a whole number, at least 1")
        if not self.rate > 0:
            raise UsageError(f"{kind} got rate={self.rate}; it must be positive")


@dataclass(frozen=True)
class Auto(Learned):
    """`Feedback` where the loss is differentiable in the outputs, or noise on these makes it so; otherwise `Global`. Of
    a mix of losses, those without a gradient then get the credit of `Global`."""

    name: ClassVar[str] = "auto"
    unbiased: ClassVar[bool] = False
    default_copies: ClassVar[int] = 1

    def chosen(self, differentiable: bool) -> "Feedback | Global":
        """What it is for a loss that is differentiable in the outputs, or is not."""
        return Feedback(self.refresh, self.time_functions, self.rate) if differentiable else Global()


@dataclass(frozen=True)
class Global(CreditKind):
    """The loss less a baseline, for every spike alike (arXiv 2305.08960): unbiased, of high variance.

    reward_to_go: a spike is credited with what the loss adds up from its time on alone. For losses that are sums over
        time ("ce_rate", "mse") and models that do not look ahead.
    """

    name: ClassVar[str] = "global"
    unbiased: ClassVar[bool] = True
    default_copies: ClassVar[int] = 8
    by_losses: ClassVar[bool] = True
    goes_back: ClassVar[bool] = False
    reward_to_go: bool = False  # type: ignore[assignment]  # a field here, constant elsewhere

    def predict(self, prediction: Predictor, passes: list[Pass], group: int) -> list[list[Credit]]:
        return [[NOTHING] * len(p.records) for p in passes]

    def describe(self, parts: str) -> str:
        return "loss minus baseline, times the score"


@dataclass(frozen=True)
class Feedback(Learned):
    """The prediction of what each spike does to the loss, from its own pass: slightly biased, of very low variance."""

    name: ClassVar[str] = "feedback"
    unbiased: ClassVar[bool] = False
    default_copies: ClassVar[int] = 1

    def predict(self, prediction: Predictor, passes: list[Pass], group: int) -> list[list[Credit]]:
        return [[] if p.linked else prediction.credit(p) for p in passes]  # a linked pass gives credit by itself

    def learn_before(self, prediction: Predictor, passes: list[Pass], step: int) -> None:
        # What spikes do to the next layer is no matter of chance.
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
    """The loss less what is predicted from the innovations of independent copies: unbiased, with less variance the
    better the prediction. reward_to_go: as of `Global`."""

    name: ClassVar[str] = "residual"
    unbiased: ClassVar[bool] = True
    default_copies: ClassVar[int] = 4
    reward_to_go: bool = False  # type: ignore[assignment]  # a field here, constant elsewhere

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
    """The kind of this name, or as it is given."""
    if isinstance(credit, CreditKind):
        return credit
    if not isinstance(credit, str) or credit not in KINDS:
        raise UsageError(f"ULR got credit={credit!r}; it is one of {', '.join(KINDS)}")
    return KINDS[credit]
