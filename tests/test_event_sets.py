"""The data sets that `load` knows: small recordings in their file formats, against cells and tonic's readers."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import recordings
from tests.recordings import FILES, LIBRARIES
from ulr_snn import data
from ulr_snn.errors import UsageError
from ulr_snn.runs.cli import main

SHAPES = {
    "ssc": (50, 700, 35),
    "dvsgesture": (60, 2, 128, 128, 11),
    "cifar10dvs": (20, 2, 128, 128, 10),
    "ncaltech101": (20, 2, 180, 240, 3),
    "ncars": (20, 2, 100, 120, 2),
    "asldvs": (20, 2, 180, 240, 24),
    "smnist": (784, 99, 10),
}


@pytest.fixture(params=SHAPES)
def name(request):
    pytest.importorskip(LIBRARIES[request.param])
    return request.param


@pytest.fixture
def root(name, tmp_path):
    getattr(recordings, name)(tmp_path)
    return tmp_path


def load(name: str, root: Path, **options):
    return data.load(name, root, cache_dir=root / "cache", **options)


def cells(dataset: data.EventDataset, index: int) -> list[list[int]]:
    return dataset[index][0].nonzero().tolist()


def test_shapes(name, root):
    train, test = load(name, root)
    for part in (train, test):
        assert (part.time_bins, *part.sample_shape, part.classes) == SHAPES[name]
        assert part[0][0].dtype == torch.uint8 and len(part) > 0
    folder = next(path for path in root.iterdir() if path.name != "cache")
    again, _ = data.load(name, folder, cache_dir=root / "cache")  # the data set's own folder
    assert torch.equal(again[0][0], train[0][0])


def test_ssc(tmp_path):
    pytest.importorskip("h5py")
    recordings.ssc(tmp_path)
    train, validation, test = load("ssc", tmp_path, validation="own")
    assert [part.targets.tolist() for part in (train, validation, test)] == [[34, 0], [1, 0], [2, 0]]
    assert cells(train, 0) == [[0, 34], [25, 699]] and cells(validation, 0) == [[0, 1], [25, 699]]


def test_dvsgesture(tmp_path):
    recordings.dvsgesture(tmp_path)
    train, test = load("dvsgesture", tmp_path)
    assert train.targets.tolist() == [10, 0] and test.targets.tolist() == [3]
    assert cells(train, 0) == [[0, 0, 64, 3], [0, 1, 0, 127], [1, 0, 64, 3]]  # times begin with the first event
    assert train[0][0][0, 1, 0, 127] == 2 and cells(train, 1) == [[0, 1, 2, 1]]  # one event is after six seconds


def test_cifar10dvs(tmp_path):
    pytest.importorskip("aedat")
    pytest.importorskip("tonic")
    recordings.cifar10dvs(tmp_path)
    train, test = load("cifar10dvs", tmp_path)
    assert sorted(train.targets.tolist()) == [0] * 4 + [9] * 4 and sorted(test.targets.tolist()) == [0, 9]
    seen = [row for part in (train, test) for i in range(len(part)) for row in cells(part, i)]
    assert sorted(map(tuple, seen)) == sorted(
        [(0, 1, 2, 1)] * 10 + [(1, 0, 0, 127)] * 10 + [(1, 1, 6, n) for n in range(5)] * 2
    )


def test_ncaltech101(tmp_path):
    pytest.importorskip("tonic")
    recordings.ncaltech101(tmp_path)
    train, test = load("ncaltech101", tmp_path)
    assert torch.bincount(train.targets).tolist() == [4] * 3 and test.targets.tolist() == [0, 1, 2]
    assert cells(train, 0)[:2] == [[0, 1, 0, 0], [1, 0, 179, 239]] and len(cells(train, 0)) == 3


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("folders", ["{split}", "n-cars_{split}", "n-cars_{split}/{split}"])
def test_ncars(tmp_path, version, folders):
    for split in ("train", "test"):
        for kind, x in (("background", 0), ("cars", 119)):
            file = tmp_path / "NCARS" / folders.format(split=split) / kind / "obj_000000_td.dat"
            recordings.write_dat(file, [(x, 99, 0, 1), (5, 6, 99_999, 0), (5, 6, 100_000, 0)], version)
    train, test = load("ncars", tmp_path)
    assert train.targets.tolist() == test.targets.tolist() == [0, 1]
    assert cells(train, 1) == [[0, 1, 99, 119], [19, 0, 6, 5]]


def test_asldvs(tmp_path):
    pytest.importorskip("scipy")
    recordings.asldvs(tmp_path)
    train, test = load("asldvs", tmp_path)
    assert set(train.targets.tolist()) == {0, 9, 23} and test.targets.tolist() == [0, 9, 23]  # a, k, y
    assert cells(train, 0) == [[0, 1, 0, 239], [1, 0, 179, 0]]


# ---- against tonic's own readers


@pytest.mark.parametrize("kind, name, arguments", [
    ("SSC", "ssc", [{"split": "train"}, {"split": "test"}]),
    ("DVSGesture", "dvsgesture", [{"train": True}, {"train": False}]),
    ("SMNIST", "smnist", [{"train": True}, {"train": False}]),
])  # fmt: skip
def test_tonic_reads_the_same(kind, name, arguments, tmp_path, monkeypatch):
    tonic = pytest.importorskip("tonic")
    getattr(recordings, name)(tmp_path)
    monkeypatch.setattr(getattr(tonic.datasets, kind), "_check_exists", lambda self: True)
    pair = tuple(getattr(tonic.datasets, kind)(save_to=str(tmp_path), **given) for given in arguments)
    theirs = data.from_tonic(pair, cache_dir=tmp_path / "cache")
    for ours, other in zip(load(name, tmp_path), theirs, strict=True):
        assert other.sample_shape == ours.sample_shape and other.classes == ours.classes
        assert other.time_bins == ours.time_bins
        order = np.argsort(ours.targets.numpy(), kind="stable"), np.argsort(other.targets.numpy(), kind="stable")
        assert torch.equal(ours.targets[order[0]], other.targets[order[1]])
        assert torch.equal(ours.dense(order[0])[0], other.dense(order[1])[0])


@pytest.mark.parametrize(
    "kind, name, library",
    [("NCALTECH101", "ncaltech101", "tonic"), ("ASLDVS", "asldvs", "scipy"), ("CIFAR10DVS", "cifar10dvs", "aedat")],
)
def test_tonic_reads_the_same_without_a_split(kind, name, library, tmp_path, monkeypatch):
    tonic = pytest.importorskip("tonic")
    pytest.importorskip(library)
    getattr(recordings, name)(tmp_path)
    monkeypatch.setattr(getattr(tonic.datasets, kind), "_check_exists", lambda self: True)
    own = getattr(tonic.datasets, kind)(save_to=str(tmp_path))
    ours = load(name, tmp_path)
    theirs = data.from_tonic(own, sensor_size=ours[0].sample_shape[::-1], cache_dir=tmp_path / "cache")
    assert len(theirs) == sum(map(len, ours))
    together = torch.cat([part.dense(range(len(part)))[0].sum(1) for part in ours])
    assert torch.equal(theirs.dense(range(len(theirs)))[0].sum(1), together.view(2, *theirs[0][0].shape).sum(0))


# ---- wrong uses


def test_a_missing_folder_is_named_and_nothing_is_downloaded(name, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    with pytest.raises(UsageError, match=f"{re.escape(str(tmp_path))}.*(download=True|datasets/)"):
        load(name, tmp_path)


def test_a_damaged_file_is_named(name, root):
    file = root / FILES[name]
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2 + 1]):
        if name == "ncars" and not content:
            continue  # a recording without events
        file.write_bytes(content)
        with pytest.raises(UsageError, match=re.escape(str(file))):
            load(name, root)
    assert not (root / "cache").exists() or not list((root / "cache").iterdir())


@pytest.mark.parametrize("wrong, complaint", [
    ("DVSGesture/ibmGestureTrain/user01_led/11.npy", "not named by a label"),
    ("ASLDVS/j/j_0001.mat", "24 letters"),
])  # fmt: skip
def test_a_recording_without_a_label_is_named(wrong, complaint, tmp_path):
    name = wrong.split("/")[0].lower()
    pytest.importorskip("scipy")
    getattr(recordings, name)(tmp_path)
    recordings.write(tmp_path / wrong, b"")
    with pytest.raises(UsageError, match=f"{wrong}.*{complaint}"):
        load(name, tmp_path)


def test_an_event_outside_the_sensor_is_named(tmp_path):
    recordings.ncars(tmp_path)
    recordings.write_dat(tmp_path / FILES["ncars"], [(120, 0, 0, 0)])
    with pytest.raises(UsageError, match=r"obj_000000_td.dat has an event at x=120, outside the 120x100 pixels"):
        load("ncars", tmp_path)


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch):
    recordings.cifar10dvs(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "aedat", None)
    with pytest.raises(UsageError, match=r"aedat.*pip install ulr_snn\[tonic\]"):
        load("cifar10dvs", tmp_path)


def test_too_few_recordings_for_a_test_set(tmp_path):
    pytest.importorskip("scipy")
    recordings.write_mat(tmp_path / "ASLDVS/a/a_0001.mat", [(0, 0, 0, 0)])
    with pytest.raises(UsageError, match="too few"):
        load("asldvs", tmp_path)


# ---- download


def test_download_lets_tonic_fetch_what_is_missing(tmp_path, monkeypatch):
    tonic = pytest.importorskip("tonic")
    asked = []

    def fetch(save_to, **given):
        asked.append((save_to, given))
        recordings.dvsgesture(Path(save_to))

    monkeypatch.setattr(tonic.datasets, "DVSGesture", fetch)
    with pytest.raises(UsageError, match="download=True"):
        load("dvsgesture", tmp_path)
    assert not asked
    assert len(load("dvsgesture", tmp_path, download=True)[0]) == 2
    assert asked == [(str(tmp_path), {"train": True}), (str(tmp_path), {"train": False})]
    load("dvsgesture", tmp_path, download=True)
    assert len(asked) == 2  # recordings that are there are not fetched again


def test_what_tonic_cannot_download_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"datasets/ncars/README\.md"):
        load("ncars", tmp_path, download=True)
    with pytest.raises(UsageError, match="ULR_SNN_DATA"):
        data.load("ncars", download=True)


# ---- the reference networks


def test_the_command_line_trains_the_reference_network(name, root, monkeypatch, capsys):
    pytest.importorskip("safetensors")
    monkeypatch.chdir(root)
    monkeypatch.setenv("ULR_SNN_CACHE", str(root / "cache"))
    options = ["--epochs", "1", "--max-steps", "1", "--device", "cpu", "--no-progress"]
    assert main(["train", name, "--data-root", str(root), *options]) == 0
    assert main(["evaluate", f"runs/{name}-001", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("test accuracy") == 2
