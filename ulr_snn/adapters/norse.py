"""The adapter of Norse's cells and layers. Their own step functions run with another `threshold` function.

The step function that a module calls as `activation` is replaced by the same code with other globals, so that other
modules are not affected. Refractory counters pass through `threshold` too; for them it stays a step function.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from norse.torch import CobaLIFCell, LIFCorrelation
from norse.torch.functional.lif import lif_feed_forward_step, lif_step
from norse.torch.functional.lsnn import lsnn_feed_forward_step, lsnn_step
from norse.torch.module.snn import SNN, SNNCell, SNNRecurrent, SNNRecurrentCell
from torch import Tensor, nn
from torch.nn.functional import linear

from ulr_snn.adapters.base import Adapter, Step, StepNeuron
from ulr_snn.model.entry import Scaled, Synapse
from ulr_snn.model.neurons import LIF

FAMILIES = (SNN, SNNCell, SNNRecurrent, SNNRecurrentCell)
OTHERS = (CobaLIFCell, LIFCorrelation)
NOT_SUPPORTED = "this class does not call its step as the other cells do; use LIFRecurrentCell or another of them"
COUNTERS = "compute_refractory_update"  # the function that applies `threshold` to refractory counters, not membranes


class Layer(StepNeuron):
    """A neuron of Norse whose code decides on a spike in `threshold`."""

    @property
    def by_sequence(self) -> bool:
        return isinstance(self.module, SNN | SNNRecurrent)

    @property
    def threshold(self) -> Tensor:
        p = self.module.p
        p = getattr(p, "lif", None) or getattr(p, "lif_adex", None) or p
        rest = getattr(p, "v_reset", getattr(p, "c", 0.0))
        return torch.as_tensor(p.v_th) - torch.as_tensor(rest)

    def options(self) -> tuple[Any, ...]:
        return self.module.dt, self.module.activation, *((id(v), v._version) for v in tensors(self.module.p))

    def ours(self, like: Tensor) -> tuple[list[nn.Module], LIF] | str:
        module, p = self.module, self.module.p
        if module.activation is not lif_feed_forward_step:
            return "its equations are not those of a LIF neuron"
        if any(v.requires_grad for v in tensors(p)):
            return "it learns its parameters"
        share, decay = (torch.as_tensor(module.dt * rate).to(like) for rate in (p.tau_mem_inv, p.tau_syn_inv))
        if any(bool((v < 0).any() or (v > 1).any()) for v in (share, decay)):
            return "its time step is longer than a time constant"
        threshold, *rests = (torch.as_tensor(v).to(like) for v in (p.v_th, p.v_leak, p.v_reset))
        if bool((threshold <= 0).any()) or any(bool((v != 0).any()) for v in rests):
            return "it rests or resets elsewhere than at zero"
        ours = LIF.sharing(module, "zero", None, beta=1 - share, threshold=threshold)
        return [Scaled(share), Synapse(1 - decay)], ours

    def patches(self, site: Step) -> dict[str, Any]:
        run = written_out(self.module.activation, self.module.p, site.fire)
        run = run or rebound(self.module.activation, lambda x, method, alpha: site.fire(x))

        def activation(input_tensor: Tensor, *arguments: Any) -> Any:
            site.begin(input_tensor)
            spikes, state = run(input_tensor, *arguments)
            site.end(tensors(state))
            return spikes, state

        return {"activation": activation, "activation_sparse": None}


class _Numbers:
    """The parameters of the equations, which one pass computes once."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Tensor, ...]] = {}

    def __call__(self, p: Any, dt: float, like: Tensor) -> tuple[Tensor, ...]:
        """Returns the share of the current in the membrane, what a step leaves of a current, and the threshold; then,
        for thresholds that adapt, the share of this threshold and the jump."""
        key = id(p), dt, like.dtype, like.device
        if key not in self._known:
            found = [dt * p.tau_mem_inv, dt * p.tau_syn_inv, p.v_th]
            found += [dt * p.tau_adapt_inv, p.beta] if hasattr(p, "tau_adapt_inv") else []
            share, decay, *others = (torch.as_tensor(number).to(like) for number in found)
            self._known[key] = share, 1 - decay, *others
        return self._known[key]


