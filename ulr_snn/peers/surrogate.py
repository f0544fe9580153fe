"""Backpropagation through time with a surrogate derivative of the spike, for ulr_snn's neurons and other libraries'.

`SurrogateBPTT` replaces `ULR` in `train`, with the same loop, optimizer and batches.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ulr_snn.adapters import StepNeuron
from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import Flag, Positive, check_fields, one_of
from ulr_snn.estimators.base import Estimate
from ulr_snn.kernels.reference import shift
from ulr_snn.losses.named import LossSpec
from ulr_snn.model.activity import counting
from ulr_snn.model.bound import BoundModel
from ulr_snn.model.call import check_outputs
from ulr_snn.model.interface import Interface
from ulr_snn.model.neurons import LIF, SpikingNeuron, heaviside, output_mask, step_mask
from ulr_snn.peers.attachment import PeerAttachment, averaged
from ulr_snn.sites.binding import Layers, bind_sites, check_layers, open_modules, spiking_layers


def atan_slope(drive: Tensor, a: float) -> Tensor:
    """Returns h'(d) = (a / 2) / (1 + (pi a d / 2)^2), the ATan of snnTorch, which has a = 2."""
    return drive.mul(math.pi / 2 * a).square_().add_(1).reciprocal_().mul_(a / 2)


def fast_sigmoid_slope(drive: Tensor, k: float) -> Tensor:
    """Returns h'(d) = 1 / (1 + k |d|)^2, the fast sigmoid of snnTorch, which has k = 25."""
    return drive.abs().mul_(k).add_(1).square_().reciprocal_()


FUNCTIONS = {"atan": atan_slope, "fast_sigmoid": fast_sigmoid_slope}


@dataclass(frozen=True)
class SurrogateBPTT:
    """Surrogate-gradient BPTT through time, layers and recurrent weights, with deterministic spikes.

    The options are for ulr_snn's neurons. Neurons of other libraries keep their own surrogate.
    function: surrogate derivative h' of the spike, for membrane minus threshold d:
        "atan":         h'(d) = (slope / 2) / (1 + (pi slope d / 2)^2)
        "fast_sigmoid": h'(d) = 1 / (1 + slope |d|)^2
    slope: positive; a larger slope makes h' narrower. The default is that of snnTorch's ATan.
    detach_reset: the reset passes no gradient, as in snnTorch (Zenke & Vogels 2021: learning suffers otherwise).
        The leak always passes gradients; with reset "zero" its factor 1 - s is a constant.
    """

    function: Annotated[str, one_of(*FUNCTIONS)] = "atan"
    slope: Positive = 2.0
    detach_reset: Flag = True

    def __post_init__(self) -> None:
        check_fields(self)

    def attach(
        self, model: nn.Module, loss: LossSpec, seed: int, interface: Interface, *_: Any, **__: Any
    ) -> "SurrogateAttachment":
        """Returns the attachment; see `Estimator.attach`. There is nothing random, so `seed` is not used."""
        return SurrogateAttachment(model, self, loss, interface)

    def derivative(self, drive: Tensor) -> Tensor:
        """Returns h'(d) for each d."""
        return FUNCTIONS[self.function](drive, self.slope)

    def fire(self, t: int, drive: Tensor) -> Tensor:
        """Returns the spikes of one time step."""
        return heaviside(t, drive)

    def fire_sequence(self, neuron: LIF, current: Tensor) -> Tensor:
        """Runs the neuron from current [T, B, ...] to spikes [T, B, ...], differentiable by the surrogate."""
        return differentiable_spikes(neuron, current, self)


def differentiable_spikes(neuron: LIF, current: Tensor, peer: Any) -> Tensor:
    """Runs the neuron from current [T, B, ...] to spikes [T, B, ...].

    peer: has `fire(t, drive)`, its surrogate `derivative(drive)`, and `detach_reset`.
    """
    mask = None if neuron.lengths is None else step_mask(neuron.lengths, current)
    weight = neuron.recurrent_weight(current)
    return _SurrogateScan.apply(current, neuron.beta.clamp(0, 1), neuron.threshold, weight, neuron, peer, mask)


class _SurrogateScan(torch.autograd.Function):
    """A layer over all time steps as one graph node. With gradients G of spikes, g of membranes u, J = current + V s:

        g_t = h'(d_t) (G_t + V^T g_{t+1} [- r_t g_{t+1}]) + beta k_t g_{t+1}

    where k = 1 - s for reset "zero", else 1. r is the threshold for reset "subtract" and beta u for "zero"; the term
    is left out if the reset is detached. Then dL/dJ = g.
    """

    @staticmethod
    def forward(
        ctx: Any, current: Any, beta: Any, threshold: Any, recurrent: Any, neuron: LIF, peer: Any, mask: Any
    ) -> Tensor:
        fire = peer.fire if mask is None else lambda t, drive: peer.fire(t, drive) * mask[t]
        spikes, drive, _ = neuron.run(current, fire)
        ctx.save_for_backward(beta, threshold, recurrent, spikes, drive, mask)
        ctx.reset, ctx.peer = neuron.reset, peer
        return spikes

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> tuple[Any, ...]:
        beta, threshold, recurrent, spikes, drive, mask = ctx.saved_tensors
        slope = ctx.peer.derivative(drive)
        if mask is not None:
            slope *= mask
        through_spikes = gradient * slope
        zero = ctx.reset == "zero"
        g = reverse_scan(
            through_spikes,
            slope,
            beta * (1 - spikes) if zero else beta.expand(len(spikes), *beta.shape),
            recurrent,
            None if ctx.peer.detach_reset else reset_effect(ctx.reset, beta, threshold, drive),
        )
        d_beta = d_threshold = d_recurrent = None
        if ctx.needs_input_grad[1]:
            before = (drive + threshold) * (1 - spikes) if zero else drive + threshold
            d_beta = (g * shift(before)).sum((0, 1)).sum_to_size(beta.shape)
        if ctx.needs_input_grad[2]:
            direct = -through_spikes - g * shift(spikes) if ctx.reset == "subtract" else -through_spikes
            d_threshold = direct.sum((0, 1)).sum_to_size(threshold.shape)
        if ctx.needs_input_grad[3]:
            d_recurrent = g[1:].flatten(0, 1).T @ spikes[:-1].flatten(0, 1)
        return g, d_beta, d_threshold, d_recurrent, None, None, None


