"""The formula that turns scores and credits into gradients.

For every weight W that feeds neuron i at time t (unified likelihood ratio, arXiv 2305.08960, and a control variate a):

    g_W = sum_{i,t} c_it ∂x_it/∂W |spikes fixed
    c_it = λ (L - b - sum_{j,t'} a_jt' ε_jt') δ_it + a_it p'_it

L is the loss of the sample and copy, b a baseline, ε = s - p the innovation of a spike, δ = ∂ log P(s)/∂x its score,
a the prediction of ∂L/∂s. Whole sequences, chunks of time and online learning call the same code. If λ is 0,
firing may replace p' by secants of the distribution (noise/secant.py). Two gradients are made elsewhere: of a pass
whose maps are all known products, where autograd carries a p' from layer to layer (credit/linked.py), and of noise on
weights, whose score is that of the weights (sites/weights.py).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ulr_snn.credit.base import Credit
from ulr_snn.credit.baseline import baseline, multi_sample_signals, multi_sample_weights, to_go
from ulr_snn.credit.kinds import CreditKind
from ulr_snn.losses.evaluation import LossEvaluation
from ulr_snn.model.passes import Group, Pass
from ulr_snn.sampling.kinds import Sampling
from ulr_snn.sites.records import Record


class PassLike(Protocol):
    """The part of a pass, or of a time chunk, that credit and the formula use. See `Pass`."""

    copies: list[int]
    records: list[Record]
    linked: bool

    @property
    def ends(self) -> Sequence[tuple[Tensor, Tensor]]: ...
    @property
    def error(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Contribution:
    """A gradient and the tensor at which it enters the graph. site: the site whose current or drive the tensor is, or
    None for the outputs. copies: the copies of its rows, or None for the exact gradient at the outputs. by_score: the
    gradient is the summand of the score. of_loss: the tensor is a loss that reads parameters besides the outputs."""

    tensor: Tensor
    gradient: Tensor
    site: str | None = None
    copies: list[int] | None = None
    by_score: bool = False
    of_loss: bool = False


@dataclass(frozen=True)
class Formula:
    """Computes the coefficients c of a step's passes. noiseless: sites without noise. gradientless: some losses have no
    gradient in the outputs. mean_loss, mean_gradientless: moving baselines of all losses together, and of the losses
    without a gradient."""

    credit: CreditKind
    sampling: Sampling
    noiseless: frozenset[str]
    gradientless: bool
    mean_loss: Tensor | None
    mean_gradientless: Tensor | None

    def of_group(self, group: Group, predictions: list[list[Credit]], exact_fraction: float) -> Iterator[Contribution]:
        """Yields the contributions of all passes of a group. predictions: one for each pass and record. exact_fraction:
        the group's share of the exact gradient."""
        losses = group.losses
        mixed = self.sampling.multi_sample
        sample_weights = (
            multi_sample_weights(losses * group.passes[0].evaluation.share) if mixed else torch.ones_like(losses)
        )
        for p, predicted in zip(group.passes, predictions, strict=True):
            weight = sample_weights[p.copies].flatten() / losses.numel()  # [rows]
            signal = self.signal(group, p, predicted) if self.credit.unbiased or self.gradientless else None
            yield from self.contributions(p, predicted, weight, signal, losses.numel(), exact_fraction, group.site)
            for loss in p.evaluation.others:
                yield Contribution(loss, (weight * exact_fraction).to(loss.dtype), of_loss=True)

    def contributions(
        self,
        p: PassLike,
        predicted: list[Credit],
        weight: Tensor,
        signal: Tensor | None = None,
        count: int = 1,
        exact_fraction: float = 1.0,
        varied: str | None = None,
    ) -> Iterator[Contribution]:
        """Yields the two summands of c at each site, and the exact gradient at the outputs. weight [rows]: weight of
        each row in the mean over samples and copies. signal: weight of scores, [rows] or, by time step, [rows, T], in a
        mean over `count`. varied: the only site whose noise differs, if there is one."""
        for record, credit in self.sites(p, predicted, varied):
            if not record.x.requires_grad:
                continue
            if signal is not None:
                in_time = signal.T if signal.ndim == 2 else signal[None]
                by_row = in_time.unflatten(-1, (-1, *[1] * (record.x.ndim - 2)))
                yield Contribution(record.x, record.score() * by_row / count, record.site, p.copies, True)
            rows = weight.view(-1, *[1] * (record.x.ndim - 2))
            if record.current_handle is not None and credit.current is not None:
                current = credit.current.mul_(rows)  # in place, since nothing uses it again
                yield Contribution(record.current_handle, current, record.site, p.copies)
            elif credit.a is not None:
                slope = record.slope if self.credit.unbiased else record.response
                yield Contribution(record.x, credit.a * slope * rows, record.site, p.copies)
        for end, gradient in p.ends:  # the exact path passes no spike
            if end.requires_grad:
                rows = weight.view(-1, *[1] * (end.ndim - (2 if end.ndim >= 3 else 1)))
                yield Contribution(end, gradient * rows * exact_fraction)

    def sites(self, p: PassLike, predicted: list[Credit], varied: str | None) -> list[tuple[Record, Credit]]:
        """Returns the records at which noise was drawn, with their predictions. A linked pass has none, because there
        autograd carries credit from the ends."""
        pairs = zip(p.records, predicted, strict=not p.linked)
        return [(r, credit) for r, credit in pairs if varied in (None, r.site) and r.site not in self.noiseless]

    def signal(self, group: Group, p: Pass, predicted: list[Credit]) -> Tensor:
        """Returns L - b - Σ a ε, [rows], or by time step with reward-to-go, [rows, T]. If λ is 0, L has only the losses
        without a gradient."""
        losses, mean = group.losses, self.mean_loss
        if not self.credit.unbiased:
            losses, mean = group.joined("gradientless"), self.mean_gradientless
        if self.sampling.multi_sample:
            return mixed_signals(losses, p)[p.copies].flatten()
        if self.credit.reward_to_go:
            losses = group.joined("loss_in_time")  # [K, B, T]
            steps = losses.shape[-1]
            p.check_times(steps, "reward_to_go")
            losses = to_go(losses)
            mean = None if mean is None else to_go((mean / steps).expand(steps))
        signal = (losses[p.copies] - baseline(losses, p.copies, self.sampling.group, mean)).flatten(0, 1)
        for record, credit in self.sites(p, predicted, group.site) if self.credit.unbiased else ():
            if credit.a is not None:
                predicted_change = (credit.a * record.innovation()).flatten(2).sum(2).T  # [rows, T]
                signal = signal - (to_go(predicted_change) if signal.ndim == 2 else predicted_change.sum(1))
        return signal

    def of_weights(self, passes: list[Pass], losses: Tensor) -> Tensor:
        """Returns the weights of the scores of weight noise, [K, B]."""
        if self.sampling.multi_sample:
            return mixed_signals(losses, passes[0])
        group = self.sampling.group
        return torch.cat([p.loss - baseline(losses, p.copies, group, self.mean_loss) for p in passes])


def mixed_signals(losses: Tensor, p: Pass) -> Tensor:
    """Returns `multi_sample_signals` of losses [K, B] before their division by the share of labelled samples, divided
    by it afterwards. p: a pass of the step."""
    share = p.evaluation.share
    return multi_sample_signals(losses * share) / share


def enter(pairs: Iterable[tuple[Tensor, Tensor]], wanted: list[Tensor]) -> None:
    """Adds to the `.grad` of the wanted tensors the gradients that enter the graph at these tensors."""
    pairs = list(pairs)
    if wanted and pairs:
        tensors, gradients = zip(*pairs, strict=True)
        torch.autograd.backward(tensors, gradients, inputs=wanted)


def enter_losses(
    pairs: Iterable[tuple[Tensor, Tensor]], evaluations: Iterable[LossEvaluation], model: nn.Module
) -> None:
    """Adds the gradients of losses that read parameters besides the outputs, to all parameters of the model, and to
    those that the losses bring."""
    if pairs := list(pairs):
        brought = [q for evaluation in evaluations for q in evaluation.brought(model)]
        enter(pairs, [*(q for q in model.parameters() if q.requires_grad), *brought])
