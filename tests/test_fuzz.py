"""Damaged recordings: each file gives consistent events or one sentence that names it, in bounded time and memory."""

import os
import random
import re
import struct
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import recordings
from tests.recordings import FILES, LIBRARIES
from ulr_snn import UsageError, data
from ulr_snn.data import cache, child, readers
from ulr_snn.data.binning import CELL, Binned, bin_chunk
from ulr_snn.data.registry import ENTRIES

FORMATS = [name for name in FILES if name != "ssc"]  # which is SHD's
MEMORY = 2**26


@pytest.fixture(params=FORMATS)
def name(request) -> str:
    pytest.importorskip(LIBRARIES[request.param])
    return request.param


@pytest.fixture(autouse=True)
def seconds(monkeypatch):
    monkeypatch.setattr(child.limits, "seconds", 2.0)
    yield
    child.close()


def read(name: str, root: Path) -> None:
    """Reads all recordings and checks that they are consistent."""
    raw = ENTRIES[name].find(root).read()
    for chunks in raw.splits.values():
        for chunk in chunks:
            assert len(chunk.time) == len(chunk.feature) == chunk.offsets[-1] and (np.diff(chunk.offsets) >= 0).all()
            assert chunk.time.min(initial=0) >= 0 and chunk.time.max(initial=0) < 2**31
            assert chunk.feature.min(initial=0) >= 0 and chunk.feature.max(initial=0) < prod(raw.sample_shape)
            assert chunk.labels.min() >= 0 and chunk.labels.max() < raw.classes <= 10_000
            binned = bin_chunk(chunk, prod(raw.sample_shape), 20, ENTRIES[name].bin_us)
            assert len(binned.labels) == len(chunk.labels) and (np.diff(binned.offsets) >= 0).all()


def reads_or_names(name: str, root: Path, file: Path) -> str | None:
    """Reads a data set one file of which may be damaged. Returns the sentence about the file, if any."""
    began = time.perf_counter()
    tracemalloc.start()
    try:
        read(name, root)
        return None
    except UsageError as error:
        message = str(error)
        assert str(file) in message and "\n" not in message and len(message) < 400 + len(str(file))
        return message
    finally:
        assert tracemalloc.get_traced_memory()[1] < MEMORY
        tracemalloc.stop()
        assert time.perf_counter() - began < 60


# -- random damage -----------------------------------------------------------------------------------------

HUGE = (b"\xff" * 8, bytes(8), b"\xff\xff\xff\x7f" * 2, b"\0\0\0\0\1\0\0\0")


def mutated(whole: bytes, draw: random.Random) -> bytes:
    """Returns a file cut short, with bits flipped, or with bytes changed, taken out, put in or appended."""
    content, at, few = bytearray(whole), draw.randrange(len(whole)), draw.randrange(1, 16)
    kind = draw.randrange(6)
    if kind == 0:
        return whole[:at]
    if kind == 1:
        for bit in draw.sample(range(8 * len(whole)), draw.choice((1, 1, 2, 8))):
            content[bit // 8] ^= 1 << bit % 8
    elif kind == 2:
        content[at : at + 8] = draw.choice(HUGE)
    elif kind == 3:
        del content[at : at + few]
    else:
        place = at if kind == 4 else len(whole)
        content[place:place] = draw.randbytes(few)
    return bytes(content)


def fuzz(name: str, root: Path, seeds: range) -> None:
    getattr(recordings, name)(root)
    file = root / FILES[name]
    whole = file.read_bytes()
    read(name, root)
    told = 0
    for seed in seeds:
        file.write_bytes(mutated(whole, random.Random(seed)))
        told += reads_or_names(name, root, file) is not None
    assert told > len(seeds) // 5
    file.write_bytes(whole)
    read(name, root)


def test_some_damage(name, tmp_path):
    fuzz(name, tmp_path, range(12))


@pytest.mark.slow
def test_much_damage(name, tmp_path):
    fuzz(name, tmp_path, range(200))


# -- damaged files of the cache ----------------------------------------------------------------------------


CACHED: dict[str, dict] = {"memory": {}, "streamed": {"stream": True}, "events": {"augment": data.Augmentation()}}


def fuzz_cache(root: Path, seeds: range, **options) -> None:
    recordings.dvsgesture(root)

    def load() -> tuple:
        train, test = data.load("dvsgesture", root, cache_dir=root / "cache", downsample=16, **options)
        return *train.dense(range(len(train))), *test.dense(range(len(test)))

    whole = load()
    (file,) = (root / "cache").iterdir()
    content = file.read_bytes()
    for seed in seeds:
        damaged = mutated(content, random.Random(seed))
        file.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of NumPy and zipfile, about a damaged header
            assert all(map(torch.equal, load(), whole)), seed
        assert load() and list((root / "cache").iterdir()) == [file]


@pytest.mark.parametrize("options", CACHED.values(), ids=CACHED)
def test_a_damaged_cache_gives_the_same_recordings(options, tmp_path):
    fuzz_cache(tmp_path, range(12), **options)


@pytest.mark.slow
@pytest.mark.parametrize("options", CACHED.values(), ids=CACHED)
def test_a_much_damaged_cache_gives_the_same_recordings(options, tmp_path):
    fuzz_cache(tmp_path, range(200), **options)


def test_a_cache_of_another_version_is_built_again(tmp_path, monkeypatch):
    recordings.dvsgesture(tmp_path)
    load = partial(data.load, "dvsgesture", tmp_path, cache_dir=tmp_path / "cache")
    load()
    (file,) = (tmp_path / "cache").iterdir()
    content = file.read_bytes()
    file.write_bytes(cache.MARK[:-1] + b"9" + content[8:])
    load()
    assert file.read_bytes()[:8] == cache.MARK
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)  # of which the name of the file tells
    load()
    assert len(list((tmp_path / "cache").iterdir())) == 2


