"""Weight noise. A copy runs with W + σ ζ instead of a parameter W, and the gradient uses the score ζ / σ:

    g_W = mean over copies of (L - b) ζ / σ,    L: the mean loss of the copy's batch, b: its baseline

This is the gradient of the expected loss over ζ at fixed σ (arXiv 2305.08960). For antithetic pairs it is
(L⁺ - L⁻) ζ / 2σ. With `per_sample` every sample has its own noise, and its own loss is the signal (flipout.py).
"""

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.errors import UsageError
from ulr_snn.kernels import ranks
from ulr_snn.noise.kinds import CurrentNoise, WeightNoise
from ulr_snn.sites.binding import inside
from ulr_snn.sites.flipout import Flips, check_by_sample, disturbed_by_row, flips

SOURCE = "weight noise"  # in `Structure.parameters`
FAR = 10.0  # distance, in scales, by which a parameter is moved to test whether the outcome depends on it


@dataclass
class WeightSites:
    """The parameters with weight noise, by name. Draws are keyed by seed, step, stream of the copy, and name."""

    sites: dict[str, WeightNoise]
    seed: int
    antithetic: bool

    def draw(self, name: str, parameter: Tensor, step: int, copy: int) -> Tensor:
        """Draws ζ in the shape of the parameter. The second copy of a pair gets -ζ of the first."""
        stream, sign = (copy // 2, 1 - 2 * (copy % 2)) if self.antithetic else (copy, 1)
        generator = torch.Generator()
        generator.manual_seed(zlib.crc32(f"{self.seed} {step} {stream} {name}".encode()))
        zeta = self.sites[name].draw(parameter.shape, generator)
        return sign * zeta.to(parameter.device, parameter.dtype)

    def _flips(self, name: str, q: Tensor, step: int, copy: int, rows: int) -> Flips:
        """Draws ζ and signs for a parameter with per-sample noise. The copies of a pair share the signs."""
        stream = copy // 2 if self.antithetic else copy
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {step} {stream} {name} signs".encode()))
        return flips(self.draw(name, q, step, copy), rows, generator)

    @contextmanager
    def disturbed(self, model: nn.Module, step: int, copy: int, steps: int, rows: int) -> Iterator[None]:
        """Within this context, the model has this copy's weights, for a pass of `rows` samples over `steps` steps."""
        moved, by_row = {}, {}
        for name, q in parameters_of(model, self.sites).items():
            scale = scale_of(self.sites[name], q)
            if self.sites[name].per_sample:
                by_row[name] = self._flips(name, q.detach(), step, copy, rows).scaled(scale)
            else:
                moved[name] = q.detach() + scale * self.draw(name, q, step, copy)
        with replaced_parameters(model, moved), disturbed_by_row(model, by_row, steps):
            yield

    def add_gradients(self, model: nn.Module, step: int, signals: Tensor) -> None:
        """Adds the gradients to `.grad`. signals: losses minus baselines of the copies [K, B]."""
        found = self.gradients(model, step, signals)
        for name, q in parameters_of(model, self.sites).items():
            q.grad = found[name] if q.grad is None else q.grad + found[name]

    def gradients(self, model: nn.Module, step: int, signals: Tensor) -> dict[str, Tensor]:
        """Returns the gradients by parameter. signals: losses minus baselines of the copies [K, B]."""
        gradients = {}
        for name, q in parameters_of(model, self.sites).items():
            noise, found = self.sites[name], torch.zeros_like(q)
            for copy, signal in enumerate(signals.to(q.dtype)):
                if noise.per_sample:
                    found += self._flips(name, q.detach(), step, copy, len(signal)).gradient(signal)
                else:
                    found += signal.mean() * self.draw(name, q, step, copy)
            gradients[name] = found / (len(signals) * scale_of(noise, q))
        return gradients


def parameters_of(model: nn.Module, names: Collection[str]) -> dict[str, nn.Parameter]:
    """Returns the parameters with these names."""
    return {name: q for name, q in model.named_parameters() if name in names}


def scale_of(noise: WeightNoise, parameter: Tensor) -> float:
    """Returns σ for the parameter's current values."""
    if noise.scale is not None:
        return noise.scale
    size = parameter.detach().double().square().mean().sqrt().item()
    return noise.relative * (size or 1.0)


@contextmanager
def replaced_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within this context, these tensors replace the parameters with these names in all modules that share them."""
    by_id = {id(q): tensors[name] for name, q in model.named_parameters() if name in tensors}
    holders: list[dict[str, Any]] = [module._parameters for module in model.modules()]
    places = [(holder, key, q) for holder in holders for key, q in holder.items() if id(q) in by_id]
    try:
        for holder, key, q in places:
            holder[key] = by_id[id(q)]
        yield
    finally:
        for holder, key, q in places:
            holder[key] = q


def choose(
    model: nn.Module, noise: Mapping[str, Any], untrained: list[str], outcome: Callable[[], Tensor]
) -> dict[str, WeightNoise]:
    """Chooses the parameters that get weight noise.

    `noise` names some of them, by their own name or a module's. The others are the `untrained` parameters, which no
    gradient reaches, unless `noise` names them otherwise or they do not affect the outcome. outcome: runs a pass,
    always with the same noise, and returns its result.
    """
    trainable = {name: q for name, q in model.named_parameters() if q.requires_grad}
    found: dict[str, WeightNoise] = {}
    for key, site in noise.items():
        if isinstance(site, WeightNoise):
            found |= {name: site for name in trainable if named(name, [key])}
    for name, site in found.items():
        if site.per_sample:
            check_by_sample(model, name)
    unchanged = None
    for name in untrained:
        if name in found or named(name, [key for key, site in noise.items() if not isinstance(site, CurrentNoise)]):
            continue
        unchanged = outcome() if unchanged is None else unchanged
        q = trainable[name]
        with replaced_parameters(model, {name: q.detach() + FAR * scale_of(WeightNoise(), q)}):
            if ranks.anywhere(not torch.equal(outcome(), unchanged))[0]:
                found[name] = WeightNoise()
    return found


def named(name: str, keys: list[str]) -> bool:
    """Returns whether one of the keys is the name of a parameter or module, or of a module that holds it."""
    return any(inside(name, key) for key in keys)


def check_names(model: nn.Module, noise: Mapping[str, Any]) -> None:
    """Raises UsageError for a name in `noise` that the model does not have, or for noise of the wrong kind."""
    modules = {name for name, _ in model.named_modules() if name}
    trainable = [name for name, q in model.named_parameters() if q.requires_grad]
    for key, site in noise.items():
        if key == "outputs" and not isinstance(site, CurrentNoise | WeightNoise):
            continue  # "outputs" means the model's outputs, even if a module has this name
        if isinstance(site, CurrentNoise) and key not in modules:
            raise UsageError(f"ULR got current noise for {key!r}, which is no module of the model; see named_modules()")
        if not isinstance(site, CurrentNoise) and not any(named(name, [key]) for name in trainable):
            raise UsageError(f"ULR got noise for {key!r}, which names no trainable parameter, nor a module with one")
