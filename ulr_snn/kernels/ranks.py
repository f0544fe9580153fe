"""The processes of a run on torch.distributed, called ranks, and everything that travels between them.

Every rank runs a training step on its own share of a joined batch, which is the ranks' shares in order of rank:

    joint(model)        the context of a step. At its end the ranks' gradients are averaged, in one all-reduce.
    meet(...)           the ranks tell each other how large their shares are. From then on, noise is keyed by the index
                        of a sample in the joined batch, and all statistics are those of the joined batch.
    sums, greatest, averaged, mean, std, anywhere, everywhere, own, filled
                        the statistics. Outside of a joint step they are those of this process alone.

Every rank computes a mean over its own samples, which `averaged` weights by the rank's share of the joined batch. All
ranks get the same bits, so that what they decide and learn stays equal. Without a process group nothing is copied.
"""

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import DataLoader, Sampler

from ulr_snn.errors import RankError, UsageError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Share:
    """A rank's share of a joined batch. sizes: samples of every rank; key: index of the first own sample for noise;
    padded: some rank has lengths; labelled: number of samples of the joined batch that have a label; once: values that
    are computed once in a step."""

    rank: int
    sizes: tuple[int, ...]
    key: int
    padded: bool
    labelled: int
    once: dict[Any, Any] = field(default_factory=dict, compare=False)

    @property
    def samples(self) -> int:
        return self.sizes[self.rank]

    @cached_property
    def first(self) -> int:
        """Index of the first own sample in the joined batch."""
        return sum(self.sizes[: self.rank])

    @cached_property
    def total(self) -> int:
        """Number of samples of the joined batch."""
        return sum(self.sizes)

    @property
    def weight(self) -> float:
        """Weight of a mean over the own samples in the mean over the joined batch."""
        return self.samples / self.total


class _Joint:
    """A joint step of all ranks. share: None until the ranks have met; gradients: they are averaged at the end."""

    def __init__(self, share: Share | None, gradients: bool) -> None:
        self.share, self.gradients = share, gradients


_joint: ContextVar[_Joint | None] = ContextVar("joint", default=None)
_alone: ContextVar[bool] = ContextVar("alone", default=False)


# -- the run -----------------------------------------------------------------------------------------------


def count() -> int:
    """Returns the number of ranks; 1 without a process group, and within `alone`."""
    ready = dist.is_available() and dist.is_initialized() and not _alone.get()
    return dist.get_world_size() if ready else 1


def rank() -> int:
    """Returns the number of this rank, from 0."""
    return dist.get_rank() if count() > 1 else 0


@contextmanager
def alone() -> Iterator[None]:
    """Within this context, this process works by itself, whatever other ranks do."""
    tokens = _alone.set(True), _joint.set(None)
    try:
        yield
    finally:
        _alone.reset(tokens[0])
        _joint.reset(tokens[1])


@contextmanager
def launched(device: torch.device, timeout: float = 600.0) -> Iterator[int]:
    """Joins the process group that `torchrun` asks for, and leaves it at the end. Yields the rank; 0 without torchrun.

    device: kind of device that trains. On CUDA, each rank uses the device of its local number. timeout: seconds after
    which a rank that does not answer ends the others.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or not dist.is_available() or dist.is_initialized():
        yield rank()
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


@contextmanager
def _talking() -> Iterator[None]:
    """Turns a failure of torch.distributed into a `RankError`."""
    try:
        yield
    except RuntimeError as error:
        own, world = dist.get_rank(), dist.get_world_size()
        words = f"rank {own} of {world} lost the others: one has stopped or does not answer; see its own error"
        raise RankError(words) from error


def _device() -> torch.device:
    """Returns the device on which small messages travel."""
    nccl = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def _all_reduced(tensors: Sequence[Tensor], operation: Any) -> list[Tensor]:
    """Reduces tensors over the ranks. There is one all-reduce for all tensors of a dtype and device."""
    found = [tensor.detach() for tensor in tensors]
    for kind in dict.fromkeys((x.dtype, x.device) for x in found):
        places = [i for i, x in enumerate(found) if (x.dtype, x.device) == kind]
        flat = torch.cat([found[i].reshape(-1) for i in places])
        with _talking():
            dist.all_reduce(flat, operation)
        for i, part in zip(places, flat.split([found[i].numel() for i in places]), strict=True):
            found[i] = part.view(found[i].shape)
    return found


def agree(flags: Sequence[bool]) -> list[bool]:
    """Returns for each flag whether it is True on any rank. All ranks must call it."""
    if count() == 1:
        return list(flags)
    given = torch.tensor(flags, dtype=torch.float32, device=_device())
    return [value > 0 for value in _all_reduced([given], dist.ReduceOp.MAX)[0].tolist()]


def totals(values: Sequence[float]) -> list[float]:
    """Returns the sums of numbers over all ranks. All ranks must call it."""
    if count() == 1:
        return list(values)
    given = torch.tensor(values, dtype=torch.float64, device=_device())
    return _all_reduced([given], dist.ReduceOp.SUM)[0].tolist()


def gathered(value: Item) -> list[Item]:
    """Returns the values of all ranks, in order of rank, such as generator states. All ranks must call it."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    with _talking():
        dist.all_gather_object(found, value)
    return found