def build_for_ever(folder: Path) -> None:
    def chunks() -> Iterator[Binned]:
        yield rows
        time.sleep(600)

    rows = Binned(np.zeros(9, CELL), np.array([0, 9]), np.array([0]), np.array([4]))
    cache.cached(folder, "set", "key", "state", lambda: cache.Chunks({"train": chunks()}, (2,), 2))


def test_a_process_killed_in_a_write_leaves_no_cache(tmp_path):
    building = get_context("fork").Process(target=build_for_ever, args=(tmp_path,))
    building.start()
    while not list(tmp_path.glob("*.tmp")):
        time.sleep(0.01)
    building.kill()
    building.join(60)
    (left,) = tmp_path.iterdir()
    rows = Binned(np.zeros(9, CELL), np.array([0, 9]), np.array([0]), np.array([4]))
    build = partial(cache.cached, tmp_path, "set", "key", build=lambda: cache.BinnedSplits(rows, rows, (2,), 2))
    assert len(build("state").train.cells) == 9
    assert left.exists()  # it may belong to a process that writes just now
    old = time.time() - cache.ABANDONED - 1
    os.utime(left, (old, old))
    build("another state")
    assert not left.exists() and len(list(tmp_path.iterdir())) == 1


# -- files that declare more than they hold ----------------------------------------------------------------


def h5_with(change: Callable) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        h5py = pytest.importorskip("h5py")
        with h5py.File(file, "a") as content:
            change(content)

    return write


def replace(name: str, value, **options) -> Callable[[Path], None]:
    """Returns a change of a dataset of SHD's file. value: its content, or a shape of which nothing is written."""

    def change(content) -> None:
        del content[name]
        if isinstance(value, tuple):
            content.create_dataset(name, value, **options)
        else:
            content[name] = value

    return h5_with(change)


def npy_of(shape: str) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        file.write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + bytes(64))

    return write


def patched(mark: bytes, shift: int, new: bytes) -> Callable[[Path], None]:
    """Returns a writer of the file with other bytes, so far from the first place of `mark`."""

    def write(file: Path) -> None:
        content = bytearray(file.read_bytes())
        at = content.index(mark) + shift
        content[at : at + len(new)] = new
        file.write_bytes(content)

    return write


def columns(**changed) -> Callable[[Path], None]:
    """Returns a writer of a MATLAB file with changed columns."""

    def write(file: Path) -> None:
        from scipy.io import savemat

        whole = {"x": [1, 2], "y": [1, 2], "ts": [1, 2], "pol": [0, 1]}
        savemat(file, {name: np.array(column) for name, column in (whole | changed).items() if column is not None})

    return write


