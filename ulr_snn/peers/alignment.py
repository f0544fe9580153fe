"""Direct feedback alignment (arXiv 1609.01596): fixed random weights carry the output error to every layer.

The credit of a spike is a_t = B e_t with B fixed and random and e = ∂L/∂outputs. It is multiplied by the surrogate
derivative of the spike and the derivative of the membrane at fixed spikes. Layers after the last spike learn exactly.
"""

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.errors import UsageError
from ulr_snn.estimators.base import Estimate
from ulr_snn.losses.named import LossSpec
from ulr_snn.model.call import check_outputs
from ulr_snn.model.interface import Interface
from ulr_snn.model.neurons import LIF, heaviside, output_mask, step_mask
from ulr_snn.peers.attachment import PeerAttachment, averaged
from ulr_snn.peers.surrogate import SurrogateBPTT, check_gradient
from ulr_snn.sites.binding import bind_sites, check_layers, spiking_layers


@dataclass(frozen=True)
class FeedbackAlignment:
    """Direct feedback alignment (arXiv 1609.01596), for ulr_snn's neurons. neuron: gives the surrogate derivative."""

    neuron: SurrogateBPTT = field(default_factory=SurrogateBPTT)

    def attach(
        self, model: nn.Module, loss: LossSpec, seed: int, interface: Interface, *_: Any, **__: Any
    ) -> "AlignmentAttachment":
        """Returns the attachment; see `Estimator.attach`. seed: seed of the random weights."""
        return AlignmentAttachment(model, self, loss, seed, interface)


@dataclass
class _Layer:
    """A site that fires deterministically and keeps its drive, differentiable at fixed spikes."""

    name: str
    drive: Tensor | None = None
    mask: Tensor | None = None

    def fire_sequence(self, neuron: LIF, current: Tensor) -> Tensor:
        """Runs the neuron from current [T, B, ...] to spikes [T, B, ...]."""
        mask = self.mask = None if neuron.lengths is None else step_mask(neuron.lengths, current)
        fire = heaviside if mask is None else lambda t, drive: heaviside(t, drive) * mask[t]
        with torch.no_grad():
            spikes, drive, fed_back = neuron.run(current, fire)
        self.drive = neuron.drive_at(current, spikes, drive, fed_back)
        return spikes


class AlignmentAttachment(PeerAttachment):
    """Adds gradients by feedback alignment to `.grad`. The model is bound only inside `backward`."""

    over_ranks = True

    def __init__(
        self, model: nn.Module, peer: FeedbackAlignment, loss: LossSpec, seed: int, interface: Interface
    ) -> None:
        super().__init__(model, peer, loss, interface)
        self.seed = seed
        layers = spiking_layers(model)
        check_layers(model, layers)
        for name, neuron in layers:
            if not isinstance(neuron, LIF):
                raise UsageError(f"{name} is no LIF or RecurrentLIF; FeedbackAlignment knows only these")

    @averaged
    def backward(self, x: Any, targets: Any, loss: LossSpec | None = None, lengths: Tensor | None = None) -> Estimate:
        """Runs one forward pass and adds to every trainable `.grad`; see `Attachment.backward`."""
        bound, batch = self.begun(x, targets, loss, lengths)
        x, lengths, objective = batch.x, batch.lengths, batch.objective
        if objective.costs:
            raise UsageError("FeedbackAlignment knows no costs of activity; leave SpikeBudget out")
        layers = [_Layer(name) for name, _ in spiking_layers(self.model)]
        with torch.enable_grad(), bind_sites(self.model, layers, lengths):
            outputs = bound.call.outputs(self.model, x)
        check_outputs(outputs, x.shape[0], x.shape[1])
        cut = outputs.detach().requires_grad_()
        with torch.enable_grad():
            value = objective(cut, batch.targets, output_mask(lengths, outputs))
        self.counted(value, x.shape[1])
        check_gradient(value, self.peer)
        error = torch.autograd.grad(value.mean(), cut)[0]
        ends = [(outputs, error)] if outputs.requires_grad else []
        ends += [
            (drive, self._credit(layer, drive.detach(), error))
            for layer in layers
            if (drive := layer.drive) is not None
        ]
        ends = [(end, gradient) for end, gradient in ends if end.requires_grad]
        tensors, gradients = zip(*ends, strict=True)
        torch.autograd.backward(tensors, gradients)
        return Estimate(value.detach(), outputs.detach()[None], {"copies": 1, "step": self.step}, batch)

    def _credit(self, layer: _Layer, drive: Tensor, error: Tensor) -> Tensor:
        """Returns B e times the surrogate derivative, [T, B, ...]."""
        classes, neurons = error.shape[-1], drive[0, 0].numel()
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {layer.name}".encode()))
        weights = torch.randn(classes, neurons, generator=generator).to(drive) / classes**0.5
        credit = error.flatten(-1) @ weights  # [T, B, N], or [B, N] of outputs without a time axis
        if error.ndim < 3:
            credit = credit / len(drive)  # an error of the mean or the sum over time
            credit = credit.expand(len(drive), *credit.shape)
        return credit.view(drive.shape) * self.peer.neuron.derivative(drive) * (1 if layer.mask is None else layer.mask)
