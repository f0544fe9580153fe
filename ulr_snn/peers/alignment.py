"""Direct feedback alignment: the error of the outputs reaches every layer by fixed random weights.

a_t = B e_t with B fixed and random, e = ∂L/∂outputs (arXiv 1609.01596), times the surrogate derivative of the spike and
the local derivative of the membrane at fixed spikes. What comes after the last spike learns by its exact gradient.
"""

import zlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ulr_snn.errors import UsageError
from ulr_snn.estimators.base import Estimate
from ulr_snn.losses.named import LossSpec
from ulr_snn.model.call import check_outputs, model_outputs
from ulr_snn.model.neurons import LIF, heaviside, output_mask, step_mask
from ulr_snn.peers.attachment import PeerAttachment
from ulr_snn.peers.surrogate import SurrogateBPTT, check_gradient
from ulr_snn.sites.binding import bind_sites, check_layers, spiking_layers


@dataclass(frozen=True)
class FeedbackAlignment:
    """Direct feedback alignment of models of our own neurons. neuron: whose derivative stands in for the spike's."""

    neuron: SurrogateBPTT = field(default_factory=SurrogateBPTT)

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
    ) -> "AlignmentAttachment":
        """What `train` steps with; see `Estimator.attach`. seed: of the random weights."""
        return AlignmentAttachment(model, self, loss, seed, time_first)


@dataclass
class _Layer:
    """A site that fires deterministically and keeps its drive, differentiable at fixed spikes."""

    name: str
    drive: Tensor | None = None

    def fire_sequence(self, neuron: LIF, current: Tensor) -> Tensor:
        """current [T, B, ...] -> spikes [T, B, ...]."""
        self.mask = None if neuron.lengths is None else step_mask(neuron.lengths, current)
        fire = heaviside if self.mask is None else lambda t, drive: heaviside(t, drive) * self.mask[t]
        with torch.no_grad():
            spikes, drive, fed_back = neuron.run(current, fire)
        self.drive = neuron.drive_at(current, spikes, drive, fed_back)
        return spikes


class AlignmentAttachment(PeerAttachment):
    """Adds gradients by feedback alignment to `.grad`. The model is bound only inside `backward`."""

    def __init__(self, model: nn.Module, peer: FeedbackAlignment, loss: LossSpec, seed: int, time_first: bool) -> None:
        super().__init__(model, peer, loss, time_first)
        self.seed = seed
        layers = spiking_layers(model)
        check_layers(model, layers)
        for name, neuron in layers:
            if not isinstance(neuron, LIF):
                raise UsageError(f"{name} is no LIF or RecurrentLIF; FeedbackAlignment knows these alone")

    def backward(
        self, x: Tensor, targets: Tensor, loss: LossSpec | None = None, lengths: Tensor | None = None
    ) -> Estimate:
        """One forward pass, then adds to every trainable `.grad`; see `SurrogateAttachment.backward`."""
        batch = self.begun(x, targets, loss, lengths)
        x, lengths, objective = batch.x, batch.lengths, batch.objective
        if objective.costs:
            raise UsageError("FeedbackAlignment knows no costs of activity; leave SpikeBudget out")
        layers = [_Layer(name) for name, _ in spiking_layers(self.model)]
        with torch.enable_grad(), bind_sites(self.model, layers, lengths):
            outputs = model_outputs(self.model, x)
        check_outputs(outputs, x.shape[0], x.shape[1])
        cut = outputs.detach().requires_grad_()
        with torch.enable_grad():
            value = objective(cut, batch.targets, output_mask(lengths, outputs))
        self.counted(value, x.shape[1])
        check_gradient(value, self.peer)
        error = torch.autograd.grad(value.mean(), cut)[0]
        ends = [(outputs, error)] if outputs.requires_grad else []
        ends += [(layer.drive, self._credit(layer, error)) for layer in layers if layer.drive is not None]
        ends = [(end, gradient) for end, gradient in ends if end.requires_grad]
        torch.autograd.backward(*map(list, zip(*ends, strict=True)))
        return Estimate(value.detach(), outputs.detach()[None], {"copies": 1, "step": self.step})

    def _credit(self, layer: _Layer, error: Tensor) -> Tensor:
        """B e times the surrogate derivative, [T, B, ...]."""
        drive = layer.drive.detach()
        classes, neurons = error.shape[-1], drive[0, 0].numel()
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {layer.name}".encode()))
        weights = torch.randn(classes, neurons, generator=generator).to(drive) / classes**0.5
        credit = error.flatten(-1) @ weights  # [T, B, N], or [B, N] of outputs without a time axis
        if error.ndim < 3:
            credit = credit / len(drive)  # an error of the mean or the sum over time
            credit = credit.expand(len(drive), *credit.shape)
        return credit.view(drive.shape) * self.peer.neuron.derivative(drive) * (1 if layer.mask is None else layer.mask)
