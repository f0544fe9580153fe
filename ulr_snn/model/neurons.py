"""Neurons of `ulr_snn` on whole sequences [T, B, ...]: LIF, RecurrentLIF, LeakyReadout, and small modules for time."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import Count, Flag, Leak, Threshold, checked, one_of
from ulr_snn.kernels import dispatch, ranks
from ulr_snn.kernels.pool import traced
from ulr_snn.kernels.precision import full_precision, widened
from ulr_snn.kernels.reference import leaky_drive, scan
from ulr_snn.kernels.sparse import product
from ulr_snn.kernels.state import RESETS, State
from ulr_snn.kernels.stateless import run
from ulr_snn.noise.random import Drawer

Reset = Annotated[str, one_of(*RESETS)]


class Timed(nn.Module):
    """A module that runs over time. While it is bound, steps past `lengths` [B] are padding."""

    lengths: Tensor | None = None


def check_sequence(module: nn.Module, current: Tensor) -> None:
    """Raises UsageError unless current is a floating-point sequence [T, B, ...]."""
    if current.ndim < 3 or not current.is_floating_point():
        raise UsageError(
            f"{type(module).__name__} got {current.dtype} of shape {tuple(current.shape)}; "
            "it takes a floating-point sequence [T, B, ...]"
        )


def check_features(module: nn.Module, current: Tensor, *names: str) -> None:
    """Raises UsageError unless these tensors of the module broadcast against the features of a current [T, B, ...]."""
    if traced():  # a size is no number
        return
    features = current.shape[2:]
    for name in names:
        shape = getattr(module, name).shape
        own = shape[max(0, len(shape) - len(features)) :]
        if any(n not in (1, size) for n, size in zip(reversed(own), reversed(features), strict=False)):
            raise UsageError(
                f"{type(module).__name__} has a {name} of shape {tuple(shape)}, but its current has the features "
                f"{tuple(features)}; give it one number, or one for each neuron"
            )


Fire = Callable[[int, Tensor], Tensor]  # spikes from the time step and the drive
Outcome = tuple[Tensor, Tensor, Tensor | None]  # spikes, drive and recurrent current of a pass over time


class FiringSite(Protocol):
    """A site that draws the spikes of a neuron."""

    def fire_sequence(self, neuron: "SpikingNeuron", current: Tensor) -> Tensor: ...


class SpikingNeuron(Timed):
    """A neuron layer with all that a firing site needs. Unbound (`site` is None) it fires deterministically."""

    site: FiringSite | None = None
    reset: str
    beta: Tensor
    threshold: Tensor

    def run(self, current: Tensor, fire: Fire, state: State | None = None) -> Outcome:
        """Returns spikes, drive and recurrent current of one pass over time (see `ulr_snn.kernels.scan`)."""
        raise NotImplementedError

    def drive_at(self, current: Tensor, spikes: Tensor, drive: Tensor, fed_back: Tensor | None) -> Tensor:
        """Returns the known drive, differentiable in current and parameters with the spikes held fixed."""
        raise NotImplementedError

    def fired(
        self, current: Tensor, drawer: Drawer | None = None, state: State | None = None, known: Tensor | None = None
    ) -> Outcome:
        """Returns spikes, standardised drive and recurrent current of one pass over time, from a state on. Nothing
        fires on padding. Without a drawer, the drive is not standardised. known: spikes to use instead of drawing
        them."""
        mask = None if self.lengths is None else step_mask(self.lengths, current)

        def fire(t: int, drive: Tensor) -> Tensor:
            if known is not None:
                return known[t]
            spikes = heaviside(t, drive) if drawer is None else drawer(t, drive / drawer.scale)
            return spikes if mask is None else spikes * mask[t]

        spikes, drive, fed_back = self.run(current, fire, *() if state is None else (state,))
        return spikes, drive if drawer is None else drive / drawer.scale, fed_back

    def x_at(
        self,
        current: Tensor,
        spikes: Tensor,
        x: Tensor,
        fed_back: Tensor | None,
        scale: Tensor,
        before: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the known standardised drive, differentiable as in `drive_at` and in the scale. Also returns an
        autograd handle for the total current, whose values are undefined, if no parameter other than currents and the
        leak affects the drive; else None. before: spikes of the step before the first, if there is one."""
        return self.drive_at(current, spikes, x * scale.detach(), fed_back) / scale, None

    def forward(self, current: Tensor) -> Tensor:
        """Fires on a current [T, B, ...]. Returns spikes [T, B, ...], 0 or 1 in the current's dtype. Membranes are
        summed in single precision at least."""
        check_sequence(self, current)
        check_features(self, current, "beta", "threshold")
        with full_precision():
            wide = widened(current)
            if self.site is not None:
                return self.site.fire_sequence(self, wide).to(current.dtype)
            with torch.no_grad():
                return self.fired(wide)[0].to(current.dtype)


