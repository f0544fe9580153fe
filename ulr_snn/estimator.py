"""The estimator: the gradient of the expected loss as a mean of credit x local derivative. The formula lives here.

For every weight W that feeds neuron i at time t (METHOD section 3; ULR, arXiv 2305.08960):

    g_W = sum_{i,t} c_it ∂x_it/∂W |spikes fixed
    c_it = λ (L - b - sum_{j,t'} a_jt' ε_jt') δ_it + a_it p'_it

credit      λ   a (prediction of ∂E[L]/∂spike)                       what it is
global      1   0                                                    unbiased, the paper's estimator
feedback    0   direct credit + learned feedback of the copy itself  slightly biased, very low variance
residual    1   the same, from independent copies                    unbiased, a as control variate
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.credit.direct import direct_credit, direct_effect
from ulr_snn.credit.feedback import ENTRIES, PRODUCTS, Feedback, time_basis
from ulr_snn.credit.reset import ResetPath
from ulr_snn.errors import UsageError
from ulr_snn.graph import leaves
from ulr_snn.losses import Loss, resolve
from ulr_snn.noise import Firing, Logistic, NoiseLevel
from ulr_snn.passes import Forward, Pass
from ulr_snn.sites import Record, spiking_layers

CREDITS = ("auto", "global", "feedback", "residual")
WARM_UP = 8  # first steps, each of which refreshes the feedback, which starts from zero, from every time step
DEFAULT_COPIES = {"global": 8, "feedback": 1, "residual": 4}


@dataclass(frozen=True)
class ULR:
    """What to estimate the gradient with. The default is meant to be a good choice everywhere.

    credit: "auto" is feedback where the loss is differentiable in the outputs, otherwise global.
    copies: runs of every sample a step; None: 1 for feedback, 8 for global, 4 for residual.
    antithetic: copies come in pairs from mirrored uniforms.
    firing: distribution of the threshold noise, and its scale.
    refresh: every how many steps an antithetic pair replaces the single pass, to update the learned feedback.
    time_functions: smooth functions of time that resolve the learned feedback (1: constant in time).
    feedback_rate: bound of the feedback's step, in units of samples / (neurons * functions).
    on_nonfinite: "stop" raises on a loss that is not finite, "skip" leaves that step out.
    """

    credit: str = "auto"
    copies: int | None = None
    antithetic: bool = True
    firing: Firing = field(default_factory=Logistic)
    refresh: int = 4
    time_functions: int = 8
    feedback_rate: float = 0.1
    on_nonfinite: str = "stop"

    def __post_init__(self) -> None:
        if self.credit not in CREDITS:
            raise UsageError(f"ULR got credit={self.credit!r}; it is one of {', '.join(CREDITS)}")
        if self.on_nonfinite not in ("stop", "skip"):
            raise UsageError(f"ULR got on_nonfinite={self.on_nonfinite!r}; it is 'stop' or 'skip'")
        for name in ("refresh", "time_functions") + ("copies",) * (self.copies is not None):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise UsageError(f"ULR got {name}={getattr(self, name)!r}; it must be a whole number, at least 1")
        if not self.feedback_rate > 0:
            raise UsageError(f"ULR got feedback_rate={self.feedback_rate}; it must be positive")
        if self.antithetic and self.copies is not None and self.copies > 1 and self.copies % 2:
            raise UsageError(f"ULR got copies={self.copies} in antithetic pairs; use an even number or antithetic=False")
        if self.credit == "residual" and self.copies is not None and self.copies < 2 * self.group:
            raise UsageError(
                f"ULR got credit='residual' with copies={self.copies}; its predictions come from independent copies, "
                f"use at least {2 * self.group}"
            )

    def attach(
        self, model: nn.Module, loss: str | Loss, seed: int, time_first: bool, total_steps: int | None = None
    ) -> "Attachment":
        """What `train` steps with; see `attach`."""
        return Attachment(model, self, loss, seed, time_first, total_steps)

    @property
    def group(self) -> int:
        """Copies that are not independent of each other: 2 in antithetic pairs, else 1."""
        return 2 if self.antithetic else 1


@dataclass
class Estimate:
    """What one step gave. loss: [B], mean over copies; outputs: [K, ...model's output...]; stats: plain numbers."""

    loss: Tensor
    outputs: Tensor
    stats: dict[str, Any]


class Attachment:
    """Adds likelihood-ratio gradients to `.grad`; made by `attach`. The model is bound only inside `backward`."""

    def __init__(self, model: nn.Module, estimator: ULR, loss: str | Loss, seed: int, time_first: bool, total_steps: int | None) -> None:
        spiking_layers(model)
        self.model, self.estimator, self.loss, self.seed, self.time_first = model, estimator, loss, seed, time_first
        self.feedback = Feedback(estimator.time_functions, estimator.feedback_rate)
        self.step = 0
        self.forward_passes = 0
        self.mean_loss: Tensor | None = None  # moving baseline
        self.level = NoiseLevel(estimator.firing)
        self.total_steps = total_steps
        self.structure: Structure | None = None

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_: object) -> None:
        self.structure = None

    # -- one step ------------------------------------------------------------------------------------------

    def backward(
        self, x: Tensor, targets: Tensor, loss: str | Loss | None = None, lengths: Tensor | None = None
    ) -> Estimate:
        """Forward passes, then adds the gradient of the batch's mean expected loss to every trainable `.grad`.

        x: [T, B, ...] ([B, T, ...] with time_first=False), any dtype; lengths: [B], steps past them are padding.
        Raises UsageError on wrong shapes, labels, losses, or events that are not finite.
        """
        x = as_sequence(x, targets, lengths, self.time_first, self.model)
        self.level.progress = self._progress()
        forward = Forward(self.model, self.level, self.seed, self.step, self.estimator.antithetic)
        per_sample = resolve(loss if loss is not None else self.loss)
        passes: list[Pass] = []

        def run(copies: range) -> None:
            for chunk in forward.chunks(list(copies)):
                passes.append(forward.run(x, targets, lengths, per_sample, chunk))

        if self.structure is None:  # the first pass shows what the loss and the layers are
            run(range(1))
            self.structure = Structure.of(self.model, passes[0], self.estimator)
            if self.structure.untrained:
                names = ", ".join(self.structure.untrained)
                warnings.warn(f"no gradient reaches {names}; print(ulr_snn.plan(...)) says why", stacklevel=2)
        copies = self._copies(self.structure.credit)
        run(range(len(passes), copies))
        self.step += 1
        self.forward_passes += copies * x.shape[1]
        return self._finish(passes, copies)

    def _progress(self) -> float:
        """How much of the training is over; half of it where its length is not known."""
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.5

    def _copies(self, credit: str) -> int:
        copies = self.estimator.copies or DEFAULT_COPIES[credit]
        refreshes = credit == "feedback" and self.structure.learns and (
            self.step < WARM_UP or self.step % self.estimator.refresh == 0
        )
        return max(copies, 2) if refreshes else copies

    def _finish(self, passes: list[Pass], copies: int) -> Estimate:
        losses = torch.cat([p.loss for p in passes])  # [K, B]
        estimate = Estimate(losses.mean(0), _stack_outputs(passes), {"copies": copies, "step": self.step})
        if not torch.isfinite(losses).all():
            if self.estimator.on_nonfinite == "stop":
                raise FloatingPointError(
                    f"the loss is not finite at step {self.step}; lower the learning rate, or use on_nonfinite='skip'"
                )
            estimate.stats["skipped"] = True
            return estimate
        self._add_gradients(passes, losses)
        self.mean_loss = losses.mean() if self.mean_loss is None else self.mean_loss.lerp(losses.mean(), 0.05)
        return estimate

    # -- the formula ---------------------------------------------------------------------------------------

    def _add_gradients(self, passes: list[Pass], losses: Tensor) -> None:
        structure, group = self.structure, self.estimator.group
        unbiased = structure.credit != "feedback"
        predictions = self._predictions(passes)  # per pass and record: a [T, rows, ...] or None
        if structure.credit == "residual":
            predictions = from_other_copies(predictions, passes, group)
        tensors, gradients = [], []
        weight = 1.0 / losses.numel()
        for p, predicted in zip(passes, predictions, strict=True):
            if unbiased:
                signal = p.loss - baseline(losses, p.copies, group, self.mean_loss)
                for record, a in zip(p.records, predicted, strict=True):
                    if a is not None:
                        signal = signal - (a * record.innovation()).transpose(0, 1).flatten(1).sum(1).view_as(signal)
                signal = signal.flatten()
            for record, a in zip(p.records, predicted, strict=True):
                credit = None
                if unbiased:
                    credit = record.score() * signal.view(1, -1, *[1] * (record.x.ndim - 2))
                if a is not None:
                    credit = a * record.slope if credit is None else credit + a * record.slope
                if credit is not None and record.x.requires_grad:
                    tensors.append(record.x)
                    gradients.append(credit * weight)
            if p.error is not None and p.outputs.requires_grad:  # the exact path that meets no spike
                tensors.append(p.outputs)
                gradients.append(p.error * weight)
        # after use: what is learned from this step's copies must not enter this step's credit
        if structure.learns and len(losses) > 1:
            self._refresh(passes)
        parameters = [q for q in self.model.parameters() if q.requires_grad]
        if tensors and parameters:
            torch.autograd.backward(tensors, gradients, inputs=parameters)

    def _predictions(self, passes: list[Pass]) -> list[list[Tensor | None]]:
        """a [T, rows, ...] of each record, from its own copy: direct credit plus learned feedback."""
        if self.structure.credit == "global":
            return [[None] * len(p.records) for p in passes]
        return [self._prediction(p) for p in passes]

    def _prediction(self, p: Pass) -> list[Tensor | None]:
        """From the last layer to the first: what a layer's spikes do is known once that of the next layers is."""
        direct = direct_credit(p.outputs, p.error, [record.spikes for record in p.records])
        error = self.structure.summarise_error(p.error)
        currents: dict[str, Tensor] = {}  # ∂L/∂J of the layers done so far
        predictions: list[Tensor | None] = []
        for record, a in zip(reversed(p.records), reversed(direct), strict=True):
            learned = []
            if record.site in self.structure.from_outputs:
                learned.append(self.feedback.from_outputs(record.site, record.spikes, error))
            for target in self.structure.feeds[record.site]:
                if target in currents:
                    learned.append(self.feedback.from_layer(record.site, target, record.spikes, currents[target]))
            for part in learned:
                if part is not None:
                    a = part if a is None else a + part
            if a is not None:
                a, currents[record.site] = reset_path(record).credit(a)
            predictions.append(a)
        return predictions[::-1]

    def _refresh(self, passes: list[Pass]) -> None:
        """Regresses what the copies' differences leave unexplained by direct effects on their innovations."""
        structure, batch = self.structure, passes[0].loss.shape[1]
        drawn = [[record.innovation() for record in p.records] for p in passes]

        def differences(tensors: list[Tensor], dim: int) -> Tensor:
            """Half-differences of paired copies, rows of all passes together."""
            return _half_differences(torch.cat([x.unflatten(dim, (-1, batch)) for x in tensors], dim), dim)

        names = [record.site for record in passes[0].records]
        if structure.from_outputs:
            changes = [
                structure.summarise(p.outputs.detach() - self._direct_effect(p, innovations))
                for p, innovations in zip(passes, drawn, strict=True)
            ]
            z = {
                name: self.feedback.project(differences([d[i].flatten(2) for d in drawn], 1))
                for i, name in enumerate(names)
                if name in structure.from_outputs
            }
            self.feedback.refresh_outputs(z, differences(changes, 0))
        # A layer's input current depends on the spikes that feed it and on nothing else drawn, so that here the
        # spikes themselves leave less unexplained than their innovations.
        for i, target in enumerate(names):
            sources = {
                name: differences([p.records[j].spikes.detach().flatten(2) for p in passes], 1)
                for j, name in enumerate(names)
                if target in structure.feeds[name]
            }
            if sources:
                change = differences([p.records[i].current.flatten(2) for p in passes], 1)
                self.feedback.refresh_layer(target, sources, change, self._times(sources, change))

    def _direct_effect(self, p: Pass, innovations: list[Tensor]) -> Tensor:
        responses = [reset_path(r).response(e) for r, e in zip(p.records, innovations, strict=True)]
        return direct_effect(p.outputs, [record.spikes for record in p.records], responses)

    def _times(self, sources: dict[str, Tensor], change: Tensor) -> Tensor:
        """Time steps to learn from in this refresh: as many as its budget of products allows, spread over time."""
        steps, rows, width = change.shape
        affordable = PRODUCTS // (2 * rows * width * sum(z.shape[2] for z in sources.values()))
        count = steps if self.step <= WARM_UP else max(1, min(steps, affordable))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        return torch.randperm(steps, generator=generator)[:count]

    # -- state ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a later session needs to go on with the same steps."""
        return {
            "step": self.step,
            "forward_passes": self.forward_passes,
            "mean_loss": self.mean_loss,
            "noise_starts": dict(self.level.starts),
            "feedback": self.feedback.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.forward_passes = state["step"], state["forward_passes"]
        self.mean_loss = state["mean_loss"]
        self.level.starts = dict(state["noise_starts"])
        self.feedback.load_state_dict(state["feedback"])


@dataclass
class Structure:
    """What the first pass shows: the credit in use, and where each site's credit comes from.

    direct: sites whose spikes reach the outputs without passing another spike. feeds: per site, the layers whose
    input current its spikes reach so. from_outputs: sites with learned feedback from the outputs: recurrent ones
    (what their own recurrent weights do later), and those that feed a layer too wide for a matrix between the two.
    """

    credit: str
    direct: set[str]
    feeds: dict[str, list[str]]
    from_outputs: list[str]
    output_functions: int | None  # functions of time that resolve the outputs; None: outputs without a time axis
    parameters: dict[str, list[str]]  # parameter -> "outputs" and sites that its gradient comes from
    differentiable: bool  # whether the loss has a gradient in the outputs

    @property
    def learns(self) -> bool:
        """Whether there is feedback to learn."""
        return self.credit != "global" and bool(self.from_outputs or any(self.feeds.values()))

    @property
    def untrained(self) -> list[str]:
        """Trainable parameters that no gradient reaches."""
        return [name for name, sources in self.parameters.items() if not sources]

    @classmethod
    def of(cls, model: nn.Module, p: Pass, estimator: ULR) -> "Structure":
        if p.error is None and estimator.credit in ("feedback", "residual"):
            raise UsageError(
                f"the loss has no gradient with respect to the outputs, which credit={estimator.credit!r} needs; "
                "use credit='global'"
            )
        credit = estimator.credit
        if credit == "auto":
            credit = "feedback" if p.error is not None else "global"
        reached = {"outputs": leaves([p.outputs]) if p.error is not None else set()}
        reached |= {record.site: leaves([record.x]) for record in p.records}
        direct = {r.site for r in p.records if id(r.spikes) in reached["outputs"]}
        width = {r.site: r.current[0, 0].numel() for r in p.records}
        feeds: dict[str, list[str]] = {r.site: [] for r in p.records}
        from_outputs = [r.site for r in p.records if r.neuron.recurrent is not None]
        for r in p.records:
            targets = [m.site for m in p.records if id(r.spikes) in reached[m.site]]
            feeds[r.site] = [target for target in targets if width[r.site] * width[target] <= ENTRIES]
            if len(feeds[r.site]) < len(targets) and r.site not in from_outputs:
                from_outputs.append(r.site)
        parameters = {
            name: [source for source, ids in reached.items() if id(q) in ids]
            for name, q in model.named_parameters()
            if q.requires_grad
        }
        functions = None
        if p.outputs.ndim >= 3:
            functions = 1
            if p.error is not None and (p.error - p.error[:1]).abs().max() > 1e-6 * p.error.abs().max():
                functions = estimator.time_functions
        return cls(credit, direct, feeds, from_outputs, functions, parameters, p.error is not None)

    def summarise(self, outputs: Tensor) -> Tensor:
        """o [rows, O]: outputs over time on the output functions, so that ΔL = e · Δo."""
        if self.output_functions is None:
            return outputs.flatten(1)
        basis = time_basis(self.output_functions, len(outputs), outputs)
        return torch.einsum("rt,tbo->bro", basis, outputs.flatten(2)).flatten(1)

    def summarise_error(self, error: Tensor) -> Tensor:
        """e [rows, O] that belongs to `summarise`."""
        return self.summarise(error if self.output_functions is None else error / len(error))


def reset_path(record: Record) -> ResetPath:
    return ResetPath(record.neuron, record.slope / record.scale, record.spikes.detach(), record.membrane)


def baseline(losses: Tensor, copies: list[int], group: int, moving: Tensor | None) -> Tensor:
    """b [copies, B], independent of the copies' own draws: the mean loss of the sample's copies in other groups
    (leave-one-out, or leave-pair-out for antithetic pairs); with a single group the moving mean."""
    count = len(losses)
    if count <= group:
        return torch.zeros_like(losses[:1]) if moving is None else moving.expand(len(copies), losses.shape[1])
    groups = losses.unflatten(0, (-1, group)).sum(1)  # [K / group, B]
    others = (losses.sum(0) - groups) / (count - group)
    return others[torch.tensor(copies, device=losses.device) // group]


def from_other_copies(
    predictions: list[list[Tensor | None]], passes: list[Pass], group: int
) -> list[list[Tensor | None]]:
    """Replaces each copy's prediction a by the mean of those of the sample's copies in other groups."""
    result: list[list[Tensor | None]] = [[] for _ in passes]
    batch = passes[0].loss.shape[1]
    for column in zip(*predictions, strict=True):  # one site, over passes
        if column[0] is None:
            stacked = None
        else:
            copies = torch.cat([a.unflatten(1, (-1, batch)) for a in column], 1)  # [T, K, B, ...]
            sums = copies.unflatten(1, (-1, group)).sum(2, keepdim=True)
            others = (copies.sum(1)[:, None, None] - sums) / (copies.shape[1] - group)
            stacked = others.expand(-1, -1, group, *copies.shape[2:]).flatten(1, 2)
        for p, kept in zip(passes, result, strict=True):
            kept.append(None if stacked is None else stacked[:, p.copies].flatten(1, 2))
    return result


def _half_differences(copies: Tensor, dim: int) -> Tensor:
    """(even - odd) / 2 of paired copies along `dim` [.., K, B, ..], pairs and samples flattened together."""
    even, odd = copies.unflatten(dim, (-1, 2)).unbind(dim + 1)
    return ((even - odd) / 2).flatten(dim, dim + 1)


def _stack_outputs(passes: list[Pass]) -> Tensor:
    batch = passes[0].loss.shape[1]
    dim = 1 if passes[0].outputs.ndim >= 3 else 0
    copies = torch.cat([p.outputs.detach().unflatten(dim, (-1, batch)) for p in passes], dim)
    return copies.transpose(0, dim)


def as_sequence(
    x: Tensor, targets: Tensor, lengths: Tensor | None, time_first: bool, model: nn.Module
) -> Tensor:
    """x as a floating-point sequence [T, B, ...] in the model's dtype. Raises UsageError for what cannot be one."""
    if not isinstance(x, Tensor) or x.ndim < 3:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise UsageError(f"events have shape {shape}; they must be a tensor [T, B, ...] (or [B, T, ...], time_first=False)")
    x = x if time_first else x.transpose(0, 1)
    if x.shape[1] != len(targets):
        swapped = x.shape[0] == len(targets)
        hint = f"the time axis looks swapped, pass time_first={not time_first}" if swapped else "give one target a sample"
        raise UsageError(f"events hold {x.shape[1]} samples of {x.shape[0]} steps, but there are {len(targets)} targets; {hint}")
    if lengths is not None and (lengths.shape != targets.shape[:1] or lengths.min() < 1 or lengths.max() > len(x)):
        raise UsageError(f"lengths must be [B], each from 1 to the {len(x)} steps of the batch")
    reference = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtype = reference.dtype if reference is not None else torch.get_default_dtype()
    if x.is_floating_point() and not torch.isfinite(x).all():
        raise UsageError("events contain NaN or infinite values; clean the recordings first")
    return x.to(dtype)


def attach(
    model: nn.Module,
    estimator: ULR | None = None,
    loss: str | Loss = "ce_count",
    seed: int = 0,
    time_first: bool = True,
    total_steps: int | None = None,
) -> Attachment:
    """For one's own loop: `with attach(model) as ulr: ... estimate = ulr.backward(x, y); optimizer.step()`.

    total_steps: length of the training, over which the firing noise is annealed; without it the noise stays at
    the geometric mean of its first and last level. loss: a name (see `ulr_snn.losses`) or a callable (outputs, targets) -> [B].
    Raises UsageError if the model has no spiking layer that the library knows.
    """
    return (estimator or ULR()).attach(model, loss, seed, time_first, total_steps)