def reset_effect(reset: str, beta: Tensor, threshold: Tensor, drive: Tensor) -> Tensor | None:
    """Returns by how much a spike at t lowers the membrane at t + 1, [T, 1 or B, ...]."""
    if reset == "none":
        return None
    if reset == "subtract":
        return threshold.expand(len(drive), *threshold.shape)
    return beta * (drive + threshold)


def reverse_scan(
    through_spikes: Tensor, slope: Tensor, carry: Tensor, recurrent: Tensor | None, lowered: Tensor | None
) -> Tensor:
    """Returns g [T, B, ...] of the equation in `_SurrogateScan`.

    through_spikes: G h' [T, B, ...], overwritten by all of g but its last term; slope: h'; carry: beta k [T, ...];
    recurrent: V [N, N]; lowered: r [T, ...], None if the reset is detached.
    """
    g = torch.empty_like(through_spikes)
    g[-1] = through_spikes[-1]
    for t in range(len(g) - 2, -1, -1):
        later, now = g[t + 1], through_spikes[t]
        if recurrent is not None:
            now.addcmul_(slope[t], later @ recurrent)
        if lowered is not None:
            now.addcmul_(slope[t] * lowered[t], later, value=-1)
        torch.addcmul(now, later, carry[t], out=g[t])
    return g


def check_gradient(value: Tensor, peer: Any) -> None:
    """Raises UsageError for a loss without a gradient."""
    if not value.requires_grad:
        raise UsageError(f"the loss has no gradient in the outputs, which {type(peer).__name__} needs")


class SurrogateAttachment(PeerAttachment):
    """Adds surrogate gradients to `.grad`. The model is bound only inside `backward`."""

    over_ranks = True

    def __init__(self, model: nn.Module, peer: Any, loss: LossSpec, interface: Interface) -> None:
        super().__init__(model, peer, loss, interface)
        self._bound: BoundModel | None = None  # of the last step
        layers = spiking_layers(model)
        check_layers(model, layers, open_modules(model))
        self._know(layers)

    def _know(self, layers: Layers) -> None:
        """Raises UsageError for layers that do not fit."""
        for name, neuron in layers:
            self.check(name, neuron)
        theirs = layers and all(isinstance(neuron, StepNeuron) for _, neuron in layers)
        if theirs and self.peer != SurrogateBPTT():
            raise UsageError(
                "SurrogateBPTT got options for a model of another library; give its neurons a surrogate there"
            )

    def check(self, name: str, neuron: SpikingNeuron | StepNeuron) -> None:
        """Raises UsageError for a layer that this peer does not know."""
        if isinstance(neuron, SpikingNeuron) and not isinstance(neuron, LIF):
            raise UsageError(
                f"{name} is a {type(neuron).__name__}; SurrogateBPTT knows only LIF, RecurrentLIF, and models of "
                "another library"
            )

    @averaged
    def backward(self, x: Any, targets: Any, loss: LossSpec | None = None, lengths: Tensor | None = None) -> Estimate:
        """Runs one forward pass and adds to every trainable `.grad`; see `Attachment.backward`."""
        bound, batch = self.begun(x, targets, loss, lengths)
        if bound is not self._bound:
            check_layers(self.model, bound.layers)
            self._know(bound.layers)
            self._bound = bound
        counts = batch.objective.counts
        counted = counting(self.model, bound.layers, counts, batch.steps, batch.samples, batch.lengths)
        sites = self.sites(bound.layers, batch.x)
        with torch.enable_grad(), bind_sites(self.model, sites, batch.lengths, bound.layers), counted as activity:
            outputs = bound.call.outputs(self.model, batch.x)
        check_outputs(outputs, batch.steps, batch.samples)
        with torch.enable_grad():
            value = batch.objective(outputs, batch.targets, output_mask(batch.lengths, outputs), activity)
        self.counted(value, batch.samples)
        check_gradient(value, self.peer)
        value.mean().backward()
        return Estimate(value.detach(), outputs.detach()[None], {"copies": 1, "step": self.step}, batch)

    def sites(self, layers: Layers, x: Tensor) -> list[Any]:
        """Returns the firing sites of this step, one for each layer; None for the layer's own firing."""
        return [None if isinstance(neuron, StepNeuron) else self.peer for _, neuron in layers]
