"""The kinds of sampling for `ULR(sampling=...)`: how many copies of a sample there are, and what noise they share."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Annotated

import torch
from torch import Tensor

from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import Count, Flag, Positive, check_fields, whole
from ulr_snn.kernels import ranks
from ulr_snn.model.passes import Group, Pass
from ulr_snn.noise.random import Noise
from ulr_snn.sampling.adaptive import CopyBudget, FixedCopies

Bound = Annotated[int, whole(2, "given in whole numbers, 2 <= least <= most")]
Run = Callable[..., list[Pass]]  # (copies, varied=None) -> passes


@dataclass(frozen=True)
class Sampling:
    """The base of all kinds of sampling.

    copies: runs of every sample in a step, None for the default of the credit; group: copies that depend on each other.
    """

    copies: Count | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def group(self) -> int:
        return 1

    @property
    def mirrored(self) -> bool:
        """True if copies come in antithetic pairs."""
        return False

    @property
    def multi_sample(self) -> bool:
        """True if the objective is the multi-sample bound."""
        return False

    @property
    def by_layer(self) -> bool:
        """True if every layer has copies of its own."""
        return False

    @property
    def adaptive(self) -> bool:
        """True if the number of copies follows the measured variance."""
        return False

    def check(self) -> None:
        """Raises UsageError for numbers that do not fit together."""

    def counter(self) -> FixedCopies | CopyBudget:
        """Returns the counter of copies of one training."""
        return FixedCopies(self.copies)

    def noise(self, seed: int, step: int, sample: Tensor, copy: Tensor, varied: int | None) -> Noise:
        """Returns the noise of rows with these samples and copies. varied: the only site at which copies differ."""
        return Noise(seed, step, sample, copy, varied=varied)

    def groups(self, run: Run, passes: list[Pass], copies: Callable[[str | None], int]) -> list[Group]:
        """Runs the remaining copies of a step, and groups the passes that are copies of each other.

        passes: passes that have run, extended in place; copies: number of copies, of a site or (None) of all together.
        """
        passes += run(range(len(passes), copies(None)))
        return [Group(None, passes)]

    def describe(self) -> list[str]:
        """Returns notes for `plan`."""
        return []


@dataclass(frozen=True)
class Independent(Sampling):
    """Copies with independent noise. Raises UsageError for `multi_sample` with fewer than two copies.

    multi_sample: the objective is the bound -log mean over copies of exp(-loss) (GEM-SNN, arXiv 2102.03280).
    """

    multi_sample: Flag = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multi_sample and (self.copies or 0) < 2:
            raise UsageError(
                f"Independent got multi_sample with copies={self.copies}; the bound takes at least 2 copies"
            )


@dataclass(frozen=True)
class Antithetic(Sampling):
    """Copies in pairs with mirrored uniforms u and 1 - u. Raises UsageError for an odd number, except one copy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.copies is not None and self.copies > 1 and self.copies % 2:
            raise UsageError(
                f"ULR got copies={self.copies} in antithetic pairs; use an even number or antithetic=False"
            )

    @property
    def group(self) -> int:
        return 2

    @property
    def mirrored(self) -> bool:
        return True

    def noise(self, seed: int, step: int, sample: Tensor, copy: Tensor, varied: int | None) -> Noise:
        return Noise(seed, step, sample, copy // 2, mirrored=copy % 2 == 1, varied=varied)


@dataclass(frozen=True)
class Sobol(Sampling):
    """Copies in two randomly shifted Sobol sets. copies: a power of two from 2 to 128, else UsageError."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.copies not in [2**k for k in range(1, 8)]:
            raise UsageError(f"Sobol sets got copies={self.copies}; use a power of two from 2 to 128")

    @property
    def group(self) -> int:
        return max(1, (self.copies or 2) // 2)

    def noise(self, seed: int, step: int, sample: Tensor, copy: Tensor, varied: int | None) -> Noise:
        return Noise(seed, step, sample, copy // self.group, point=(copy % self.group).long(), varied=varied)


@dataclass(frozen=True)
class Adaptive(Sampling):
    """Adapts the number of copies so that trace(cov g) of a step's gradient g is at most variance · |E g|².

    With `LayerByLayer` this holds for the gradient of each layer. Raises UsageError for wrong numbers.
    variance: positive; at 10, a step's gradient has a cosine of about 0.3 with its mean. least, most: bounds of the
    number of copies, multiples of 4 (of 2 with antithetic=False). antithetic: copies come in antithetic pairs.
    """

    copies: int | None = field(default=None, init=False, repr=False)
    variance: Positive = 10.0
    least: Bound = 4
    most: Bound = 64
    antithetic: Flag = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.least > self.most:
            raise UsageError(f"Adaptive got least={self.least}, most={self.most}; give 2 <= least <= most")

    def check(self) -> None:
        if self.least % (2 * self.group) or self.most % (2 * self.group):
            raise UsageError(
                f"Adaptive got least={self.least}, most={self.most}; copies go in two halves of "
                f"{'antithetic pairs' if self.antithetic else 'copies'}, use multiples of {2 * self.group}"
            )

    @property
    def group(self) -> int:
        return 2 if self.antithetic else 1

    @property
    def mirrored(self) -> bool:
        return self.antithetic

    @property
    def adaptive(self) -> bool:
        return True

    def counter(self) -> CopyBudget:
        return CopyBudget(self.variance, self.least, self.most, self.group)

    def noise(self, seed: int, step: int, sample: Tensor, copy: Tensor, varied: int | None) -> Noise:
        kind: Sampling = Antithetic() if self.antithetic else Independent()
        return kind.noise(seed, step, sample, copy, varied)

    def describe(self) -> list[str]:
        return [
            f"copies follow the measured variance of the gradient, {self.least} to {self.most} for each step, or with "
            "LayerByLayer for each layer"
        ]


AdaptiveCopies = Adaptive  # the name of earlier versions


@dataclass(frozen=True)
class LayerByLayer(Sampling):
    """Gives every layer copies of its own, in which only this layer's noise differs.

    This is unbiased and has less variance, in 1 + layers * (copies - 1) forward passes.
    of: how the copies of a layer are drawn; UsageError if it is `LayerByLayer` or multi-sample.
    """

    copies: int | None = field(default=None, init=False, repr=False)
    of: Sampling = field(default_factory=Antithetic)

    def __post_init__(self) -> None:
        if not isinstance(self.of, Sampling) or self.of.by_layer or self.of.multi_sample:
            raise UsageError(f"LayerByLayer got of={self.of!r}; give Independent, Antithetic, Sobol or Adaptive copies")
        object.__setattr__(self, "copies", self.of.copies)

    @property
    def group(self) -> int:
        return self.of.group

    @property
    def mirrored(self) -> bool:
        return self.of.mirrored

    @property
    def by_layer(self) -> bool:
        return True

    @property
    def adaptive(self) -> bool:
        return self.of.adaptive

    def check(self) -> None:
        self.of.check()

    def counter(self) -> FixedCopies | CopyBudget:
        return self.of.counter()

    def noise(self, seed: int, step: int, sample: Tensor, copy: Tensor, varied: int | None) -> Noise:
        return self.of.noise(seed, step, sample, copy, varied)

    def groups(self, run: Run, passes: list[Pass], copies: Callable[[str | None], int]) -> list[Group]:
        passes += run(range(len(passes), 1))
        groups = []
        for site in [record.site for record in passes[0].records if record.x.requires_grad]:
            own = run(range(1, copies(site)), varied=site)
            passes += own
            groups.append(Group(site, [passes[0], *own]))
        return groups or [Group(None, passes)]  # no layer learns

    def describe(self) -> list[str]:
        alone = "layer by layer: a pass for all, and copies - 1 more for each layer, in which only its noise differs"
        return [*self.of.describe(), alone]


def sampling_of(
    sampling: Sampling | int | None,
    copies: int | Adaptive | None,
    antithetic: bool | None,
    quasi_monte_carlo: bool | None,
    layerwise: bool | None,
) -> Sampling:
    """Returns the sampling by the arguments of `ULR`, in which shorthands change a given `sampling`.

    Raises UsageError for arguments that do not fit together.
    """
    bound, given = False, None
    if isinstance(sampling, Sampling):
        if copies is None and antithetic is None and quasi_monte_carlo is None and layerwise is None:
            return sampling
        inner = sampling.of if isinstance(sampling, LayerByLayer) else sampling
        bound, given = inner.multi_sample, sampling
        if type(inner) not in (Independent, Antithetic, Sobol, Adaptive):
            raise UsageError(f"ULR got sampling={sampling!r} and a shorthand, such as copies; give sampling alone")
        layerwise = sampling.by_layer if layerwise is None else layerwise
        antithetic = inner.mirrored if antithetic is None else antithetic
        quasi_monte_carlo = isinstance(inner, Sobol) if quasi_monte_carlo is None else quasi_monte_carlo
        if copies is None:
            copies = inner if isinstance(inner, Adaptive) else inner.copies
        sampling = None
    if sampling is not None and copies is not None:
        raise UsageError(f"ULR got sampling={sampling!r} and copies={copies!r}; give one of them")
    copies = sampling if copies is None else copies
    pairs = antithetic is None or bool(antithetic)
    if isinstance(copies, Adaptive):
        if quasi_monte_carlo:
            raise UsageError("ULR got Adaptive copies with quasi_monte_carlo; Sobol sets have a fixed number of copies")
        kind: Sampling = copies if antithetic is None else replace(copies, antithetic=pairs)
    elif quasi_monte_carlo:
        if pairs:
            raise UsageError(
                f"ULR got quasi_monte_carlo with copies={copies}, antithetic pairs; use a power of two up to 128, and "
                "antithetic=False, or sampling=Sobol(copies)"
            )
        kind = Sobol(copies)
    else:
        kind = Antithetic(copies) if pairs else Independent(copies, multi_sample=bound)
    if bound and not isinstance(kind, Independent):
        raise UsageError(f"ULR got sampling={given!r} and a shorthand that makes it {kind!r}; give sampling alone")
    return LayerByLayer(of=kind) if layerwise else kind


def rows_of(copies: list[int], batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the sample and the copy of each row [copies * batch] of a pass, int32. They may serve several passes."""
    return _rows_of(tuple(copies), ranks.first_sample(), batch, device)


@lru_cache(maxsize=16)
def _rows_of(copies: tuple[int, ...], first: int, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        copy = torch.tensor(copies, dtype=torch.int32, device=device).repeat_interleave(batch)
        sample = torch.arange(first, first + batch, dtype=torch.int32, device=device).repeat(len(copies))
    return sample, copy