def barrier() -> None:
    """Waits until all ranks have called it."""
    agree([False])


# -- data --------------------------------------------------------------------------------------------------


class Shares(Sampler[list[Any]]):
    """A batch sampler that gives each rank its own share of every batch of another batch sampler, in order.

    All ranks draw the same batches from it, so its order must follow a generator with the same seed on all ranks. A
    last batch with fewer samples than ranks is left out.
    """

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[Any]]:
        size, mine = count(), rank()
        for batch in self.batches:
            if len(batch) >= size:
                yield list(batch)[len(batch) * mine // size : len(batch) * (mine + 1) // size]

    def __len__(self) -> int:
        whole = len(self.batches)
        sampler, size = getattr(self.batches, "sampler", None), getattr(self.batches, "batch_size", None)
        if sampler is None or not size or getattr(self.batches, "drop_last", False):
            return whole
        return whole - (0 < len(sampler) % size < count())

    def set_epoch(self, epoch: int) -> None:
        for sampler in (self.batches, getattr(self.batches, "sampler", None)):
            if callable(told := getattr(sampler, "set_epoch", None)):
                told(epoch)


OPTIONS = (
    *("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator"),
    *("prefetch_factor", "persistent_workers"),
)


def shared(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Returns a loader of this rank's shares of the loader's batches. The joined batches are those of the loader. With
    one process it is the loader itself."""
    if count() == 1:
        return loader
    if loader.batch_sampler is None:
        raise UsageError("the loader makes no batches of samples, so that it has none to share; give each rank its own")
    options = {name: getattr(loader, name) for name in OPTIONS}
    return DataLoader(loader.dataset, batch_sampler=Shares(loader.batch_sampler), **options)


def together(batches: Iterable[Item]) -> Iterator[Item]:
    """Yields batches as long as every rank has one. If a rank's loader raises, the other ranks raise `RankError`."""
    if count() == 1:
        yield from batches
        return
    source, end = iter(batches), object()
    while True:
        try:
            batch: Any = next(source, end)
        except Exception:
            with suppress(RankError):
                agree([True, True])
            raise
        ended, failed = agree([batch is end, False])
        if failed:
            raise RankError(f"rank {rank()} of {count()} stops, since the loader of another rank raised an error")
        if ended:
            return
        yield batch


# -- models ------------------------------------------------------------------------------------------------


def unwrapped(model: Any) -> Any:
    """Returns the module inside DistributedDataParallel or torch.compile, whose compiled code would be made anew for
    each step's noise, and any other model as it is. Raises UsageError for a model that is cut into parts, or copied
    onto several devices."""
    if isinstance(model, DistributedDataParallel):
        return unwrapped(model.module)
    compiled = getattr(model, "_orig_mod", None)  # torch has no public name for it
    if isinstance(model, nn.Module) and isinstance(compiled, nn.Module):
        return unwrapped(compiled)
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if kinds & {"FullyShardedDataParallel", "FSDPModule"}:
        raise UsageError(
            "the model is sharded by FSDP, and ulr_snn needs whole parameters on every rank; use "
            "DistributedDataParallel, or the plain model on every rank"
        )
    if isinstance(model, DataParallel):
        raise UsageError(
            "DataParallel would split the time axis of the events; start one process for each device by torchrun, with "
            "the plain model in each"
        )
    return model


@torch.no_grad()
def same_start(model: nn.Module, seed: int) -> int:
    """Gives all ranks the parameters and buffers of rank 0, as DistributedDataParallel does, and returns the seed of
    rank 0. Outside of `joint` it does nothing."""
    if _joint.get() is None:
        return seed
    tensors = [x for x in (*model.parameters(), *model.buffers()) if not x.is_meta]
    for kind in dict.fromkeys((x.dtype, x.device) for x in tensors):
        own = [x for x in tensors if (x.dtype, x.device) == kind]
        flat = torch.cat([x.detach().reshape(-1) for x in own])
        with _talking():
            dist.broadcast(flat, 0)
        if dist.get_rank():
            for x, part in zip(own, flat.split([x.numel() for x in own]), strict=True):
                x.copy_(part.view(x.shape))
    seeds = [seed]
    with _talking():
        dist.broadcast_object_list(seeds, 0, device=_device())
    return seeds[0]


# -- a joint step ------------------------------------------------------------------------------------------


def share() -> Share | None:
    """Returns this rank's share of the joined batch of the running step; None outside of a joint step."""
    joint = _joint.get()
    return None if joint is None else joint.share


@contextmanager
def joint(model: nn.Module, met: Share | None = None, gradients: bool = True) -> Iterator[None]:
    """Within this context, all ranks make one step together, once they `meet`. At its end, what the step has added to
    `.grad` is averaged over the ranks. met: the share, if the ranks have met before; gradients: there are any."""
    if count() == 1:
        yield
        return
    running = _Joint(met, gradients)
    token = _joint.set(running)
    parameters = [q for q in model.parameters() if q.requires_grad] if gradients else []
    before = [q.grad for q in parameters]
    for q in parameters:
        q.grad = None
    try:
        yield
        if running.gradients:
            _average_gradients(parameters, _running_statistics(model))
        for q, old in zip(parameters, before, strict=True):
            if old is not None:
                q.grad = old if q.grad is None else old.add_(q.grad)
    except BaseException as error:
        for q, old in zip(parameters, before, strict=True):
            q.grad = old
        if running.share is None and isinstance(error, Exception) and not isinstance(error, RankError):
            with suppress(RankError):
                _exchanged([False, 0, 0, False, 0, False, 0, 0])
        raise
    finally:
        _joint.reset(token)


def _running_statistics(model: nn.Module) -> list[Tensor]:
    """Returns the running means and variances that batch norm updates."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    found = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
    return [buffer for buffer in found if buffer is not None]


@torch.no_grad()
def _average_gradients(parameters: list[nn.Parameter], statistics: list[Tensor]) -> None:
    """Averages gradients and running statistics over the ranks. A parameter keeps None if no rank has a gradient."""
    if not parameters and not statistics:
        return
    like = parameters[0] if parameters else statistics[0]
    present = torch.tensor([float(q.grad is not None) for q in parameters], dtype=like.dtype, device=like.device)
    gradients = [torch.zeros_like(q) if q.grad is None else q.grad.to_dense() for q in parameters]
    *found, present = averaged([*gradients, *statistics, present])
    for q, gradient, reached in zip(parameters, found, present.tolist(), strict=False):
        q.grad = gradient if reached else None
    for buffer, value in zip(statistics, found[len(parameters) :], strict=True):
        buffer.copy_(value)


def _exchanged(numbers: list[int]) -> list[list[int]]:
    """Returns the numbers of every rank: no error so far, and the arguments of `meet`."""
    own = torch.tensor(numbers, dtype=torch.int64, device=_device())
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    with _talking():
        dist.all_gather(found, own)
    return torch.stack(found).tolist()


def meet(
    samples: int,
    steps: int,
    padded: bool,
    step: int,
    labelled: Tensor | None = None,
    known: bool = True,
    layers: Iterable[str] = (),
) -> bool:
    """Exchanges the sizes of the ranks' shares. Outside of `joint` it does nothing. Returns whether all ranks `know`.

    samples, steps: size of the own batch; padded: it has lengths; step: number of steps so far; labelled: the share of
    its samples that have a label, None for targets without labels; known: the model has been observed; layers: names
    of the layers that get noise. Raises UsageError if the ranks' batches or layers do not
    fit together, and RankError if a rank has no batch because of an error.
    """
    running = _joint.get()
    if running is None:
        return known
    with_label = samples if labelled is None else round(samples * labelled.item())
    names = zlib.crc32(" ".join(layers).encode())
    rows = _exchanged([True, samples, steps, padded, step, known, names, with_label])
    sizes, own = tuple(row[1] for row in rows), rank()
    running.share = Share(own, sizes, sum(sizes[:own]), any(row[3] for row in rows), sum(row[7] for row in rows))
    failed = [number for number, row in enumerate(rows) if not row[0]]
    if failed:
        raise RankError(f"rank {failed[0]} of {len(rows)} stopped at an error before the step, see its own message")
    check_alike([row[2] for row in rows], "got batches of {} and {} time steps; pad them to one length, with lengths")
    check_alike([row[4] for row in rows], "have made {} and {} steps; load the same state on all ranks")
    check_alike([row[6] for row in rows], "find other layers that need noise in the model; name them by noise=")
    return all(row[5] for row in rows)


def check_alike(numbers: Sequence[int], words: str) -> None:
    """Raises UsageError unless a number is the same on all ranks."""
    other = next((number for number, value in enumerate(numbers) if value != numbers[0]), None)
    if other is not None:
        raise UsageError(f"ranks 0 and {other} {words.format(numbers[0], numbers[other])}")


@contextmanager
def of_first(samples: int) -> Iterator[None]:
    """Within this context, the joined batch has only the first `samples` samples of every rank."""
    running = _joint.get()
    if running is None or running.share is None:
        yield
        return
    whole = running.share
    sizes = tuple(min(size, samples) for size in whole.sizes)
    running.share = Share(whole.rank, sizes, whole.key, whole.padded, whole.labelled)
    try:
        yield
    finally:
        running.share = whole


@contextmanager
def one_batch() -> Iterator[tuple[int, int]]:
    """Within this context, all ranks work on the same batch, whose gradient each makes by itself. Yields the rank and
    the number of ranks. Raises UsageError if the ranks' batches have other sizes."""
    running = _joint.get()
    if running is None or running.share is None:
        yield 0, 1
        return
    whole = running.share
    check_alike(whole.sizes, "got {} and {} samples; give all ranks the same batch")
    running.share, running.gradients = None, False
    try:
        yield whole.rank, len(whole.sizes)
    finally:
        running.share = whole


def put_together(values: Tensor) -> Tensor:
    """Returns the sum of values of which each is zero on all ranks but one. All ranks must call it."""
    return values if count() == 1 else _all_reduced([values], dist.ReduceOp.SUM)[0]


# -- indices of samples ------------------------------------------------------------------------------------


def first_sample() -> int:
    """Returns the index by which the noise of the first own sample is keyed."""
    here = share()
    return 0 if here is None else here.key


def joined(rows: int) -> int:
    """Returns the number of rows on all ranks, for rows that are copies of the own samples."""
    here = share()
    return rows if here is None else rows // here.samples * here.total


def largest(samples: int) -> int:
    """Returns the number of samples of the largest share."""
    here = share()
    return samples if here is None else max(here.sizes)


def own(rows: Tensor) -> tuple[Any, Tensor]:
    """Returns which of these rows (copy * samples + sample) of the joined batch are on this rank, and their number
    here."""
    here = share()
    if here is None:
        return slice(None), rows
    copy, sample = rows // here.total, rows % here.total - here.first
    mine = (sample >= 0) & (sample < here.samples)
    return mine, (copy * here.samples + sample)[mine]


def filled(values: Tensor, mine: Any) -> Tensor:
    """Returns values [n, ...] of all rows, from those [m, ...] of the own rows, see `own`."""
    if share() is None:
        return values
    found = values.new_zeros(len(mine), *values.shape[1:])
    found[mine] = values
    return sums(found)[0]


def all_rows(flags: Tensor) -> Tensor:
    """Returns flags [T, rows] of the joined batch, from flags [T, rows] of the own rows, which are True without
    padding."""
    here = share()
    if here is None:
        return flags
    rows = joined(flags.shape[1])
    if not here.padded:
        return torch.ones((), dtype=torch.bool, device=flags.device).expand(len(flags), rows)
    mine, _ = own(torch.arange(rows, device=flags.device))
    return filled(flags.T.to(torch.uint8), mine).T.bool()


# -- statistics of a joined batch --------------------------------------------------------------------------


def sums(*tensors: Tensor) -> list[Tensor]:
    """Returns the sums over the ranks."""
    return list(tensors) if share() is None else _all_reduced(tensors, dist.ReduceOp.SUM)


def greatest(tensor: Tensor) -> Tensor:
    """Returns the elementwise maximum over the ranks. NaN counts as infinite."""
    if share() is None:
        return tensor
    return _all_reduced([tensor.nan_to_num(nan=torch.inf, posinf=torch.inf)], dist.ReduceOp.MAX)[0]


def averaged(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns means over the joined batch, from means over the own samples."""
    here = share()
    return list(tensors) if here is None else sums(*[tensor * here.weight for tensor in tensors])


def mean(values: Tensor) -> Tensor:
    """Returns the mean of values of which every own sample has as many as any other."""
    return averaged([values.mean()])[0]


def std(values: Tensor, correction: int = 0) -> Tensor:
    """Returns the standard deviation of the values of all ranks."""
    if share() is None:
        return values.std(correction=correction)
    wide = values.double()
    size, total = sums(torch.tensor(float(values.numel()), dtype=wide.dtype, device=wide.device), wide.sum())
    return (sums((wide - total / size).square().sum())[0] / (size - correction)).sqrt().to(values.dtype)


def anywhere(*flags: bool) -> list[bool]:
    """Returns for each flag whether it is True on any rank."""
    return list(flags) if share() is None else agree(flags)


def everywhere(*flags: bool) -> list[bool]:
    """Returns for each flag whether it is True on all ranks."""
    return [not flag for flag in anywhere(*(not flag for flag in flags))]


def once(key: Any, compute: Callable[[], Item]) -> Item:
    """Returns what `compute` returned for this key in the running step, outside of joint steps what it returns."""
    here = share()
    if here is None:
        return compute()
    if key not in here.once:
        here.once[key] = compute()
    return here.once[key]
