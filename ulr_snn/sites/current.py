"""The site that adds Gaussian noise to a module's input current."""

import torch
from torch import Tensor

from ulr_snn.errors import UsageError
from ulr_snn.kernels.precision import widened
from ulr_snn.model.neurons import spread_without_padding
from ulr_snn.noise.random import Noise
from ulr_snn.sites.records import CurrentRecord
from ulr_snn.sites.step import StepSite


class CurrentSite(StepSite):
    """The site of a black box (see `adapters.blackbox`). The box calls `disturb` and then `release`, once a time step
    or once for the whole sequence.

    measured: whether the layer is in its first pass, in which it runs without noise to calibrate the scale.
    """

    def _start(self, noise: Noise) -> None:
        scale = self.level.current_scale(self.name)
        self._scale = torch.tensor(scale, dtype=torch.float64, device=noise.sample.device)
        self.drawn: list[Tensor] = []

    def disturb(self, current: Tensor) -> Tensor:
        """Returns J + scale z, detached, for a current J [B, ...] or [T, B, ...]."""
        rows = () if self.noise is None else (len(self.noise.sample),)
        expected = (self.steps, *rows) if self.neuron.whole else rows
        if tuple(current.shape[: len(expected)]) != expected:
            raise UsageError(
                f"{self.name} got a current of shape {list(current.shape)}, not {list(expected)} and features"
            )
        self.begin(current)
        now = current.detach().clone()  # the module may change it in place
        if self.measured:
            self.trace.x.append(now.clone())
        if self.noise is None or self.measured:
            return now
        self._scale = self._scale.to(widened(current).dtype)
        steps, shape = (len(now), now.shape[2:]) if self.neuron.whole else (1, now.shape[1:])
        z = self.noise.normal(self.index, self.calls, steps, shape, widened(now).dtype)
        self.drawn.append(z if self.neuron.whole else z[0])
        self.trace.x.append(widened(current) / self._scale)
        return (now + self._scale * (z if self.neuron.whole else z[0])).to(current.dtype)

    def release(self, spikes: Tensor) -> Tensor:
        """Returns the module's output as an autograd leaf."""
        t, self.calls = self.calls, self.calls + (self.steps if self.neuron.whole else 1)
        spikes = spikes.detach()
        if not spikes.is_floating_point():
            spikes = spikes.to(torch.get_default_dtype())
        rows = spikes.shape[: 1 + self.neuron.whole]
        if self.noise is not None and tuple(rows) != ((self.steps,) * self.neuron.whole + (len(self.noise.sample),)):
            raise UsageError(f"{self.name} gave spikes of shape {list(spikes.shape)}; keep steps and samples in front")
        spikes = self._zero_padding(t, spikes, spikes).clone()
        if self.noise is None or self.measured:
            return spikes
        self.leaves.append(spikes.requires_grad_())
        self.trace.resets.append(spikes)
        self.trace.states.append([])
        return self.guard(spikes)

    def measure(self) -> None:
        current = self._joined(self.trace.x)
        self.level.current_scale(self.name, lambda: spread_without_padding(current, self._mask(current)))

    def record(self) -> CurrentRecord:
        return CurrentRecord(**vars(super().record()), z=self._joined(self.drawn))