def events(*rows: tuple[float, ...]) -> Callable[[Path], None]:
    return lambda file: np.save(file, np.array(rows, np.float64))


NAN, INF = float("nan"), float("inf")
WRONG: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "labels declared without an end": ("shd", replace("labels", (2**40,), chunks=(1024,), dtype="u2"), "labels"),
    "names declared without an end": ("shd", replace("extra/keys", (2**40,), chunks=(1024,), dtype="S8"), "labels"),
    "units declared without an end": ("shd", replace("spikes/units", (2, 2**38), chunks=(1, 1024), dtype="u2"), ""),
    "times that are a group": ("shd", h5_with(lambda c: (c.pop("spikes/times"), c.create_group("spikes/times"))), ""),
    "labels missing": ("shd", h5_with(lambda content: content.pop("labels")), "labels"),
    "labels that are fractions": ("shd", replace("labels", [0.5, 1.0]), "no class indices"),
    "labels that are NaN": ("shd", replace("labels", [NAN, 1.0]), "no class indices"),
    "labels in one-hot rows": ("shd", replace("labels", np.eye(2, dtype=int)), "no class indices"),
    "labels in words": ("shd", replace("labels", [b"one", b"two"]), "no class indices"),
    "a label that is negative": ("shd", replace("labels", [-1, 1]), "labels"),
    "a label of 2**63": ("shd", replace("labels", np.array([2**63, 1], np.uint64)), "labels"),
    "units in words": ("shd", replace("spikes/units", [b"one", b"two"]), ""),
    "a header of many events": ("dvsgesture", npy_of("(1000000000000, 4)"), "(1000000000000, 4)"),
    "a header of some gigabytes": ("dvsgesture", npy_of("(100000000, 4)"), "(100000000, 4)"),
    "a header of too few events": ("dvsgesture", npy_of("(1, 4)"), "(1, 4)"),
    "a header of negative events": ("dvsgesture", npy_of("(-2, -4)"), "(-2, -4)"),
    "a time that is NaN": ("dvsgesture", events((1, 1, 1, NAN), (1, 1, 1, 0)), "times of nan"),
    "a time that is infinite": ("dvsgesture", events((1, 1, 1, INF), (1, 1, 1, 0)), "half an hour"),
    "a time of years": ("dvsgesture", events((1, 1, 1, 1e300), (1, 1, 1, 0)), "half an hour"),
    "a place that is NaN": ("dvsgesture", events((NAN, 1, 1, 0)), "x=nan"),
    "a place between pixels": ("dvsgesture", events((1.5, 1, 1, 0)), "between two places of x"),
    "a place beside the sensor": ("dvsgesture", events((1, -1, 1, 0)), "y=-1"),
    "columns of unequal length": ("asldvs", columns(ts=[1, 2, 3]), "2 x, 2 y, 3 times"),
    "a column missing": ("asldvs", columns(pol=None), "pol"),
    "a column in words": ("asldvs", columns(x=["a", "b"]), "type <U1"),
    "a matrix without an end": ("asldvs", patched(b"\2\0\0\0\1\0\0\0", 0, struct.pack("<ii", 2**31 - 1, 9)), ""),
    "packets without an end": ("cifar10dvs", patched(b"\x10\0\0\0EVTS", -8, struct.pack("<i", 2**31 - 1)), ""),
    "pictures without an end": ("smnist", patched(struct.pack(">I", 4), 0, b"\xff" * 4), "IDX"),
    "a clock that overflows": ("nmnist", lambda file: file.write_bytes(bytes([0, 240, 0, 0, 0]) * 300_000), "300,000"),
    "years after the first event": ("ncars", lambda file: recordings.write_dat(file, [(0, 0, 2**32 - 1, 0)]), "hour"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_says_what_it_does_not_hold(case, tmp_path):
    name, write, says = WRONG[case]
    pytest.importorskip(LIBRARIES[name])
    getattr(recordings, name)(tmp_path)
    file = tmp_path / FILES[name]
    write(file)
    message = reads_or_names(name, tmp_path, file)
    assert message is not None and says in message


@pytest.mark.parametrize("label", [10**9, 10_000])
def test_a_label_without_a_name_is_below_some_bound(label, tmp_path):
    pytest.importorskip("h5py")
    recordings.shd(tmp_path)
    for split in ("train", "test"):
        h5_with(lambda content: content.pop("extra/keys"))(tmp_path / f"SHD/shd_{split}.h5")
    read("shd", tmp_path)
    replace("labels", [0, label])(tmp_path / FILES["shd"])
    assert "0..9999" in str(reads_or_names("shd", tmp_path, tmp_path / FILES["shd"]))


@pytest.mark.parametrize("seconds", [9.3e12, 2_148.0, INF])
def test_a_time_beyond_int64_does_not_mix_recordings(seconds, tmp_path):
    h5py = pytest.importorskip("h5py")
    recordings.shd(tmp_path)
    file = tmp_path / FILES["shd"]
    with h5py.File(file, "a") as content:
        del content["spikes/times"]
        rows = content.create_dataset("spikes/times", (2,), dtype=h5py.vlen_dtype(np.float64))
        rows[0], rows[1] = np.array([0.0, seconds]), np.array([0.25])
    assert "half an hour" in str(reads_or_names("shd", tmp_path, file))


# -- the process that reads --------------------------------------------------------------------------------

PROGRAM = f"""
import importlib.util, os
spec = importlib.util.spec_from_file_location("readers", {readers.__file__!r})
readers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(readers)
class Panic(BaseException):
    pass
def loop(file):
    while True:
        pass
def crash(file):
    os.abort()
def leave(file):
    os._exit(3)
def huge(file):
    return len(bytearray(2**34))
def panic(file):
    raise Panic("index out of range" * 100)
def talk(file, word):
    os.write(1, b"no answer")
    print("no answer", flush=True)
    return word
readers.serve(dict(loop=loop, crash=crash, leave=leave, huge=huge, panic=panic, talk=talk))
"""


@pytest.fixture
def program(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    return str(file)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and processor time")
@pytest.mark.parametrize(
    "function, says",
    [
        ("loop", "processor"),
        ("crash", "SIGABRT"),
        ("leave", "code 3"),
        ("huge", "MemoryError"),
        ("panic", "Panic: ind"),
    ],
)
def test_a_reader_that_fails_is_one_sentence(function, says, program, tmp_path, monkeypatch):
    monkeypatch.setattr(child.limits, "seconds", 0.2)
    reader = child.Child(program)
    assert reader("talk", tmp_path, "word") == "word"
    with pytest.raises(UsageError, match=f"^{re.escape(str(tmp_path))} cannot be read .*{says}") as error:
        reader(function, tmp_path)
    assert len(str(error.value)) < 450 + len(str(tmp_path))
    if reader.close.alive:
        assert reader("talk", tmp_path, "again") == "again"
        reader.close()
    assert reader.process.poll() is not None


def test_an_interrupted_request_ends_its_process(program, tmp_path, monkeypatch):
    reader = child.Child(program)
    monkeypatch.setattr(child.pickle, "load", lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        reader("talk", tmp_path, "word")
    assert reader.process.poll() is not None


def in_a_fork(root: Path) -> None:
    read("shd", root)


def test_a_fork_has_a_process_of_its_own(tmp_path):
    pytest.importorskip("h5py")
    recordings.shd(tmp_path)
    read("shd", tmp_path)
    fork = get_context("fork").Process(target=in_a_fork, args=(tmp_path,))
    fork.start()
    fork.join(60)
    assert fork.exitcode == 0
    read("shd", tmp_path)  # the process of this one still answers


def test_loading_leaves_no_process_behind(tmp_path, monkeypatch):
    pytest.importorskip("h5py")
    recordings.shd(tmp_path)
    started = []
    end = child._end
    monkeypatch.setattr(child, "_end", lambda process, owner: (started.append(process), end(process, owner)))
    expected = data.load("shd", tmp_path, cache_dir=tmp_path / "cache")[0].dense([0, 1])[0]
    assert len(started) == 1 and started[0].poll() is not None
    monkeypatch.setattr(sys, "executable", "")  # as in an embedded interpreter
    here = data.load("shd", tmp_path, cache_dir=tmp_path / "other")[0]
    assert len(started) == 1 and (here.dense([0, 1])[0] == expected).all()
    (tmp_path / FILES["shd"]).write_bytes(b"")
    with pytest.raises(UsageError, match=r"shd_train\.h5 cannot be read"):
        data.load("shd", tmp_path, cache_dir=tmp_path / "third")
