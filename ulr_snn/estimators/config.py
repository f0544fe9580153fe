"""The part of an estimator's configuration that training steps read."""

from collections.abc import Mapping
from typing import Protocol

from ulr_snn.credit.kinds import CreditKind
from ulr_snn.noise.firing import Firing
from ulr_snn.noise.kinds import CurrentNoise, OutputNoise, WeightNoise
from ulr_snn.sampling.kinds import Sampling

NoiseByName = Mapping[str, CurrentNoise | WeightNoise | OutputNoise | None]


class Config(Protocol):
    """The fields of `ULR` that training steps read."""

    @property
    def credit(self) -> CreditKind: ...
    @property
    def maps(self) -> str: ...
    @property
    def sampling(self) -> Sampling: ...
    @property
    def firing(self) -> Firing: ...
    @property
    def noise(self) -> NoiseByName: ...
    @property
    def flow(self) -> Mapping[str, str]: ...
    @property
    def on_nonfinite(self) -> str: ...

    def with_noise(self, noise: NoiseByName) -> "Config":
        """Returns the same configuration with other noise."""
        ...


def in_one_product(config: Config) -> bool:
    """Returns whether credit may go through all layers in one product, as it does where the model's own code fires."""
    layer_by_layer = config.credit.unbiased and config.credit.goes_back
    return not (layer_by_layer or config.maps == "learned" or config.sampling.multi_sample)
