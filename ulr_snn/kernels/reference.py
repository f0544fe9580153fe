"""The time scan of a layer of leaky integrate-and-fire neurons, in plain torch: the definition of the dynamics.

Membrane and drive at time t (spikes of time t-1 reset the membrane at time t):

    u_t = beta * k_{t-1} * u_{t-1} + J_t - r * s_{t-1}          d_t = u_t - threshold

    reset "subtract":  k = 1,            r = threshold
    reset "zero":      k_{t} = 1 - s_t,  r = 0
    reset "none":      k = 1,            r = 0

J is the input current, plus the recurrent current where a layer has one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ulr_snn.kernels import dispatch
from ulr_snn.kernels.state import State


def scan(
    current: Tensor,
    beta: Tensor,
    threshold: Tensor,
    reset: str,
    fire: Callable[[int, Tensor], Tensor],
    recurrent: Callable[[Tensor], Tensor] | None = None,
    state: State | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs a layer over time.

    current: [T, B, ...]; beta, threshold: broadcast against [B, ...].
    fire: (t, drive [B, ...]) -> spikes [B, ...], called once a step.
    recurrent: spikes of the previous step [B, ...] -> recurrent current [B, ...].
    state: state before the first step, which becomes the state after the last; None: the layer starts from rest.
    Returns spikes, drive and recurrent current (None without `recurrent`), each [T, B, ...].
    """
    membrane, spike = torch.zeros_like(current[0]), torch.zeros_like(current[0])
    if state is not None:
        membrane, spike = state.membrane.clone(), state.spikes.clone()
    spikes, drives, fed_back = [], [], []
    for t, total in enumerate(current.unbind()):
        if recurrent is not None:
            fed_back.append(recurrent(spike))
            total = total + fed_back[-1]
        kept = membrane * (1 - spike) if reset == "zero" else membrane
        membrane = beta * kept + total
        if reset == "subtract":
            membrane = membrane - threshold * spike
        drives.append(membrane - threshold)
        spike = fire(t, drives[-1])
        spikes.append(spike)
    if state is not None:
        state.membrane.copy_(membrane)
        state.spikes.copy_(spike)
    return torch.stack(spikes), torch.stack(drives), torch.stack(fed_back) if fed_back else None


def shift(sequence: Tensor) -> Tensor:
    """Shifts a sequence [T, ...] by one step. The first step becomes zero, and the last one is dropped."""
    return torch.cat([torch.zeros_like(sequence[:1]), sequence[:-1]])


def _sum_to(gradient: Tensor, like: Tensor) -> Tensor:
    """Sums a gradient [T, B, ...] to the shape of `like` (a scalar or [...])."""
    return gradient.sum((0, 1)).sum_to_size(like.shape)


class _LeakyDrive(torch.autograd.Function):
    """drive / scale as a differentiable function of current, beta and threshold **with the spikes held fixed**.

    Its backward pass is the reverse filter inside the neuron and uses no derivative of a spike.
    """

    @staticmethod
    def forward(
        ctx: Any, current: Any, beta: Any, threshold: Any, spikes: Any, x: Any, reset: str, scale: Any
    ) -> Tensor:
        if x is None:
            fire = lambda t, drive: torch.zeros_like(drive) if spikes is None else spikes[t]  # noqa: E731
            _, x, _ = scan(current, beta, threshold, reset, fire)
            x = x if scale is None else x / scale
        ctx.save_for_backward(beta, threshold, spikes, x, scale)
        ctx.reset = reset
        return x

    @staticmethod
    def backward(ctx: Any, credit: Any) -> tuple[Any, ...]:
        beta, threshold, spikes, x, scale = ctx.saved_tensors
        credit = credit if scale is None else credit / scale
        g = leaky_filter(credit, spikes, beta, ctx.reset)
        _, needs_beta, needs_threshold = ctx.needs_input_grad[:3]
        d_beta = d_threshold = None
        if needs_beta:
            before = (x if scale is None else x * scale) + threshold
            before = before * (1 - spikes) if ctx.reset == "zero" else before
            d_beta = _sum_to(g * shift(before), beta)
        if needs_threshold:
            d_threshold = -_sum_to(credit, threshold)
            if ctx.reset == "subtract":
                d_threshold = d_threshold - _sum_to(g * shift(spikes), threshold)
        return g, d_beta, d_threshold, None, None, None, None


def leaky_filter(c: Tensor, spikes: Tensor | None, beta: Tensor, reset: str) -> Tensor:
    """Returns g_t = c_t + beta k_t g_{t+1} [T, B, ...], which is ∂L/∂J for c = ∂L/∂u at fixed later membranes."""
    # Kernels have no derivative, so a filter that has to be differentiable uses torch's operations.
    done = None if torch.is_grad_enabled() and c.requires_grad else dispatch.leaky(c, spikes, beta, reset)
    if done is not None:
        return done
    carry = (beta * (1 - spikes)).unbind() if reset == "zero" and spikes is not None else (beta,) * len(c)
    g, reverse = torch.zeros_like(c[0]), []
    for t in range(len(c) - 1, -1, -1):
        g = c[t] + carry[t] * g
        reverse.append(g)
    return torch.stack(reverse[::-1])


def leaky_drive(
    current: Tensor,
    beta: Tensor,
    threshold: Tensor,
    reset: str = "none",
    spikes: Tensor | None = None,
    drive: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Returns the drive [T, B, ...], divided by `scale` if given, for given spikes (None: no spikes). It is
    differentiable in current, beta and threshold at fixed spikes.

    drive: the result, if it is already known; then it is not computed again.
    """
    return _LeakyDrive.apply(current, beta, threshold, spikes, drive, reset, scale)
