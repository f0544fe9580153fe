"""How the copies of a sample are drawn: how many, and what noise they share.

`Independent`, `Antithetic`, `Sobol`, `Adaptive` and `LayerByLayer` are what `ULR(sampling=...)` takes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ulr_snn.errors import UsageError
from ulr_snn.model.passes import Group, Pass
from ulr_snn.noise.random import Noise
from ulr_snn.sampling.adaptive import CopyBudget, FixedCopies

Run = Callable[..., list[Pass]]  # (copies, varied=None) -> passes


@dataclass(frozen=True)
class Sampling:
    """What all kinds share. copies: runs of every sample in a step; None: as many as the credit's default.

    group: copies that are not independent of each other.
    """

    copies: int | None = None

    def __post_init__(self) -> None:
        if self.copies is not None and not (isinstance(self.copies, int) and self.copies >= 1):
            raise UsageError(f"ULR got copies={self.copies!r}; it must be a whole number, at least 1")

    @property
    def group(self) -> int:
        return 1

    @property
    def mirrored(self) -> bool:
        """Whether copies come in antithetic pairs."""
        return False

    @property
    def multi_sample(self) -> bool:
        """Whether the objective is the multi-sample bound."""
        return False

    @property
    def by_layer(self) -> bool:
        """Whether one layer after another has copies of its own."""
        return False

    @property
    def adaptive(self) -> bool:
        """Whether the number of copies follows the measured variance."""
        return False

    def check(self) -> None:
        """Raises UsageError for numbers that do not go together, once all are known."""

    def counter(self) -> FixedCopies | CopyBudget:
        """How many copies each step takes, for one training."""
        return FixedCopies(self.copies)

    def noise(self, seed: int, step: int, sample: Tensor, copy: Tensor, varied: int | None) -> Noise:
        """The noise of rows that are these copies of these samples. varied: the only site at which copies differ."""
        return Noise(seed, step, sample, copy, varied=varied)

    def groups(self, run: Run, passes: list[Pass], copies: Callable[[str | None], int]) -> list[Group]:
        """Runs what is left of a step's copies, and groups those that are copies of each other.

        passes: those that have run; extended by what runs here. copies: their number, of a site if that has its own.
        """
        passes += run(range(len(passes), copies(None)))
        return [Group(None, passes)]

    def describe(self) -> list[str]:
        """Notes for `plan`."""
        return []


@dataclass(frozen=True)
class Independent(Sampling):
    """Copies with independent noise. multi_sample: the objective is the multi-sample bound -log mean over copies of
    exp(-loss) (GEM-SNN, arXiv 2102.03280), with at least two copies."""

    multi_sample: bool = False  # type: ignore[assignment]  # a field here, constant elsewhere

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multi_sample and (self.copies or 0) < 2:
            raise UsageError(
                f"Independent got multi_sample with copies={self.copies}; the bound takes at least 2 copies"
            )


@dataclass(frozen=True)
class Antithetic(Sampling):
    """Copies in pairs from mirrored uniforms u and 1 - u. A single copy has no partner."""

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
    """Copies in two randomly shifted Sobol sets. copies: a power of two from 2 to 128."""

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
    """As many copies as bring trace(cov) of a step's gradient down to `variance` times the square of its mean's norm,
    from `least` to `most`; with `LayerByLayer`, of each layer's gradient.

    variance: > 0; at 10, a step's gradient has a cosine of about 0.3 with its mean. antithetic: copies come in pairs.
    """

    copies: int | None = field(default=None, init=False, repr=False)
    variance: float = 10.0
    least: int = 4
    most: int = 64
    antithetic: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.variance > 0:
            raise UsageError(f"Adaptive got variance={self.variance}; it must be positive")
        whole = all(isinstance(value, int) for value in (self.least, self.most))
        if not (whole and 2 <= self.least <= self.most):
            raise UsageError(
                f"Adaptive got least={self.least!r}, most={self.most!r}; give whole numbers, 2 <= least <= most"
            )

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


@dataclass(frozen=True)
class LayerByLayer(Sampling):
    """One layer after another has copies of its own, all others see the same noise in each. This is unbiased, with less
    variance, in 1 + layers * (copies - 1) forward passes. of: how the copies of a layer are drawn."""

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
        return groups or [Group(None, passes)]  # no layer has anything to learn

    def describe(self) -> list[str]:
        alone = "layer by layer: a pass for all, and copies - 1 more for each layer, in which it alone has other draws"
        return [*self.of.describe(), alone]


def sampling_of(
    sampling: Sampling | int | None,
    copies: int | Adaptive | None,
    antithetic: bool | None,
    quasi_monte_carlo: bool | None,
    layerwise: bool | None,
) -> Sampling:
    """The sampling that the arguments of `ULR` ask for; shorthands change one that is given. Raises UsageError for what
    does not go together."""
    bound = False
    if isinstance(sampling, Sampling):
        if copies is None and antithetic is None and quasi_monte_carlo is None and layerwise is None:
            return sampling
        inner = sampling.of if isinstance(sampling, LayerByLayer) else sampling
        layerwise = sampling.by_layer if layerwise is None else layerwise
        antithetic = inner.mirrored if antithetic is None else antithetic
        quasi_monte_carlo = isinstance(inner, Sobol) if quasi_monte_carlo is None else quasi_monte_carlo
        if copies is None:
            copies = inner if isinstance(inner, Adaptive) else inner.copies
        sampling, bound = None, inner.multi_sample
    if sampling is not None and copies is not None:
        raise UsageError(f"ULR got sampling={sampling!r} and copies={copies!r}; give one of them")
    copies = sampling if copies is None else copies
    pairs = antithetic is not False
    if isinstance(copies, Adaptive):
        if quasi_monte_carlo:
            raise UsageError("ULR got Adaptive copies with quasi_monte_carlo; Sobol sets have a fixed number of copies")
        kind: Sampling = copies if antithetic is None else replace(copies, antithetic=antithetic)
    elif quasi_monte_carlo:
        if pairs:
            raise UsageError(
                f"ULR got quasi_monte_carlo with copies={copies}, antithetic pairs; use a power of two up to 128, and "
                "antithetic=False, or sampling=Sobol(copies)"
            )
        kind = Sobol(copies)
    else:
        kind = Antithetic(copies) if pairs else Independent(copies, multi_sample=bound)
    return LayerByLayer(of=kind) if layerwise else kind


def rows_of(copies: list[int], batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sample and copy of each row [copies * batch] of a pass, int32."""
    copy = torch.tensor(copies, dtype=torch.int32, device=device).repeat_interleave(batch)
    sample = torch.arange(batch, dtype=torch.int32, device=device).repeat(len(copies))
    return sample, copy
