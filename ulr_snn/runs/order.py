"""The order of data and all random numbers that a training draws: their states, and an epoch begun again in its midst.

Generators are those of torch (CPU and CUDA), NumPy and Python, and those that a loader, its samplers or its data set
hold. An epoch is begun again by the states of its start. The batches before a checkpoint are drawn and left out, which
gives the same rest of the epoch if the loader is a list, or a DataLoader of a data set with a length.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler

from ulr_snn.errors import LoaderError, lost_process, reason

State = dict[str, Any]
SEEK = "look for what it lacks, such as memory, or use num_workers=0"


def states(loader: Iterable[Any]) -> State:
    """Returns the states of all generators, as tensors and plain Python values."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": plain(numpy.random.get_state(legacy=False)),
        "python": random.getstate(),
        "loader": {name: state_of(generator) for name, generator in held(loader).items()},
    }


def restore(found: State, loader: Iterable[Any]) -> None:
    """Sets all generators to these states."""
    torch.set_rng_state(found["torch"])
    if len(found["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(found["cuda"])
    numpy.random.set_state(found["numpy"])
    random.setstate(found["python"])
    for name, generator in held(loader).items():
        if name in found["loader"]:
            set_state(generator, found["loader"][name])


def held(loader: Any) -> dict[str, Any]:
    """Returns the generators that a loader, its samplers and its data set hold, by the names of attributes."""
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def look(owner: Any, path: str) -> None:
        if id(owner) in seen or not hasattr(owner, "__dict__"):
            return
        seen.add(id(owner))
        for name, value in vars(owner).items():
            if isinstance(value, torch.Generator | numpy.random.Generator | numpy.random.RandomState | random.Random):
                if id(value) not in seen:
                    seen.add(id(value))
                    found[f"{path}{name}"] = value
            elif isinstance(value, Sampler) or name in ("dataset", "sampler", "batch_sampler"):
                look(value, f"{path}{name}.")

    look(loader, "")
    return found


def state_of(generator: Any) -> Any:
    """Returns the state of a generator of torch, NumPy or Python."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, numpy.random.Generator):
        return plain(generator.bit_generator.state)
    if isinstance(generator, numpy.random.RandomState):
        return plain(generator.get_state(legacy=False))
    return generator.getstate()


def set_state(generator: Any, state: Any) -> None:
    """Sets a generator to a state that `state_of` gave."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, numpy.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, numpy.random.RandomState):
        generator.set_state(state)
    else:
        generator.setstate(state)


def plain(value: Any) -> Any:
    """Returns a state of NumPy's without arrays."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, numpy.ndarray | numpy.generic) else value


def repeats(loader: Any) -> bool:
    """Returns whether an epoch of the loader gives the same batches for the same states of all generators."""
    if isinstance(loader, DataLoader):
        return not isinstance(loader.dataset, IterableDataset)
    return isinstance(loader, Sequence)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tells samplers which epoch it is, for those such as DistributedSampler that ask for it. epoch: 1, 2, ..."""
    batches: Any = getattr(loader, "batch_sampler", None)
    for owner in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
        if callable(set_own := getattr(owner, "set_epoch", None)):
            set_own(epoch - 1)


def start_workers(loader: Any) -> None:
    """Starts processes that stay for all epochs, for which an uninterrupted run drew seeds in its first epoch alone."""
    if getattr(loader, "persistent_workers", False):
        iter(loader)


def begun(loader: Any, batches: Iterable[Any], start: State, done: int) -> tuple[Iterator[Any], Any]:
    """Returns the rest of an epoch after its first batches, and the last of these; None if there was none.

    batches: the loader, under a progress bar. start: the states at the start of the epoch; all generators go on from
    where they are afterwards.
    """
    if not done:
        return fetched(iter(batches)), None
    now = states(loader)
    restore(start, loader)
    rest = fetched(iter(batches))
    last = None
    for _ in range(done):
        last = next(rest, None)
    restore(now, loader)
    return rest, last


def fetched(batches: Iterator[Any]) -> Iterator[Any]:
    """Gives batches. Raises LoaderError if a process that fetches them has ended."""
    try:
        yield from batches
    except (ConnectionError, EOFError) as error:  # where torch has not noticed yet
        raise LoaderError(f"the loader lost a process ({type(error).__name__}); {SEEK}") from error


def of_loader(error: BaseException) -> BaseException:
    """Returns a LoaderError for what torch raises in the midst of other code if a loader's process ends, and other
    errors as they are."""
    if lost_process(error):
        return LoaderError(f"the loader lost a process ({reason(error)}); {SEEK}")
    return error
