"""The estimator: the gradient of the expected loss as a mean of credit x local derivative. The formula lives here.

For every weight W that feeds neuron i at time t (unified likelihood ratio, arXiv 2305.08960, and a control variate a):

    g_W = sum_{i,t} c_it ∂x_it/∂W |spikes fixed
    c_it = λ (L - b - sum_{j,t'} a_jt' ε_jt') δ_it + a_it p'_it

credit      λ   a (prediction of ∂E[L]/∂spike)                       what it is
global      1   0                                                    unbiased, the paper's estimator
feedback    0   direct credit + learned feedback of the copy itself  slightly biased, very low variance
residual    1   the same, from independent copies                    unbiased, a as control variate
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.credit.baseline import baseline, moving, multi_sample_signals, multi_sample_weights, to_go
from ulr_snn.credit.feedback import Feedback
from ulr_snn.credit.linked import Linked
from ulr_snn.credit.prediction import Credit, Prediction
from ulr_snn.credit.residual import from_other_copies
from ulr_snn.credit.structure import Structure, judging_of
from ulr_snn.errors import UsageError
from ulr_snn.estimators.base import Batch, Estimate
from ulr_snn.estimators.online import Stream, Streaming
from ulr_snn.estimators.step_sizes import StepSizes
from ulr_snn.kernels.pool import Pool
from ulr_snn.losses.named import LossSpec, Objective, resolve
from ulr_snn.memory.strategies import InParts
from ulr_snn.model.chain import Engine
from ulr_snn.model.discovery import find_layers
from ulr_snn.model.forward import Forward, Pass, as_frames, runs_by_step
from ulr_snn.model.neurons import own_spread
from ulr_snn.noise.level import WIDENING, CurrentNoise, Firing, Logistic, NoiseLevel, OutputNoise, WeightNoise
from ulr_snn.sampling.adaptive import AdaptiveCopies, CopyBudget
from ulr_snn.sites.binding import Layers, check_layers, own_modules, spiking_layers
from ulr_snn.sites.flow import FLOWS, check_flow, frozen, with_flow
from ulr_snn.sites.variance import BY_SAMPLE, calmer_weights
from ulr_snn.sites.weights import SOURCE, WeightSites, check_names, choose

CREDITS = ("auto", "global", "feedback", "residual")
MAPS = ("auto", "exact", "learned")
MEMORY = ("auto", "replay", "stream")
DEFAULT_COPIES = {"global": 8, "feedback": 1, "residual": 4}


@dataclass(frozen=True)
class ULR:
    """What to estimate the gradient with. The default is meant to be a good choice everywhere.

    credit: "auto" is feedback where the loss is differentiable in the outputs, or noise on these makes it so, otherwise
        global. Of a mix of losses, those without a gradient then get the credit of "global".
    maps: what spikes of a layer do to the input current of the next, for credit. "auto": the vector-Jacobian product of
        the modules between the two at fixed spikes where they are differentiable (max pooling of spikes counts as an
        OR), and recurrent weights as they are; a learned map where a step function such as rounding lies between.
        "exact": the same, and UsageError where there is no product. "learned": maps are learned by regression on
        forward passes, so that no weights are transported backwards.
    copies: runs of every sample a step; None: 1 for feedback, 8 for global and such mixes, 4 for residual. With credit
        "global" or "residual" also AdaptiveCopies(): as many as the measured variance of the gradient asks for.
    antithetic: copies come in pairs from mirrored uniforms.
    quasi_monte_carlo: copies come in two randomly shifted Sobol sets in place of pairs, copies: 2, 4, 8, ... to 128.
    layerwise: one layer after another has copies of its own, all others see the same noise in each; unbiased all the
        same, with less variance, in 1 + layers * (copies - 1) passes. With credit "global" or "residual".
    reward_to_go: a spike is credited with what the loss adds up from its time on alone. For losses that are sums over
        time ("ce_rate", "mse"), models that do not look ahead, and credit "global" or "residual".
    multi_sample: the objective is the multi-sample bound -log mean over copies of exp(-loss) (GEM-SNN, arXiv
        2102.03280); with credit "feedback" or "global", antithetic=False and at least two copies.
    firing: distribution of the threshold noise, and its scale.
    noise: by name, other noise than that: {module: CurrentNoise()} on a module's input current, {parameter or module:
        WeightNoise()} on parameters, {parameter or module: None} none on parameters, {"outputs": OutputNoise()} on the
        outputs where a loss has no gradient, {"outputs": None} none there. Of its own accord noise comes on the current
        of modules that cut the graph, on parameters that no other noise reaches, and with credit "auto" on outputs that
        are no spikes, or else on weights where that is expected to vary less than the firing (see `plan`).
    flow: by name, how a module or parameter learns: "ulr" by a likelihood ratio even where a derivative would do (noise
        on the parameters, unless it fires), "backprop" by the exact gradient of what is differentiable alone, and never
        by noise of its own, "frozen" not at all: it runs as in evaluation. What is not named learns by whichever of the
        first two it can.
    refresh: every how many steps an antithetic pair may replace the single pass, where there is feedback that only
        pairs can teach: from the outputs (see `plan`), always, and into layers that see the events otherwise than by
        spikes, while weights move fast, else about every eighth step.
    time_functions: smooth functions of time that resolve the learned feedback (1: constant in time).
    feedback_rate: bound of the feedback's step, in units of samples / (neurons * functions).
    memory: what a step keeps. "replay": time goes by in parts, whose spikes are drawn again from the same noise, so
        that memory does not grow with the number of time steps; every part runs twice (of many, more often), for credit
        "feedback" and models that run their modules one after another. "auto": the whole sequence at once while that is
        small, else "replay" where it can be.
        With credit "global", "replay" runs one copy after another, each of them once for its loss and once more
        for its gradient, so that memory does not grow with the number of copies. "stream": one time step, for an update
        after each (`Attachment.stream`; `train` makes them), where the loss is a sum over time; another gradient,
        without what spikes do to later time steps (see stream.py).
    on_nonfinite: "stop" raises on a loss that is not finite, "skip" leaves that step out (of "stream", the time step).
    """

    credit: str = "auto"
    maps: str = "auto"
    copies: int | AdaptiveCopies | None = None
    antithetic: bool = True
    quasi_monte_carlo: bool = False
    layerwise: bool = False
    reward_to_go: bool = False
    multi_sample: bool = False
    firing: Firing = field(default_factory=Logistic)
    noise: Mapping[str, CurrentNoise | WeightNoise | OutputNoise | None] = field(default_factory=dict)
    flow: Mapping[str, str] = field(default_factory=dict)
    refresh: int = 4
    time_functions: int = 8
    feedback_rate: float = 0.1
    memory: str = "auto"
    on_nonfinite: str = "stop"

    def __post_init__(self) -> None:
        if self.credit not in CREDITS:
            raise UsageError(f"ULR got credit={self.credit!r}; it is one of {', '.join(CREDITS)}")
        if self.maps not in MAPS:
            raise UsageError(f"ULR got maps={self.maps!r}; it is one of {', '.join(MAPS)}")
        if self.memory == "bits":
            warnings.warn("memory='bits' is memory='replay' now, which keeps less", DeprecationWarning, stacklevel=3)
            object.__setattr__(self, "memory", "replay")
        if self.memory not in MEMORY:
            raise UsageError(f"ULR got memory={self.memory!r}; it is one of {', '.join(MEMORY)}")
        if self.on_nonfinite not in ("stop", "skip"):
            raise UsageError(f"ULR got on_nonfinite={self.on_nonfinite!r}; it is 'stop' or 'skip'")
        adaptive = isinstance(self.copies, AdaptiveCopies)
        for name in ("refresh", "time_functions") + ("copies",) * (self.copies is not None and not adaptive):
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1):
                raise UsageError(f"ULR got {name}={getattr(self, name)!r}; it must be a whole number, at least 1")
        for name, site in self.noise.items():
            if not (site is None or isinstance(site, CurrentNoise | WeightNoise | OutputNoise)):
                raise UsageError(f"ULR got noise={site!r} for {name!r}; it is CurrentNoise(), WeightNoise() or None")
            if isinstance(site, OutputNoise) and name != "outputs":
                raise UsageError(f"ULR got {site} for {name!r}; noise on the outputs goes by the name 'outputs'")
        for name, kind in self.flow.items():
            if kind not in FLOWS:
                raise UsageError(f"ULR got flow={kind!r} for {name!r}; it is one of {', '.join(FLOWS)}")
        if not self.feedback_rate > 0:
            raise UsageError(f"ULR got feedback_rate={self.feedback_rate}; it must be positive")
        if adaptive:
            self._check_adaptive()
            return
        if self.antithetic and self.copies is not None and self.copies > 1 and self.copies % 2:
            raise UsageError(
                f"ULR got copies={self.copies} in antithetic pairs; use an even number or antithetic=False"
            )
        self._check_reductions()
        if self.memory == "replay" and self.credit == "global" and self.layerwise:
            raise UsageError("ULR got memory='replay' with layerwise; copies in turn are for all layers together")
        if self.credit == "residual" and self.copies is not None and self.copies < 2 * self.group:
            raise UsageError(
                f"ULR got credit='residual' with copies={self.copies}; its predictions come from independent copies, "
                f"use at least {2 * self.group}"
            )

    def attach(
        self, model: nn.Module, loss: LossSpec, seed: int, time_first: bool, total_steps: int | None = None
    ) -> "Attachment":
        """What `train` steps with; see `attach`."""
        return Attachment(model, self, loss, seed, time_first, total_steps)

    def _check_adaptive(self) -> None:
        if self.credit not in ("global", "residual") or self.quasi_monte_carlo or self.multi_sample:
            raise UsageError(
                "ULR got AdaptiveCopies; it takes credit 'global' or 'residual', no quasi_monte_carlo or multi_sample"
            )
        if self.memory == "replay":
            raise UsageError("ULR got memory='replay' with AdaptiveCopies; give it a number of copies")
        self.copies.check(self.group)
        self._check_reductions()

    def _check_reductions(self) -> None:
        if self.quasi_monte_carlo and (
            self.antithetic or self.copies is None or self.copies not in [2**k for k in range(1, 8)]
        ):
            raise UsageError(
                f"ULR got quasi_monte_carlo with copies={self.copies}, antithetic={self.antithetic}; use a power of "
                "two up to 128, and antithetic=False"
            )
        for name in ("layerwise", "reward_to_go"):
            if getattr(self, name) and self.credit not in ("global", "residual"):
                raise UsageError(f"ULR got {name} with credit={self.credit!r}; it is for 'global' and 'residual'")
        others = self.antithetic or self.quasi_monte_carlo or self.layerwise or self.reward_to_go
        if self.multi_sample and (self.credit == "residual" or others or (self.copies or 0) < 2):
            raise UsageError(
                "ULR got multi_sample; it takes copies=2 or more, all independent (antithetic=False, no Sobol sets), "
                "no layerwise or reward_to_go, and credit 'auto', 'feedback' or 'global'"
            )

    @property
    def group(self) -> int:
        """Copies that are not independent of each other: 2 in antithetic pairs, half of them in Sobol sets, else 1."""
        if self.quasi_monte_carlo:
            return max(1, self.copies // 2)
        return 2 if self.antithetic else 1


@dataclass
class Group:
    """Passes that are copies of each other: in all their noise (site: None), or in that of one site alone. judged: all
    passes whose losses count, if they are more than these."""

    site: str | None
    passes: list[Pass]
    judged: list[Pass] | None = None

    def joined(self, kind: str) -> Tensor:
        """[K, B, ...] of all copies: their "loss", "blind" or "loss_in_time"."""
        return torch.cat([getattr(p, kind) for p in self.judged or self.passes])

    @property
    def losses(self) -> Tensor:
        """[K, B]."""
        return self.joined("loss")


@dataclass(frozen=True)
class Entry:
    """A gradient [T, rows, ...] and the tensor at which it enters the graph. copies: of the rows; None: exact, at the
    outputs. by_score: whether it is the summand of the score."""

    tensor: Tensor
    gradient: Tensor
    copies: list[int] | None
    by_score: bool = False


class Attachment:
    """Adds likelihood-ratio gradients to `.grad`; made by `attach`. The model is bound only inside `backward`."""

    def __init__(
        self,
        model: nn.Module,
        estimator: ULR,
        loss: LossSpec,
        seed: int,
        time_first: bool,
        total_steps: int | None,
    ) -> None:
        check_names(model, estimator.noise)
        check_flow(model, estimator.flow)
        estimator = replace(estimator, noise=with_flow(model, estimator.flow, estimator.noise))
        check_layers(model, spiking_layers(model), [*own_modules(model), *estimator.noise])
        self.model, self.estimator, self.loss = model, estimator, loss
        self.engine = Engine(model, estimator.noise)  # its `running` is the model here, once the events are known
        self.seed, self.time_first, self.total_steps = seed, time_first, total_steps
        self.feedback = Feedback(estimator.time_functions, estimator.feedback_rate)
        self.prediction = Prediction(self.feedback, seed)
        self.budget: CopyBudget | None = None  # of copies, where their number follows the variance
        if isinstance(estimator.copies, AdaptiveCopies):
            self.budget = CopyBudget(estimator.copies, estimator.group)
        self.step = 0
        self.forward_passes = 0
        self.fixed_progress: float | None = None  # of the training, where it does not follow from the step
        self.mean_loss: Tensor | None = None  # moving baseline
        self.mean_blind: Tensor | None = None  # that of the losses without a gradient
        self.driven: set[str] | None = None  # sites that see the events otherwise than by spikes, once it is known
        self.chosen: dict[str, WeightNoise] | None = None  # of parameters, where a checkpoint says so
        self.by_step: bool | None = None  # whether the model takes one time step a call, once it is known
        self.layers: Layers | None = None  # those that get noise, once they are known
        self.level = NoiseLevel(estimator.firing)
        self.step_sizes: StepSizes | None = None  # measured where `advise_step_sizes` has been called
        self.piecewise = (Streaming if self.streams else InParts)(self)
        self.pool = Pool(lean=estimator.memory == "replay")
        self.structure: Structure | None = None
        self._structure_loss: LossSpec | None = None

    @property
    def in_turn(self) -> bool:
        """Whether copies run one after another, each twice."""
        return self.estimator.memory == "replay" and self.estimator.credit == "global"

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_: object) -> None:
        if self.structure is not None:
            self.chosen = self.structure.weights  # for a state that is saved now
        self.structure = None
        self.pool.clear()

    # -- one step ------------------------------------------------------------------------------------------

    @torch.enable_grad()
    def backward(
        self, x: Tensor, targets: Tensor, loss: LossSpec | None = None, lengths: Tensor | None = None
    ) -> Estimate:
        """Forward passes, then adds the gradient of the batch's mean expected loss to every trainable `.grad`.

        x: [T, B, ...] ([B, T, ...] with time_first=False), any dtype, dense or a sparse COO tensor, which lists the
        events; lengths: [B], steps past them are padding.
        Raises UsageError on wrong shapes, labels, losses, or events that are not finite.
        """
        if self.streams:
            return in_sum(list(self.stream(x, targets, loss, lengths)))
        with frozen(self.engine.model, self.estimator.flow), self.pool.used():
            return self._backward(x, targets, loss, lengths)

    @property
    def streams(self) -> bool:
        """Whether it is made for updates at every time step."""
        return self.estimator.memory == "stream"

    def stream(
        self, x: Tensor, targets: Tensor, loss: LossSpec | None = None, lengths: Tensor | None = None
    ) -> Iterator[Estimate]:
        """The time steps of a batch one after another, for an update after each: `for _ in ulr.stream(x, y): ...`. Each
        adds the gradient of the batch's mean of what it adds to the loss, without what its spikes do to later ones (see
        stream.py); its estimate has that part of the loss [B] and the outputs of this time step [1, 1, B, ...].

        For memory "stream". Takes and raises what `backward` does.
        """
        if not self.streams:
            raise UsageError(
                f"ulr.stream is for updates at every time step, and ULR got memory={self.estimator.memory!r}; attach "
                "with ULR(memory='stream')"
            )
        with frozen(self.engine.model, self.estimator.flow), torch.enable_grad():
            stream = self.piecewise.start(*self._begin(x, targets, loss, lengths))
        return self._each(stream)

    def _each(self, stream: Stream) -> Iterator[Estimate]:
        for t in range(stream.batch.steps):
            with frozen(self.engine.model, self.estimator.flow), torch.enable_grad():
                estimate = stream.step(t)
            yield estimate

    def _begin(
        self, x: Tensor, targets: Tensor, loss: LossSpec | None, lengths: Tensor | None
    ) -> tuple[Forward, Batch, tuple[slice, slice] | None]:
        """Of one step; last, what it measures by, where it does not see the whole sequence at once."""
        frames, dtype = as_frames(x, targets, lengths, self.time_first, self.model)
        targets = targets.to(frames.device)
        lengths = None if lengths is None else lengths.to(frames.device)
        self.level.progress = self._progress()
        loss = self.loss if loss is None else loss
        if loss != self._structure_loss:  # another loss may reach the outputs in another way
            if self._structure_loss is not None:  # else what is chosen comes from a checkpoint
                self.chosen = None
            self.structure, self._structure_loss = None, loss
        batch = Batch(frames, dtype, targets, lengths, resolve(loss))
        if self.engine.changes(frames, dtype, batch.objective):
            self.model, self.layers, self.piecewise.neurons, self.structure = self.engine.running, None, None, None
        few = None if self.in_turn else self.piecewise.few(batch)
        if self.layers is None:
            x = batch.x if few is None else batch.part(few).x
            self.by_step = runs_by_step(self.model, x)
            self.layers = find_layers(self.model, x, self.by_step, self.estimator.noise)
            check_flow(self.model, self.estimator.flow, self.layers)
        antithetic = self.estimator.antithetic
        forward = Forward(self.model, self.level, self.seed, self.step, antithetic, self.by_step, self.layers)
        forward.points = self.estimator.group if self.estimator.quasi_monte_carlo else 0
        return forward, batch, few

    def _backward(self, *given: Any) -> Estimate:
        forward, batch, few = self._begin(*given)
        if few is not None:
            estimate = self.piecewise.step(forward, batch, few)
            if estimate is not None:
                return estimate  # else the sample has shown that it has to be the whole
        x, targets, lengths, objective = batch.x, batch.targets, batch.lengths, batch.objective
        passes: list[Pass] = []

        def run(copies: range) -> None:
            for chunk in forward.chunks(list(copies)):
                passes.append(forward.run(x, targets, lengths, objective, chunk))

        if self.structure is None:  # the first pass shows what the loss and the layers are
            run(range(1))
            self.observe(forward, passes[0], x, targets, lengths, objective)
            if self.structure.weights:  # that pass had no noise on them
                passes.clear()
                forward.extra_passes += 1
        copies = self._copies(self.structure.credit)
        forward.weights, forward.judging = self._weight_sites(), self.structure.judging
        forward.links = Linked() if self._links() else None
        forward.changes = self.structure.changes
        forward.pools = self.structure.pools or forward.links is None
        if self.in_turn:
            return self._backward_in_turn(forward, copies, passes, x, targets, lengths, objective)
        groups: list[Group] = [Group(None, passes)]
        if self.estimator.layerwise:
            run(range(len(passes), 1))
            groups = []
            for site in [r.site for r in passes[0].records if r.x.requires_grad]:
                forward.varied, first = site, len(passes)
                run(range(1, self._copies(self.structure.credit, site)))
                groups.append(Group(site, [passes[0], *passes[first:]]))
            groups = groups or [Group(None, passes)]  # no layer has anything to learn
        else:
            run(range(len(passes), copies))
        self.measure(passes[0])
        self.step += 1
        self.forward_passes += (sum(len(p.copies) for p in passes) + forward.extra_passes) * x.shape[1]
        return self._finish(passes, copies, lambda: self._add_gradients(passes, groups))

    def _links(self) -> bool:
        """Whether credit of this step's passes goes through all layers at once (see credit/linked.py). What looks at
        membranes, or at one layer alone, needs records of it."""
        return self.structure.all_exact and not (self.measures or self.estimator.multi_sample)

    def observe(self, forward: Forward, p: Pass, *batch: Any) -> None:
        """Learns from the first pass what the loss and the layers are."""
        self.structure = observed(forward, p, self.estimator, *batch, self.driven, self.chosen)
        self.chosen = None
        check_layers(self.model, self.layers, self.structure.weights)
        self.driven = self.structure.driven
        self.level.quiet = self.structure.quiet
        self.prediction.take(self.structure)
        if self.structure.untrained:
            names = ", ".join(self.structure.untrained)
            warnings.warn(f"no gradient reaches {names}; print(ulr_snn.plan(...)) says why", stacklevel=4)

    def measure(self, p: Pass, whole: bool = True) -> None:
        """What a pass says about lengths of steps, and about the noise of layers that began at rest. whole: it is over
        all time steps."""
        if not torch.isfinite(p.loss).all():
            return
        if self.step_sizes is not None:
            self.step_sizes.measure(self.model, p, self.step, whole)
        if self._widens:
            for r in p.records:
                if r.site not in self.level.currents:
                    self.level.widen(r.site, r.neuron.threshold, lambda r=r: own_spread(r.membrane(), r.mask))

    @property
    def measures(self) -> bool:
        """Whether `measure` would do something at this step."""
        return self._widens or (self.step_sizes is not None and self.step_sizes.due(self.step))

    @property
    def _widens(self) -> bool:
        """Whether the noise of layers that began at rest may still follow their membranes."""
        return self.began_at_rest and not self.structure.has_readout and self.level.progress <= WIDENING

    @property
    def began_at_rest(self) -> bool:
        """Whether layers did, as far as is known, in a training that goes on."""
        return bool(self.level.resting) and self.fixed_progress is None

    def usable(self, losses: Tensor) -> bool:
        """Whether the losses are finite. Raises FloatingPointError if they are not, unless such steps are left out."""
        finite = bool(torch.isfinite(losses).all())
        if not finite and self.estimator.on_nonfinite == "stop":
            raise FloatingPointError(
                f"the loss is not finite at step {self.step}; lower the learning rate, or use on_nonfinite='skip'"
            )
        return finite

    def _weight_sites(self) -> WeightSites | None:
        """The draws of the parameters with noise of their own; None where there are none."""
        weights = self.structure.weights
        return WeightSites(weights, self.seed, self.estimator.antithetic) if weights else None

    def _progress(self) -> float:
        """How much of the training is over; half of it where its length is not known."""
        if self.fixed_progress is not None:
            return self.fixed_progress
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.5

    def _copies(self, credit: str, site: str | None = None) -> int:
        """Of this step; site: of one alone, where each has copies of its own."""
        copies = default_copies(self.estimator, self.structure) if self.budget is None else self.budget.copies(site)
        refreshes = credit == "feedback" and self.prediction.wants_pairs(self.step, self.estimator.refresh)
        return max(copies, 2) if refreshes or self.structure.weights else copies

    def _backward_in_turn(self, forward: Forward, copies: int, passes: list[Pass], x: Tensor, *about: Any) -> Estimate:
        """A step of credit "global" that holds the graph of one copy at a time. passes: of the first step, the one that
        has been seen. about: targets, lengths and objective."""
        with torch.no_grad():
            judged = [forward.run(x, *about, [copy]).judged() for copy in range(copies)]
        self.step += 1
        self.forward_passes += (2 * copies + len(passes) + forward.extra_passes) * x.shape[1]

        def again() -> Iterator[Pass]:
            for copy in reversed(range(copies)):  # the first one last: what is measured of it may change the noise
                p = forward.run(x, *about, [copy])
                if copy == 0:
                    self.measure(p)
                yield p

        return self._finish(judged, copies, lambda: self._add_by_pass(again(), judged))

    def _finish(self, passes: list[Pass], copies: int, add: Callable[[], None]) -> Estimate:
        """add: adds the gradient of what has no noise of its own; called where the passes' losses are finite."""
        losses = torch.cat([p.loss for p in passes])  # [K, B]
        estimate = Estimate(losses.mean(0), _stack_outputs(passes), {"copies": copies, "step": self.step})
        if not self.usable(losses):
            estimate.stats["skipped"] = True
            return estimate
        add()
        self._add_weight_gradients(passes, losses)
        if self.structure.credit != "global":
            self.level.see([p.records for p in passes])
        self.mean_loss = moving(self.mean_loss, losses)
        self.mean_blind = moving(self.mean_blind, torch.cat([p.blind for p in passes]))
        return estimate

    # -- the formula ---------------------------------------------------------------------------------------

    def _add_gradients(self, passes: list[Pass], groups: list[Group]) -> None:
        structure = self.structure
        if structure.credit == "global" and self.budget is None and not self.estimator.layerwise:
            self._add_by_pass(passes, passes)
            return
        if structure.credit == "feedback" and not structure.all_exact:
            self.prediction.learn_layers(passes, self.step - 1)
        predicted, scored = [], []  # pairs of tensors in the graph, and the gradients that enter there
        for group in groups:
            entries = list(self._gradients(group, 1 / len(groups)))
            if self.budget is not None and self.budget.due(self.step - 1):
                self._see_variance(group, entries)
            for entry in entries:
                (scored if entry.by_score else predicted).append((entry.tensor, entry.gradient))
        # After use: what is learned from this step's draws must not enter the unbiased estimators, nor feedback from
        # the outputs its own regression. What spikes do to the next layer is no matter of chance.
        for group in groups:
            if structure.from_outputs and len(group.losses) > 1:
                self.prediction.refresh(group.passes)
            if structure.credit == "residual":
                self.prediction.learn_layers(group.passes, self.step - 1)
        enter([*predicted, *scored], self._wanted())

    def _add_by_pass(self, passes: Iterable[Pass], judged: list[Pass]) -> None:
        """With credit "global" a pass needs of the others, judged, their losses alone, and is done with by itself."""
        for p in passes:
            entries = self._gradients(Group(None, [p], judged), 1.0)
            enter([(entry.tensor, entry.gradient) for entry in entries], self._wanted())

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Those without noise of their own, by name."""
        named = self.model.named_parameters()
        return {name: q for name, q in named if q.requires_grad and name not in self.structure.weights}

    def _wanted(self) -> list[Tensor]:
        return list(self._parameters().values())

    def _add_weight_gradients(self, passes: list[Pass], losses: Tensor) -> None:
        weights = self._weight_sites()
        if weights is not None:
            weights.add_gradients(self.model, self.step - 1, self._weight_signals(passes, losses))

    def _weight_signals(self, passes: list[Pass], losses: Tensor) -> Tensor:
        """What the scores of weight noise are weighted by, [K, B]."""
        if self.estimator.multi_sample:
            return multi_sample_signals(losses)
        return torch.cat([p.loss - baseline(losses, p.copies, self.estimator.group, self.mean_loss) for p in passes])

    def _see_variance(self, group: Group, entries: list[Entry]) -> None:
        """Measures what the two halves of a group's copies give to the parameters that its noise reaches."""
        noisy = [e for e in entries if e.copies is not None]
        reached = {name for name, sources in self.structure.parameters.items() if set(sources) - {"outputs", SOURCE}}
        parameters = [q for name, q in self.model.named_parameters() if q.requires_grad and name in reached]
        halves = [self._half(group, noisy, parameters, half) for half in (0, 1)]
        self.budget.see(group.site, list(zip(*halves, strict=True)), len(group.losses))

    def _half(self, group: Group, entries: list[Entry], parameters: list[nn.Parameter], half: int) -> list[Tensor]:
        """Gradients by every other group of copies that are not independent."""
        found = []
        if entries and parameters:
            tensors, gradients = [], []
            for e in entries:
                own = torch.tensor([copy // self.estimator.group % 2 == half for copy in e.copies])
                rows = own.repeat_interleave(e.gradient.shape[1] // len(e.copies)).to(e.gradient)
                tensors.append(e.tensor)
                gradients.append(e.gradient * rows.view(-1, *[1] * (e.gradient.ndim - 2)))
            given = torch.autograd.grad(tensors, parameters, gradients, retain_graph=True, allow_unused=True)
            found = [torch.zeros_like(q) if g is None else g for q, g in zip(parameters, given, strict=True)]
        weights = self._weight_sites()
        if weights is not None:
            signals = self._weight_signals(group.passes, group.losses)
            own = torch.arange(len(signals), device=signals.device) // self.estimator.group % 2 == half
            found += weights.gradients(self.model, self.step - 1, signals * own[:, None]).values()
        return found

    def _gradients(self, group: Group, share: float) -> Iterator[Entry]:
        """The two summands of credit at each site, the exact gradient at the outputs.

        share: of the exact one, that of this group among all."""
        structure, passes, losses = self.structure, group.passes, group.losses
        unbiased = structure.credit != "feedback"
        predictions = self._predictions(passes)  # per pass and record
        if structure.credit == "residual":
            predictions = from_other_copies(predictions, passes, self.estimator.group)
        shares = multi_sample_weights(losses) if self.estimator.multi_sample else torch.ones_like(losses)
        for p, predicted in zip(passes, predictions, strict=True):
            weight = shares[p.copies].flatten() / losses.numel()  # [rows]
            sites = [  # of a linked pass the ends alone, from which credit goes on by itself
                (record, credit)
                for record, credit in zip(p.records, predicted, strict=not p.linked)
                if group.site in (None, record.site) and record.site not in structure.quiet
            ]
            signal = None  # of the score, [rows] or, by time step, [rows, T]
            if unbiased:
                signal = self._signal(group, p)
                for record, credit in sites:
                    if credit.a is not None:
                        told = (credit.a * record.innovation()).flatten(2).sum(2).T  # [rows, T]
                        signal = signal - (to_go(told) if signal.ndim == 2 else told.sum(1))
            elif structure.judging.blind:
                signal = self._signal(group, p)
            for record, credit in sites:
                if not record.x.requires_grad:
                    continue
                if signal is not None:
                    in_time = signal.T if signal.ndim == 2 else signal[None]
                    by_row = in_time.unflatten(-1, (-1, *[1] * (record.x.ndim - 2)))
                    yield Entry(record.x, record.score() * by_row / losses.numel(), p.copies, True)
                rows = weight.view(-1, *[1] * (record.x.ndim - 2))
                if record.entry is not None and credit.current is not None:  # the filter inside the neuron is done
                    yield Entry(record.entry, credit.current.mul_(rows), p.copies)  # it has no further use
                elif credit.a is not None:
                    yield Entry(record.x, credit.a * (record.slope if unbiased else record.response) * rows, p.copies)
            for end, gradient in p.ends:  # the exact path that meets no spike
                if end.requires_grad:
                    rows = weight.view(-1, *[1] * (end.ndim - (2 if end.ndim >= 3 else 1)))
                    yield Entry(end, gradient * rows * share, None)

    def _signal(self, group: Group, p: Pass) -> Tensor:
        """What the scores of a pass are weighted by, [rows]; by time step [rows, T] with reward-to-go. Of credit
        "feedback" that of the losses without a gradient alone."""
        size, losses, mean = self.estimator.group, group.losses, self.mean_loss
        if self.structure.credit == "feedback":
            losses, mean = group.joined("blind"), self.mean_blind
        if self.estimator.multi_sample:
            return multi_sample_signals(losses)[p.copies].flatten()
        if self.estimator.reward_to_go:
            losses = group.joined("loss_in_time")  # [K, B, T]
            steps = losses.shape[-1]
            mean = None if mean is None else mean / steps
            losses = to_go(losses)
            if mean is not None:
                mean = to_go(mean.expand(steps))
        return (losses[p.copies] - baseline(losses, p.copies, size, mean)).flatten(0, 1)

    def _predictions(self, passes: list[Pass]) -> list[list[Credit]]:
        """Of each record, from its own copy: direct credit plus learned feedback."""
        if self.structure.credit == "global":
            return [[Credit(None, None)] * len(p.records) for p in passes]
        return [[] if p.linked else self.prediction.credit(p) for p in passes]

    def advise_step_sizes(self) -> None:
        """From now on, measures what `rate_factors` needs."""
        self.step_sizes = self.step_sizes or StepSizes()

    def rate_factors(self) -> dict[str, float]:
        """Of the learning rate, by parameter, as steps of `train`'s own optimizer take it (see `stepsize`)."""
        slow = self.began_at_rest and self.structure.has_readout and self.total_steps is not None
        overall = self.step_sizes.at_rest(self.level.progress) if slow else 1.0
        found = self.structure.parameters.items()
        return {name: overall * self.step_sizes.factor(name, sources) for name, sources in found}

    # -- state ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on with the same steps."""
        chosen = self.chosen if self.structure is None else self.structure.weights
        return {
            "step": self.step,
            "forward_passes": self.forward_passes,
            "mean_loss": self.mean_loss,
            "mean_blind": self.mean_blind,
            "noise_starts": dict(self.level.starts),
            "noise_resting": sorted(self.level.resting),
            "noise_floors": dict(self.level.floors),
            "quiet": sorted(self.level.quiet),
            "farthest": dict(self.level.farthest),
            "step_sizes": None if self.step_sizes is None else self.step_sizes.state_dict(),
            "driven": None if self.driven is None else sorted(self.driven),
            "weights": None if chosen is None else {q: asdict(n) for q, n in chosen.items()},
            "feedback": self.feedback.state_dict(),
            "budget": None if self.budget is None else self.budget.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.structure = None  # what the state says of it is taken when the next pass shows it
        self.step, self.forward_passes = state["step"], state["forward_passes"]
        device = next((q.device for q in (*self.model.parameters(), *self.model.buffers())), torch.device("cpu"))
        for name in ("mean_loss", "mean_blind"):
            setattr(self, name, None if state[name] is None else state[name].to(device))
        self.level.starts = dict(state["noise_starts"])
        self.level.resting = set(state["noise_resting"])
        self.level.floors = dict(state.get("noise_floors", {}))
        self.level.quiet = set(state.get("quiet", ()))
        self.level.farthest = {site: d.to(device) for site, d in state.get("farthest", {}).items()}
        if state["step_sizes"] is not None:
            self.advise_step_sizes()
            self.step_sizes.load_state_dict(state["step_sizes"])
        self.driven = None if state["driven"] is None else set(state["driven"])
        self.chosen = None if state["weights"] is None else {q: WeightNoise(**n) for q, n in state["weights"].items()}
        self.feedback.load_state_dict(state["feedback"], device)
        if self.budget is not None and state.get("budget") is not None:
            self.budget.load_state_dict(state["budget"])


def in_sum(estimates: list[Estimate]) -> Estimate:
    """Of a whole sequence, from those of its time steps."""
    loss = torch.stack([estimate.loss for estimate in estimates]).sum(0)
    outputs = torch.cat([estimate.outputs for estimate in estimates], 1)
    stats = {name: value for name, value in estimates[-1].stats.items() if name != "time"}
    skipped = any(estimate.stats.get("skipped") for estimate in estimates)
    return Estimate(loss, outputs, stats | ({"skipped": True} if skipped else {}))


def default_copies(estimator: ULR, structure: Structure) -> int:
    """Copies of a step that refreshes nothing; the least, where their number follows the variance."""
    if isinstance(estimator.copies, AdaptiveCopies):
        return estimator.copies.least
    return estimator.copies or DEFAULT_COPIES["global" if structure.judging.blind else structure.credit]


def observed(
    forward: Forward,
    p: Pass,
    estimator: ULR,
    x: Tensor,
    targets: Tensor,
    lengths: Tensor | None,
    objective: Objective,
    driven: set[str] | None = None,
    weights: Mapping[str, WeightNoise] | None = None,
) -> Structure:
    """What the pass p of one copy, made by `forward`, shows, and which parameters get noise of their own.

    driven: sites that see the events otherwise than by spikes, where it is known; weights: the noise of these
    parameters, where it has been chosen.
    """
    model = forward.model
    forward.judging = judging_of(objective, p, estimator.credit, estimator.noise, model)
    forward.judging = replace(forward.judging, in_time=estimator.reward_to_go)
    if forward.judging.smoothed or forward.judging.in_time:
        p.judgement = forward.judge(p.outputs, p.activity, targets, lengths, objective, p.copies)
    else:
        p.judgement = replace(p.judgement, judging=forward.judging)
    structure = Structure.of(
        model,
        p,
        estimator.credit,
        estimator.maps,
        estimator.time_functions,
        lambda: forward.driven_by_events(x, lengths, p) if driven is None else driven,
        lambda sites: forward.read_by_nobody(x, lengths, p, sites),
    )

    def outcome() -> Tensor:
        forward.extra_passes += 1
        return forward.run(x, targets, lengths, objective, p.copies).outputs.detach()

    structure.judging = forward.judging
    if estimator.maps == "exact" and (pairs := [(a, b) for a, paths in structure.feeds.items() for b in paths]):
        raise UsageError(
            f"ULR got maps='exact', but no derivative leads from the spikes of {pairs[0][0]} to the current of "
            f"{pairs[0][1]}; use maps='auto'"
        )
    if weights is None:
        weights = choose(model, estimator.noise, structure.untrained, outcome)
        if estimator.credit == "auto" and structure.credit == "global":
            for record in p.records:
                calmer = calmer_weights(model, record, structure.parameters, estimator.noise)
                weights |= dict.fromkeys(calmer, BY_SAMPLE)
    structure.weights = dict(weights)
    structure.parameters |= {name: [SOURCE] for name in structure.weights}
    if estimator.layerwise and structure.weights:
        raise UsageError("ULR got layerwise, but parameters have noise of their own (see plan); use one alone")
    if estimator.multi_sample and structure.judging.blind and structure.credit == "feedback":
        raise UsageError("ULR got multi_sample, and of the mix a loss has no gradient; use credit='global'")
    return structure


def enter(entries: list[tuple[Tensor, Tensor]], wanted: list[Tensor]) -> None:
    """Adds to the `.grad` of what is wanted the gradients that enter the graph at these tensors."""
    if wanted and entries:
        torch.autograd.backward(*zip(*entries, strict=True), inputs=wanted)


def _stack_outputs(passes: list[Pass]) -> Tensor:
    batch = passes[0].loss.shape[1]
    dim = 1 if passes[0].outputs.ndim >= 3 else 0
    copies = torch.cat([p.outputs.detach().unflatten(dim, (-1, batch)) for p in passes], dim)
    return copies.transpose(0, dim)


def or_default(estimator: ULR | None) -> ULR:
    """`ULR()` where none is given. Raises UsageError for what is no estimator."""
    if estimator is not None and not hasattr(estimator, "attach"):
        raise UsageError(f"{estimator!r} is no estimator; give an object such as ulr_snn.ULR(credit='global')")
    return estimator or ULR()


def attach(
    model: nn.Module,
    estimator: ULR | None = None,
    loss: LossSpec = "ce_count",
    seed: int = 0,
    time_first: bool = True,
    total_steps: int | None = None,
) -> Attachment:
    """For one's own loop: `with attach(model) as ulr: ... estimate = ulr.backward(x, y); optimizer.step()`.

    total_steps: length of the training, over which the firing noise is annealed; without it the noise stays at
    the geometric mean of its first and last level.
    loss: a name (see `ulr_snn.losses.named`) or a callable (outputs, targets) -> [B].
    Raises UsageError if nothing in the model can get noise; where modules of one's own may, the first `backward` tells.
    """
    return or_default(estimator).attach(model, loss, seed, time_first, total_steps)
