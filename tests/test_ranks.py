"""Ranks of torch.distributed train as one process does on their joined batch (tests/ranked.py has the cases)."""

import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from tests import ranked
from tests.helpers import beside_torchvision, library_of
from ulr_snn import UsageError, attach
from ulr_snn.estimators.base import Attachment
from ulr_snn.kernels import ranks
from ulr_snn.runs import order

FAST = [
    *("default", "single precision", "convolutional", "learned maps", "from outputs", "residual", "adaptive"),
    *("currents", "weights by sample", "online, learned maps", "time chunks", "weighted loss", "unlabelled"),
    *("unlabelled, surrogate", "surrogate", "written out"),
]
SLOW = [name for name in (*ranked.CASES, *ranked.LIBRARIES) if name not in FAST]
Found = Callable[[str], list[Any]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def found_by_ranks(factory: pytest.TempPathFactory, kind: str, names: list[str]) -> Found:
    """Runs all cases in two processes, once for all workers of pytest-xdist. Returns what both ranks found by name."""
    base = factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"ranks-{kind}"
    try:
        path.mkdir()
    except FileExistsError:
        until = time.monotonic() + 300
        while not (path / "done").exists() and time.monotonic() < until:
            time.sleep(0.1)
    else:
        try:
            torch.multiprocessing.spawn(ranked.run, (2, free_port(), names, str(path)), nprocs=2)
        finally:
            (path / "done").touch()
    return lambda name: [loaded(path / f"{name}.{rank}") for rank in range(2)]


def loaded(path: Path) -> Any:
    """What a rank found; None if it left before."""
    found = torch.load(path, weights_only=False) if path.exists() else None
    assert not (isinstance(found, str) and found.startswith("Traceback")), found
    return found


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return found_by_ranks(tmp_path_factory, "fast", [*FAST, *ranked.SCENES])


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return found_by_ranks(tmp_path_factory, "slow", [*SLOW, *ranked.LOOPS])


def leaves(tree: Any) -> list[Tensor]:
    """All tensors and numbers of a tree, in order."""
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree, key=str) for leaf in leaves(tree[key])]
    if isinstance(tree, list | tuple):
        return [leaf for part in tree for leaf in leaves(part)]
    if isinstance(tree, Tensor | int | float):
        return [torch.as_tensor(tree)]
    assert tree is None or isinstance(tree, str), type(tree)
    return []