def heaviside(t: int, drive: Tensor) -> Tensor:
    """Fires deterministically: a spike where the membrane exceeds the threshold (strictly)."""
    return (drive > 0).to(drive.dtype)


def _parameter(module: nn.Module, name: str, value: float | Tensor, learn: bool) -> None:
    value = torch.as_tensor(value, dtype=torch.get_default_dtype()).clone()
    if learn:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value)


class LIF(SpikingNeuron):
    """Leaky integrate-and-fire neurons.

        u_t = beta u_{t-1} + I_t - threshold s_{t-1}      reset "subtract"
        u_t = beta (1 - s_{t-1}) u_{t-1} + I_t            reset "zero"
        u_t = beta u_{t-1} + I_t                          reset "none"
        s_t = 1 if u_t > threshold else 0                 deterministic firing
        s_t ~ Bernoulli(F((u_t - threshold) / scale))     stochastic firing; F: logistic or Gaussian (`ULR.firing`)

    beta: leak per step, from 0 to 1; a learned leak is clamped to [0, 1]. threshold: in units of the membrane. Both are
    a number or a tensor that broadcasts against one time step's features [...], and learn with learn_beta and
    learn_threshold.
    The input is a current [T, B, ...]; the output has the same shape. Every sequence starts from u = 0.
    Raises UsageError for an unknown reset, a leak outside 0 to 1, or a threshold that is not positive.
    """

    recurrent: "nn.Module | Weighted | None"
    learns_recurrence = True  # whether feedback through recurrent weights may be learned; else the weights are read

    @checked
    def __init__(
        self,
        beta: Leak = 0.9,
        threshold: Threshold = 1.0,
        reset: Reset = "subtract",
        learn_beta: Flag = False,
        learn_threshold: Flag = False,
    ) -> None:
        super().__init__()
        self.reset = reset
        self.register_module("recurrent", None)
        _parameter(self, "beta", beta, learn_beta)
        _parameter(self, "threshold", threshold, learn_threshold)

    @classmethod
    def sharing(cls, module: nn.Module, reset: str, recurrent: "Weighted | None" = None, **values: Tensor) -> "LIF":
        """Makes neurons with the equations above that share the parameters of another library's module. Both share the
        dictionaries of parameters, so that a tensor moved or replaced in one is so in the other. values: `beta` and
        `threshold`, where the module has no such tensors."""
        neuron = cls(reset=reset)
        shared: dict[str, Any] = {name: getattr(module, name) for name in ("_parameters", "_buffers", "_modules")}
        neuron.__dict__.update(shared, recurrent=recurrent, learns_recurrence=False, **values)
        return neuron

    def run(self, current: Tensor, fire: Fire, state: State | None = None) -> Outcome:
        weight = self.recurrent_weight(current)
        fed_back = None if weight is None else partial(linear, weight=weight)
        return scan(current, self.beta.clamp(0, 1), self.threshold, self.reset, fire, fed_back, state)

    def recurrent_weight(self, current: Tensor) -> Tensor | None:
        """Returns V in the precision of the current, or None. Raises UsageError if it is no Linear without a bias."""
        recurrent = self.recurrent
        if recurrent is None:
            return None
        if not isinstance(recurrent, Weighted) and not (isinstance(recurrent, nn.Linear) and recurrent.bias is None):
            raise UsageError(
                f"RecurrentLIF.recurrent is {type(recurrent).__name__}; it has to be a Linear without a bias"
            )
        if not isinstance(recurrent, Weighted) and not isinstance(recurrent.weight, nn.Parameter):
            recurrent(current.new_zeros(0, recurrent.in_features))  # hooks of pruning and norms make the weights anew
        return recurrent.weight.to(current.dtype)

    def fired(
        self, current: Tensor, drawer: Drawer | None = None, state: State | None = None, known: Tensor | None = None
    ) -> Outcome:
        draw = None if drawer is None else drawer.draw(words=known is None)
        done = None
        if type(self) in (LIF, RecurrentLIF) and (drawer is None or draw is not None):
            leak = self.beta.clamp(0, 1), self.threshold, self.reset
            done = dispatch.scan(current, self.recurrent_weight(current), *leak, draw, self.lengths, state, known)
        return super().fired(current, drawer, state, known) if done is None else done

    def _total(self, current: Tensor, spikes: Tensor, fed_back: Tensor | None, before: Tensor | None = None) -> Tensor:
        """Returns an autograd handle for the sum of input and recurrent current. Its values are undefined."""
        return current if fed_back is None else _Total.apply(current, self.recurrent_weight(current), spikes, before)

    def drive_at(self, current: Tensor, spikes: Tensor, drive: Tensor, fed_back: Tensor | None) -> Tensor:
        total = self._total(current, spikes, fed_back)
        return leaky_drive(total, self.beta.clamp(0, 1), self.threshold, self.reset, spikes, drive)

    def x_at(
        self,
        current: Tensor,
        spikes: Tensor,
        x: Tensor,
        fed_back: Tensor | None,
        scale: Tensor,
        before: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if scale.requires_grad:
            return super().x_at(current, spikes, x, fed_back, scale)
        total = self._total(current, spikes, fed_back, before)
        x = leaky_drive(total, self.beta.clamp(0, 1), self.threshold, self.reset, spikes, x, scale)
        return x, None if self.threshold.requires_grad else total

    def extra_repr(self) -> str:
        return f"beta={_show(self.beta)}, threshold={_show(self.threshold)}, reset={self.reset!r}"


def _show(value: Tensor) -> str:
    return f"{value.item():g}" if value.numel() == 1 else f"[{value.numel()}]"


class RecurrentLIF(LIF):
    """LIF neurons with all-to-all recurrent weights: I_t in the equations of `LIF` becomes I_t + V s_{t-1}.

    features: number of neurons N. Current and spikes are [T, B, N]. V is `recurrent.weight` [N, N], without a bias.
    """

    @checked
    def __init__(
        self,
        features: Count,
        beta: Leak = 0.9,
        threshold: Threshold = 1.0,
        reset: Reset = "subtract",
        learn_beta: Flag = False,
        learn_threshold: Flag = False,
    ) -> None:
        super().__init__(beta, threshold, reset, learn_beta, learn_threshold)
        self.recurrent = nn.Linear(features, features, bias=False)


class _Total(torch.autograd.Function):
    """The derivative of J_t + V s_{t-1} with respect to J and V (nothing flows through spikes). Operations on the
    result know their own values, so that no values are computed or kept here."""

    @staticmethod
    def forward(ctx: Any, current: Tensor, weight: Tensor, spikes: Tensor, before: Tensor | None) -> Tensor:
        ctx.save_for_backward(spikes, before)
        return current.new_zeros(()).expand(current.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        spikes, before = ctx.saved_tensors
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = product(g[1:].flatten(0, 1), spikes[:-1].flatten(0, 1))
            if before is not None:
                d_weight.addmm_(g[0].T, before)
        return g, d_weight, None, None


class Weighted:
    """The weights of another library's recurrent module, without its bias; `entry.Biased` adds it to the current."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module

    @property
    def weight(self) -> Tensor:
        return self.module.weight


class LeakyReadout(Timed):
    """Non-spiking leaky integrators u_t = beta u_{t-1} + I_t: current [T, B, ...] -> membranes [T, B, ...].

    A sample that is shorter than T keeps its last membrane through the padding.
    """

    beta: Tensor

    @checked
    def __init__(self, beta: Leak = 0.9, learn_beta: Flag = False) -> None:
        super().__init__()
        _parameter(self, "beta", beta, learn_beta)

    def forward(self, current: Tensor, before: Tensor | None = None) -> Tensor:
        """Integrates a current. before: membranes [B, ...] of the step before the first; None: zero."""
        check_sequence(self, current)
        check_features(self, current, "beta")
        with full_precision():
            return self._integrated(widened(current), before).to(current.dtype)

    def _integrated(self, current: Tensor, before: Tensor | None) -> Tensor:
        beta = self.beta.clamp(0, 1)
        if before is not None:
            current = torch.cat([current[:1] + beta * before, current[1:]])
        membrane = integrated(current, beta)
        if self.lengths is None:
            return membrane
        steps = torch.arange(len(current), device=current.device)[:, None]
        last = torch.minimum(steps, (self.lengths[None] - 1).clamp(min=0))
        return membrane.gather(0, shaped(last, current).expand_as(membrane))


def integrated(current: Tensor, beta: Tensor) -> Tensor:
    """Returns the leaky sums u_t = beta u_{t-1} + I_t [T, B, ...] of a current."""
    zero = torch.zeros_like(beta)
    with torch.no_grad():
        done = dispatch.scan(current, None, beta, zero, "none", None, None)
    return leaky_drive(current, beta, zero, drive=None if done is None else done[1])


class TimeAverage(Timed):
    """Takes the mean over time, [T, B, ...] -> [B, ...], without padding where lengths are given."""

    def forward(self, sequence: Tensor) -> Tensor:
        if self.lengths is None:
            if sequence.dtype == torch.float16:  # its sum may overflow
                return sequence.mean(0)
            return sequence.sum(0) / sequence.shape[0]  # the gradient of mean() takes the memory of a whole sequence
        mask = step_mask(self.lengths, sequence)
        return (sequence * mask).sum(0) / self.lengths.to(sequence.dtype).view(mask.shape[1:])


class Fold(nn.Sequential):
    """Applies stateless modules to all time steps at once: folds [T, B, ...] to [T*B, ...], and unfolds the result."""

    def forward(self, sequence: Tensor) -> Tensor:
        x = sequence.flatten(0, 1)
        for module in self:
            x = run(module, x)
        return x.unflatten(0, sequence.shape[:2])


def step_mask(lengths: Tensor, sequence: Tensor) -> Tensor:
    """Returns 1 on a sample's own steps and 0 on padding, [T, B, 1, ...] in the dtype of `sequence` [T, B, ...]."""
    steps = torch.arange(len(sequence), device=sequence.device)[:, None]
    mask = (steps < lengths[None].to(sequence.device)).to(sequence.dtype)
    return shaped(mask, sequence)


def zero_padding(x: Tensor, t: int, lengths: Tensor | None, whole: bool) -> Tensor:
    """Sets x [B, ...] of time step t to zero on padding. whole: x is [T, B, ...], of all steps."""
    if lengths is None:
        return x
    return x * (step_mask(lengths, x) if whole else (t < lengths).to(x).view(-1, *[1] * (x.ndim - 1)))


def shaped(rows: Tensor, like: Tensor) -> Tensor:
    """Reshapes [T, B] to [T, B, 1, ...], which broadcasts against [T, B, ...]."""
    return rows.view(*rows.shape, *[1] * (like.ndim - 2))


def spread_without_padding(sequence: Tensor, mask: Tensor | None) -> float:
    """Returns the standard deviation of a whole sequence [T, B, ...] without padding."""
    own = sequence if mask is None else sequence[mask.bool().expand_as(sequence)]
    return ranks.std(own).item()


def output_mask(lengths: Tensor | None, outputs: Tensor) -> Tensor | None:
    """Returns the step mask of a model's outputs, or None if they have no time axis or there is no padding."""
    return step_mask(lengths, outputs) if lengths is not None and outputs.ndim >= 3 else None
