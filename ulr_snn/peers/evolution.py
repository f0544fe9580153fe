"""Evolution strategies (arXiv 1703.03864): the score of noise on all weights of the deterministic net.

Variance reduction is that of `ULR`: antithetic pairs and leave-one-out baselines. With one copy and a moving baseline
this is the one-point zeroth-order estimator. `RankOneNoise` makes low-rank draws (arXiv 2511.16652).
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.credit.baseline import baseline, moving
from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import Count, Flag, check_fields
from ulr_snn.estimators.base import Estimate
from ulr_snn.losses.named import LossSpec
from ulr_snn.model.call import generator_state, no_side_effects, set_generator_state
from ulr_snn.model.interface import Interface
from ulr_snn.model.neurons import output_mask
from ulr_snn.model.runner import Runner
from ulr_snn.noise.firing import Logistic
from ulr_snn.noise.kinds import WeightNoise
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.peers.attachment import PeerAttachment, averaged
from ulr_snn.sites.weights import WeightSites


@dataclass(frozen=True)
class RankOneNoise(WeightNoise):
    """Weight noise of rank one (arXiv 2511.16652): ζ = a b^T for a matrix [n, m, ...], a and b standard normal.

    This draws n + m numbers instead of n m. The gradient has a bias of order scale². Vectors are drawn in full.
    """

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Returns ζ for a parameter of this shape, in double precision."""
        if len(shape) < 2:
            return super().draw(shape, generator)
        a, b = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (shape[0], shape[1:].numel()))
        return torch.outer(a, b).view(shape)


@dataclass(frozen=True)
class EvolutionStrategies:
    """Evolution strategies (arXiv 1703.03864): deterministic firing, Gaussian noise on all trainable parameters.

    copies: number of weight draws in a step; antithetic: draws come in mirrored pairs, UsageError for odd `copies`;
    noise: scale and rank of the noise.
    """

    copies: Count = 8
    antithetic: Flag = True
    noise: WeightNoise = field(default_factory=WeightNoise)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.antithetic and self.copies % 2:
            raise UsageError(f"EvolutionStrategies got copies={self.copies}; use an even number, or antithetic=False")

    def attach(
        self, model: nn.Module, loss: LossSpec, seed: int, interface: Interface, *_: Any, **__: Any
    ) -> "EvolutionAttachment":
        """Returns the attachment; see `Estimator.attach`."""
        return EvolutionAttachment(model, self, loss, seed, interface)


class EvolutionAttachment(PeerAttachment):
    """Adds gradients by evolution strategies to `.grad`, from forward passes only."""

    over_ranks = True

    def __init__(
        self, model: nn.Module, peer: EvolutionStrategies, loss: LossSpec, seed: int, interface: Interface
    ) -> None:
        super().__init__(model, peer, loss, interface)
        names, self.seed = [name for name, q in model.named_parameters() if q.requires_grad], seed
        self.sites = WeightSites(dict.fromkeys(names, peer.noise), seed, peer.antithetic)
        self.mean_loss: Tensor | None = None

    @averaged
    @torch.no_grad()
    def backward(self, x: Any, targets: Any, loss: LossSpec | None = None, lengths: Tensor | None = None) -> Estimate:
        """Runs one forward pass for each copy and adds to every trainable `.grad`; see `Attachment.backward`."""
        bound, batch = self.begun(x, targets, loss, lengths)
        self.sites.seed = self.seed
        runner = Runner(bound, NoiseLevel(Logistic()))
        values, all_outputs, state = [], [], generator_state()
        for copy in range(self.peer.copies):
            # Only the first copy has side effects, as an ordinary pass; all copies see the same dropout masks.
            side_effects = no_side_effects(self.model) if copy else nullcontext()
            with side_effects, self.sites.disturbed(self.model, self.step, copy, batch.steps, batch.samples):
                if copy:
                    set_generator_state(state)
                ((outputs, activity),) = runner.runs(batch, self.step, 0, 0, batch.objective.counts)
            values.append(batch.objective(outputs, batch.targets, output_mask(batch.lengths, outputs), activity))
            all_outputs.append(outputs)
        losses = torch.stack(values)
        self.counted(losses, losses.numel())
        group = 2 if self.peer.antithetic else 1
        signals = losses - baseline(losses, list(range(len(losses))), group, self.mean_loss)
        self.sites.add_gradients(self.model, self.step - 1, signals)
        self.mean_loss = moving(self.mean_loss, losses)
        return Estimate(losses.mean(0), torch.stack(all_outputs), {"copies": len(losses), "step": self.step}, batch)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"mean_loss": self.mean_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        device = next(self.model.parameters()).device
        mean = state.get("mean_loss")
        self.mean_loss = None if mean is None else mean.to(device)