def assert_equal(tree: Any, other: Any) -> None:
    assert len(leaves(tree)) == len(leaves(other))
    for one, two in zip(leaves(tree), leaves(other), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


def assert_close(tree: Any, other: Any, tolerance: float = 1e-9) -> None:
    """Equal up to rounding, in the norm of each tensor."""
    assert len(leaves(tree)) == len(leaves(other))
    for one, two in zip(leaves(tree), leaves(other), strict=True):
        assert one.shape == two.shape
        assert (one.double() - two.double()).norm() <= tolerance * (two.double().norm() + 1e-3)


def check(found: Found, name: str) -> None:
    first, second = map(asdict, found(name))
    assert_equal(first, second)
    case = (ranked.CASES | ranked.LIBRARIES)[name]
    alone = asdict(ranked.outcome(case, 1, 0))
    assert any(g.any() for g in leaves(alone["gradients"]))
    assert_close(first, alone, 1e-9 if case.dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("name", FAST)
def test_ranks_train_as_one_process_on_the_joined_batch(fast: Found, name: str) -> None:
    check(fast, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_ranks_train_as_one_process_in_every_way(slow: Found, name: str) -> None:
    if name in ranked.LIBRARIES:
        library_of({"norse": "norse.torch"}.get(name, name))
    check(slow, name)


def test_a_wrapped_model_gets_the_gradient_of_the_joined_batch(fast: Found) -> None:
    (first, restored), (second, _) = fast("wrapped")
    assert_equal(first, second)
    assert_close(first, ranked.wrapped(1, 0)[0])
    assert restored is True  # DistributedDataParallel averages again once the attachment is closed


def test_gradients_add_up_and_averaging_by_hand_changes_nothing(fast: Found) -> None:
    first, second = fast("accumulated")
    assert_equal(first, second)
    assert_equal(*first)
    assert_close(first[0], ranked.accumulated(1, 0)[0])


def test_batch_norm_has_the_statistics_of_each_share(fast: Found) -> None:
    first, second = fast("normed")
    assert_equal(first, second)  # running statistics are averaged over ranks
    alone = ranked.normed(1, 0)
    assert_close(first[0], alone[0])  # since both shares have the same statistics
    assert_close(first[2:], alone[2:])
    mean, variance, *_ = (buffer for buffer in first[1] if buffer.ndim)
    joined_mean, joined_variance, *_ = (buffer for buffer in alone[1] if buffer.ndim)
    assert_close(mean, joined_mean)
    count = 3 * ranked.STEPS * 16  # numbers of a channel on each rank; the running variance is unbiased
    assert_close(variance - 0.9, (joined_variance - 0.9) * (2 * count - 1) / (2 * (count - 1)))


def test_a_loss_that_is_not_finite_on_one_rank_counts_for_all(fast: Found) -> None:
    first, second = fast("not_finite")
    values, others = ([x for x in found if not isinstance(x, str)] for found in (first, second))
    assert_equal(values, others)
    errors = [x for x in first if isinstance(x, str)]
    kinds = [[x.partition(":")[0] for x in found if isinstance(x, str)] for found in (first, second)]
    assert kinds[0] == kinds[1]
    assert "a sample of another process" in " ".join(
        x for found in (first, second) for x in found if isinstance(x, str)
    )
    skipped, stopped, peer = errors[:3], errors[3:6], errors[6:]
    assert skipped == ["", "", ""]
    assert_close(first[3], ranked.not_finite(1, 0)[3])
    assert stopped[0] == peer[0] == "" and stopped[1].startswith("FloatingPointError: the loss of")
    assert peer[1].startswith("FloatingPointError")
    assert stopped[2] == peer[2] == ""


def test_all_ranks_begin_as_the_first_one(fast: Found) -> None:
    first, second = fast("different_start")
    assert_equal(first, second)
    assert_close(first, ranked.different_start(1, 0))


def test_batches_that_do_not_fit_are_refused_on_all_ranks(fast: Found) -> None:
    first, second = fast("refused")
    assert first[0] == second[0]
    assert first[0].startswith(f"UsageError: ranks 0 and 1 got batches of {ranked.STEPS} and {ranked.STEPS - 1} time")
    assert "rank 1 of 2 stopped at an error before the step" in first[1] and "UsageError: events contain" in second[1]
    assert first[2] == second[2] == ""
    assert "another noise trains 2.weight" in first[3]
    assert "sharded by FSDP" in first[4]


def test_copies_spread_over_ranks_send_only_losses(fast: Found) -> None:
    (first, passes, sizes), (second, *_) = fast("spread")
    assert_equal(first, second)
    alone, passes_alone, _ = ranked.spread(1, 0)
    assert_close(first, alone)
    assert passes == passes_alone
    assert sizes == [8 * ranked.BATCH]


def test_a_step_has_one_all_reduce_of_gradients(fast: Found) -> None:
    sizes, none, numbers, parameters = fast("traffic")[0]
    assert sizes[-1] == numbers + parameters and sum(sizes[:-1]) < 10 and len(sizes) <= 5
    assert none == []


def test_one_rank_may_plan_and_measure_alone(fast: Found) -> None:
    assert fast("on_one_rank") == [([0, 1], [1.0, 2.0], [True, False])] * 2


def test_shares_of_a_loader_join_to_its_batches(fast: Found) -> None:
    (epochs, length, early, error), (others, _, same, own) = fast("loaded")
    loader = DataLoader(range(21), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    expected = [[batch.tolist() for batch in loader if len(batch) > 1] for _ in range(2)]
    assert [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(epochs, others, strict=True)] == expected
    assert length == len(expected[0]) == 5
    assert early == same == [0, 1, 2]
    assert error.startswith("RankError") and own == "OSError: no such recording"


def test_a_rank_that_leaves_ends_the_others_with_one_error(fast: Found) -> None:
    left, gone = fast("deserted")
    assert gone is None
    assert left == "RankError: rank 0 of 2 lost the others: one has stopped or does not answer; see its own error"


@pytest.mark.slow
@pytest.mark.parametrize("name", ranked.LOOPS)
def test_loops_of_libraries_train_on_the_joined_batch(slow: Found, name: str) -> None:
    beside_torchvision({"accelerated": "accelerate"}.get(name, name))
    first, second = slow(name)
    assert_equal(first, second)
    assert_close(first, ranked.LOOPS[name](1, 0))


# -- in one process ----------------------------------------------------------------------------------------


def test_one_process_talks_to_nobody() -> None:
    assert ranks.count() == 1 and ranks.rank() == 0 and ranks.share() is None
    loader = DataLoader(range(3))
    assert ranks.shared(loader) is loader and list(ranks.together([1, 2])) == [1, 2]
    assert ranks.agree([True, False]) == [True, False] and ranks.gathered("x") == ["x"]


def test_shares_tell_their_sampler_the_epoch_and_show_its_generator() -> None:
    sampler = DistributedSampler(range(8), num_replicas=2, rank=0)
    shares = ranks.Shares(DataLoader(range(8), 2, sampler=sampler).batch_sampler)
    order.set_epoch(DataLoader(range(8), batch_sampler=shares), 5)
    assert sampler.epoch == 4
    generator = torch.Generator()
    shuffled = DataLoader(range(8), 2, shuffle=True, generator=generator)
    held = order.held(DataLoader(range(8), batch_sampler=ranks.Shares(shuffled.batch_sampler)))
    assert list(held.values()) == [generator]  # a checkpoint has it


def test_models_on_several_devices_are_refused() -> None:
    with pytest.raises(UsageError, match="DataParallel would split the time axis"):
        attach(nn.DataParallel(ranked.dense()))


def test_an_attachment_that_does_not_average_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "count", lambda: 2)
    with pytest.raises(UsageError, match="Attachment does not average its gradients over the 2 ranks"):
        Attachment(ranked.dense(), "ce_count", True)
