"""The attachment of `ULR` and `Online`: binds the model for a step, which a `Memory` object makes."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.credit.structure import Structure
from ulr_snn.errors import UsageError
from ulr_snn.estimators.base import Attachment, Estimate, in_sum
from ulr_snn.estimators.config import Config, in_one_product
from ulr_snn.estimators.learner import Learner
from ulr_snn.estimators.observe import warnings_of
from ulr_snn.kernels import ranks
from ulr_snn.kernels.pool import Pool
from ulr_snn.losses.named import LossSpec, resolve
from ulr_snn.memory.step import Memory, Step
from ulr_snn.model.batch import Batch
from ulr_snn.model.bound import Binder, BoundModel
from ulr_snn.model.interface import Interface
from ulr_snn.model.mode import trainable
from ulr_snn.sites.binding import check_layers, open_modules, spiking_layers
from ulr_snn.sites.flow import check_flow, frozen, hooks_once, with_flow
from ulr_snn.sites.weights import check_names


class LearnedAttachment(Attachment):
    """Adds likelihood-ratio gradients to `.grad`. The model is bound only inside a step.

    learner: state that steps change; memory: what a step keeps; binder: binds the model.
    """

    over_ranks = True

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        memory: Memory,
        loss: LossSpec,
        seed: int,
        interface: Interface,
        total_steps: int | None = None,
        progress: float | None = None,
        rates: bool = False,
    ) -> None:
        super().__init__(model, loss, interface)
        check_names(model, config.noise)
        check_flow(model, config.flow)
        self.config = config.with_noise(with_flow(model, config.flow, config.noise))
        check_layers(model, spiking_layers(model), [*open_modules(model), *self.config.noise])
        self.memory, self.online, self.on_nonfinite = memory, memory.online, config.on_nonfinite
        self.binder = Binder(model, self.config.noise, plain=in_one_product(config))
        self.learner = Learner(self.config, seed, total_steps, progress, rates)
        self.pool = Pool(lean=memory.lean)
        self._bound: BoundModel | None = None
        self._loss: LossSpec | None = None  # of the last step
        self._warned: set[str] = set()
        self._begun = False  # the ranks of a distributed run have one model and one seed

    @property
    def bound(self) -> BoundModel | None:
        """The bound model of the last step; None before it."""
        return self._bound

    @property
    def structure(self) -> Structure | None:
        """The structure observed in the first pass; None before it."""
        return self.learner.structure

    def backward(self, x: Any, targets: Any, loss: LossSpec | None = None, lengths: Tensor | None = None) -> Estimate:
        return in_sum(list(self.steps(x, targets, loss, lengths)))

    def steps(
        self, x: Any, targets: Any, loss: LossSpec | None = None, lengths: Tensor | None = None
    ) -> Iterator[Estimate]:
        known = self.structure
        with self._ready(), ranks.joint(self.model, gradients=not self.online):
            if any(True for _ in self.model.parameters()):  # they may have been frozen since
                trainable(self.model)
            if not self._begun:
                self.learner.seed, self._begun = ranks.same_start(self.model, self.learner.seed), True
            step = self.prepared(x, targets, loss, lengths)
            step = self._met(step)
            share = ranks.share()
            estimates = self.memory.estimates(step)
        self.forward_passes = self.learner.forward_passes
        if self.structure is not known:
            self._warn(step)
        return self._each(estimates, share) if self.online else iter(estimates)

    def _each(self, estimates: Iterable[Estimate], share: ranks.Share | None) -> Iterator[Estimate]:
        """Yields estimates that are made one by one, between updates of the caller."""
        going = iter(estimates)
        while True:
            with self._ready(), ranks.joint(self.model, share):
                estimate = next(going, None)
            if estimate is None:
                return
            yield estimate

    def _met(self, step: Step) -> Step:
        """Joins the batches of all ranks, if there are several. If the model is new to one, all observe it again.
        All layers then have the units of the first batch."""
        batch, layers = step.batch, [name for name, _ in step.bound.layers]
        known, padded = self.structure is not None, batch.lengths is not None
        own = batch.samples, batch.steps, padded, self.learner.step, batch.targets.share
        if not ranks.meet(*own, known, layers):
            self.learner.observe_again()
        self.learner.keep_units(step.bound.layers)
        return replace(step, batch=batch.joined())

    def _warn(self, step: Step) -> None:
        """Gives each warning about the model and the loss once."""
        for warning in warnings_of(step.structure, step.copies()):
            if warning not in self._warned:
                self._warned.add(warning)
                warnings.warn(warning, stacklevel=4)

    def stream(self, *batch: Any, **options: Any) -> Iterator[Estimate]:
        """Deprecated name of `steps`."""
        if not self.online:
            raise UsageError(
                "ulr.stream is for updates at every time step; attach with ulr_snn.Online(), and use steps"
            )
        warnings.warn("ulr.stream is deprecated; use ulr.steps", DeprecationWarning, stacklevel=2)
        return self.steps(*batch, **options)

    def prepared(self, x: Any, targets: Any, loss: LossSpec | None, lengths: Tensor | None = None) -> Step:
        """Returns the next step on this batch, with the model bound."""
        loss, learner = self.loss if loss is None else loss, self.learner
        if loss != self._loss:  # another loss may reach the outputs in another way
            if self._loss is not None:  # else the choice comes from a checkpoint
                learner.chosen = None
            learner.observe_again()
            self._loss = loss
        given = Batch.of(self.model, x, targets, lengths, resolve(loss), self.interface)
        bound, batch = self.binder.bound(given)
        if bound is not self._bound:
            check_flow(bound.model, self.config.flow, bound.layers)
            learner.observe_again()
            self._bound = bound
        learner.level.progress = learner.progress
        return Step(self.config, learner, bound, batch)

    def learning_rates(self) -> dict[str, float]:
        return self.learner.learning_rates()

    def state_dict(self) -> dict[str, Any]:
        return self.learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = next((q.device for q in (*self.model.parameters(), *self.model.buffers())), torch.device("cpu"))
        self.learner.load_state_dict(state, device)
        self.forward_passes = self.learner.forward_passes

    def close(self) -> None:
        if self.structure is not None:
            self.learner.chosen = self.structure.weights  # the choice of weight noise stays
        self.learner.observe_again()
        self.pool.clear()
        super().close()

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Freezes parameters, takes memory from the pool, enables autograd, and holds hooks of parameters back, for the
        time of the context."""
        model = self.model
        with frozen(model, self.config.flow), torch.enable_grad(), hooks_once(model), self.pool.used():
            yield


class Attaches:
    """The base of `ULR` and `Online`, which differ in their configuration and `Memory` object."""

    @property
    def config(self) -> Config:
        """The configuration that training steps read."""
        raise NotImplementedError

    @property
    def strategy(self) -> Memory:
        """What a training step keeps."""
        raise NotImplementedError

    def attach(
        self,
        model: nn.Module,
        loss: LossSpec,
        seed: int,
        interface: Interface,
        total_steps: int | None = None,
        *,
        progress: float | None = None,
        rates: bool = False,
    ) -> LearnedAttachment:
        """Returns the attachment; see `Estimator.attach`."""
        options = loss, seed, interface, total_steps, progress, rates
        return LearnedAttachment(model, self.config, self.strategy, *options)