def written_out(function: Callable[..., Any], p: Any, fire: Callable[[Tensor], Tensor]) -> Callable[..., Any] | None:
    """Returns an equivalent of Norse's LIF and LSNN step functions for one pass, with half of the operations. None for
    other functions, and for neurons that leak or reset to a value other than zero."""
    rests = [torch.as_tensor(getattr(p, name, 1.0)) for name in ("v_leak", "v_reset")]
    if any(r.requires_grad or bool((r != 0).any()) for r in rests):
        return None
    numbers = _Numbers()

    def charged(v: Tensor, i: Tensor, p: Any, dt: float) -> tuple[Tensor, Tensor, Tensor]:
        """Returns membranes, spikes and decayed currents."""
        share, kept, threshold, *_ = numbers(p, dt, i)
        v = torch.lerp(v.to(i), i, share)
        return v, fire(v - threshold), i * kept

    def adapted(state: Any, p: Any, dt: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns membranes, spikes, decayed currents and thresholds without the jump of this step."""
        share, kept, threshold, adapts, _ = numbers(p, dt, state.i)
        v, b = torch.lerp(state.v.to(state.i), state.i, share), torch.lerp(state.b.to(state.i), threshold, adapts)
        return v, fire(v - b), state.i * kept, b

    def lif(x: Tensor, state: Any, p: Any, dt: float = 0.001) -> tuple[Tensor, Any]:
        v, spikes, i = charged(state.v, state.i + x, p, dt)
        return spikes, type(state)(torch.addcmul(v, v, spikes, value=-1), i)

    def lif_recurrent(
        x: Tensor, state: Any, into: Tensor, within: Tensor, p: Any, dt: float = 0.001
    ) -> tuple[Tensor, Any]:
        v, spikes, i = charged(state.v, state.i + linear(x, into) + linear(state.z, within), p, dt)
        # Norse detaches the spikes of this reset, too.
        return spikes, type(state)(spikes, torch.addcmul(v, v, spikes.detach(), value=-1), i)

    def lsnn(x: Tensor, state: Any, p: Any, dt: float = 0.001) -> tuple[Tensor, Any]:
        v, spikes, i, b = adapted(state, p, dt)
        v, b = torch.addcmul(v, v, spikes, value=-1), torch.addcmul(b, spikes, numbers(p, dt, i)[-1])
        return spikes, type(state)(v=v, i=i + x, b=b)

    def lsnn_recurrent(
        x: Tensor, state: Any, into: Tensor, within: Tensor, p: Any, dt: float = 0.001
    ) -> tuple[Tensor, Any]:
        v, spikes, i, b = adapted(state, p, dt)
        fired, i = spikes.detach(), i + linear(x, into) + linear(state.z, within)  # as in Norse
        v, b = torch.addcmul(v, v, fired, value=-1), torch.addcmul(b, fired, numbers(p, dt, i)[-1])
        return spikes, type(state)(z=spikes, v=v, i=i, b=b)

    ours: dict[Any, Callable[..., Any]] = {
        lif_feed_forward_step: lif,
        lif_step: lif_recurrent,
        lsnn_feed_forward_step: lsnn,
        lsnn_step: lsnn_recurrent,
    }
    return ours.get(function)


def thresholds(function: Callable[..., Any]) -> bool:
    """Returns whether a step function, or a function that it calls, calls `threshold`."""
    return isinstance(function, FunctionType) and (
        "threshold" in function.__code__.co_names or any(thresholds(called) for called in calls(function).values())
    )


def calls(function: FunctionType) -> dict[str, FunctionType]:
    """Returns the functions of Norse, by name, that a function's code refers to."""
    found = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    return {
        name: f
        for name, f in found.items()
        if isinstance(f, FunctionType) and f.__module__.startswith("norse") and name != "threshold"
    }


def rebound(function: FunctionType, threshold: Callable[..., Any]) -> FunctionType:
    """Returns the same function with another `threshold`, also in the functions that it calls."""
    here = step_of if function.__name__ == COUNTERS else threshold
    names = {name: rebound(f, threshold) for name, f in calls(function).items() if thresholds(f)}
    scope = {**function.__globals__, **names, "threshold": here}
    same = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    same.__kwdefaults__ = function.__kwdefaults__
    return same


def step_of(x: Tensor, method: str, alpha: float) -> Tensor:
    """Replaces Norse's `threshold` where a spike is only counted."""
    return (x > 0).to(x.dtype)


def tensors(state: Any) -> list[Tensor]:
    """Returns the tensors of a state, which may be nested."""
    if isinstance(state, Tensor):
        return [state]
    return [tensor for part in state for tensor in tensors(part)] if isinstance(state, tuple | list) else []


def adapt(module: Any) -> StepNeuron | str | None:
    """Returns the module as a neuron, the reason why it cannot be trained, or None if it does not spike."""
    runs = next((kind.forward for kind in FAMILIES if isinstance(module, kind)), None)
    if runs is None:
        return NOT_SUPPORTED if isinstance(module, OTHERS) else None
    if type(module).forward is not runs:
        return NOT_SUPPORTED
    if "adjoint" in getattr(module.activation, "__name__", ""):
        return "its step has a backward pass of its own; use another method than 'adjoint'"
    return Layer(module) if thresholds(module.activation) else None  # a leaky integrator does not fire


ADAPTER = Adapter(adapt, carries_state=lambda model: type(model).__module__.startswith("norse"))
