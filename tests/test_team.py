"""Rows that threads share."""

import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ulr_snn.kernels import team

THREADS = 3


@pytest.fixture(autouse=True, params=["threads of torch", "threads of Python"])
def kind(request: pytest.FixtureRequest, some_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    some_threads(THREADS)
    if request.param == "threads of Python":
        monkeypatch.setattr(team, "openmp", lambda: None)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the library of torch on Linux")
def test_torch_lends_its_threads(monkeypatch):
    monkeypatch.undo()
    assert (team.openmp() is not None) == ("OpenMP" in torch.__config__.parallel_info())


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 100])
def test_every_row_has_one_thread(rows):
    seen: list[int] = []
    team.shared(rows, lambda first, end: seen.extend(range(first, end)))
    assert sorted(seen) == list(range(rows))


def test_threads_work_at_the_same_time():
    together = threading.Barrier(THREADS, timeout=20)
    team.shared(THREADS, lambda first, end: together.wait())


def test_sums_add_ranges_in_a_fixed_order():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))

    def add(first, end, out):
        time.sleep(0.01 if first == 0 else 0)
        out += x[first:end].sum(0).numpy()

    found = team.summed(50, (2, 2), add)
    parts = [x[50 * i // THREADS : 50 * (i + 1) // THREADS].sum(0) for i in range(THREADS)]
    assert torch.equal(found, sum(parts[1:], parts[0]).view(2, 2))


@pytest.mark.parametrize("wrong", [0, THREADS - 1])
def test_errors_are_raised_when_all_have_ended(wrong):
    ended = []

    def work(first, end):
        if first == wrong:
            raise ValueError("no such row")
        time.sleep(0.02)
        ended.append(first)

    with pytest.raises(ValueError, match="no such row"):
        team.shared(THREADS, work)
    assert len(ended) == THREADS - 1
    test_every_row_has_one_thread(7)


def test_an_interrupt_is_raised():
    main = threading.get_ident()

    def work(first, end):
        if threading.get_ident() == main:
            signal.raise_signal(signal.SIGINT)
        time.sleep(0.02)

    with pytest.raises(KeyboardInterrupt):
        team.shared(THREADS, work)
    test_every_row_has_one_thread(7)


def test_an_interrupt_before_the_work_is_not_lost(monkeypatch):
    def without_this_thread(task, *_):
        other = threading.Thread(target=task, args=(None,))
        other.start()
        other.join()

    monkeypatch.setattr(team, "openmp", lambda: without_this_thread)
    with pytest.raises(KeyboardInterrupt):
        team.shared(THREADS, lambda first, end: None)


def test_threads_of_several_callers():
    def caller(_: int) -> list[int]:
        seen: list[int] = []
        for _ in range(20):
            team.shared(10, lambda first, end: seen.extend(range(first, end)))
        return sorted(seen)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(caller, range(4))) == [sorted([*range(10)] * 20)] * 4
