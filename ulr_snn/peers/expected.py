"""Expected-gradient BPTT: backpropagation through the stochastic net by derivatives of the firing probabilities.

Spikes are drawn as in `ULR`. In the backward pass ∂p/∂u replaces ∂s/∂u. Unlike a surrogate this is a true derivative,
but a chain of them is not the gradient of the expected loss, unless the loss is linear in every spike. It shows what
credit assignment can reach with the same noise.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.adapters import StepNeuron
from ulr_snn.errors import UsageError
from ulr_snn.kernels import ranks
from ulr_snn.losses.named import LossSpec
from ulr_snn.model.interface import Interface
from ulr_snn.model.neurons import LIF, SpikingNeuron, spread_without_padding, step_mask
from ulr_snn.noise.firing import Firing, Logistic
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.noise.random import Drawer, Noise
from ulr_snn.peers.surrogate import SurrogateAttachment, differentiable_spikes
from ulr_snn.sites.binding import Layers, module_of


@dataclass(frozen=True)
class ExpectedGradientBPTT:
    """BPTT by derivatives of the firing probabilities, for models of ulr_snn's neurons.

    firing: as in `ULR`; a learned threshold has its gradient at a fixed scale of the noise.
    """

    firing: Firing = field(default_factory=Logistic)

    def attach(
        self,
        model: nn.Module,
        loss: LossSpec,
        seed: int,
        interface: Interface,
        total_steps: int | None = None,
        *,
        progress: float | None = None,
        rates: bool = False,
    ) -> "ExpectedAttachment":
        """Returns the attachment; see `Estimator.attach`."""
        return ExpectedAttachment(model, self, loss, seed, interface, total_steps, progress)


class ExpectedAttachment(SurrogateAttachment):
    """Adds expected gradients to `.grad`. fixed_progress: progress of the training, None if it follows the steps."""

    def __init__(
        self,
        model: nn.Module,
        peer: ExpectedGradientBPTT,
        loss: LossSpec,
        seed: int,
        interface: Interface,
        total_steps: int | None,
        progress: float | None = None,
    ) -> None:
        super().__init__(model, peer, loss, interface)
        self.seed, self.total_steps, self.level = seed, total_steps, NoiseLevel(peer.firing)
        self.fixed_progress = progress

    def check(self, name: str, neuron: SpikingNeuron | StepNeuron) -> None:
        if not isinstance(neuron, LIF):
            raise UsageError(
                f"{name} is a {type(module_of(neuron)).__name__}; ExpectedGradientBPTT knows only LIF and RecurrentLIF"
            )

    def sites(self, layers: Layers, x: Tensor) -> list[Any]:
        progress = min(1.0, self.step / self.total_steps) if self.total_steps else 0.5
        self.level.progress = progress if self.fixed_progress is None else self.fixed_progress
        first = ranks.first_sample()
        sample = torch.arange(first, first + x.shape[1], dtype=torch.int32, device=x.device)
        noise = Noise(self.seed, self.step, sample, torch.zeros_like(sample))
        return [_Stochastic(name, index, self.level, noise) for index, (name, _) in enumerate(layers)]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"noise_starts": dict(self.level.starts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.level.starts = dict(state.get("noise_starts", {}))


@dataclass
class _Stochastic:
    """A site that draws spikes and passes gradients by the derivative of their probability."""

    name: str
    index: int
    level: NoiseLevel
    noise: Noise
    detach_reset = False  # the derivative is a true one

    def fire_sequence(self, neuron: LIF, current: Tensor) -> Tensor:
        """Runs the neuron from current [T, B, ...] to spikes [T, B, ...]."""
        mask = None if neuron.lengths is None else step_mask(neuron.lengths, current)
        with torch.no_grad():
            self.scale = self.level.scale(
                self.name,
                neuron.threshold,
                lambda: spread_without_padding(neuron.fired(current)[1] + neuron.threshold, mask),
            )
        self._draw = Drawer(self.noise, self.level.firing, self.index, len(current), self.scale)
        return differentiable_spikes(neuron, current, self)

    def fire(self, t: int, drive: Tensor) -> Tensor:
        return self._draw(t, drive / self.scale)

    def derivative(self, drive: Tensor) -> Tensor:
        return self.level.firing.slope(drive / self.scale) / self.scale
