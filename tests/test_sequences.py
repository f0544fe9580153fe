"""`from_tonic` on sequences that people bring: what is cached, the fields of events, their clock, and labels."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import recordings
from ulr_snn import data
from ulr_snn.errors import UsageError

FIELDS = np.dtype([("x", np.int16), ("y", np.int16), ("t", np.int64), ("p", bool)])


def event_list(count: int, x: int = 1) -> np.ndarray:
    """Events at the times 0, 10, 20, ... of one pixel."""
    events = np.zeros(count, FIELDS)
    events["t"], events["x"], events["p"] = 10 * np.arange(count), x, True
    return events


class Own(list):
    """A data set of one's own: recordings with the attributes that are given."""

    def __init__(self, items, **attributes):
        super().__init__(items)
        self.__dict__.update(attributes)


def opened(parts, folder: Path, **options):
    return data.from_tonic(parts, cache_dir=folder, **{"time_bins": 5, "bin_us": 10} | options)


# ---- what is cached


@pytest.mark.parametrize("attributes, seen", [
    ({"sensor_size": (4, 4, 2)}, ((2, 4, 4), 2)),
    ({"sensor_size": (8, 8, 2)}, ((2, 8, 8), 2)),
    ({"classes": ["a", "b"]}, ((2, 1, 2), 2)),
    ({"classes": list("abcde")}, ((2, 1, 2), 5)),
])  # fmt: skip
def test_attributes_of_a_sequence_are_part_of_the_cache(attributes, seen, tmp_path):
    items = [(event_list(3), 0), (event_list(4), 1)]
    opened(Own(items, sensor_size=(6, 6, 2), classes=["a", "b", "c"]), tmp_path)
    found = opened(Own(items, **attributes), tmp_path)
    assert (found.sample_shape, found.classes) == seen


class Cut:
    """A transform that does not show its argument."""

    def __init__(self, count):
        self.count = count

    def __call__(self, events):
        return events[: self.count]

    def __repr__(self):
        return "Cut()"


@pytest.fixture
def mine(tmp_path):
    """Makes a data set with tonic's base class, which has a file, and takes a list of recordings."""
    tonic = pytest.importorskip("tonic")

    class Mine(tonic.Dataset):
        sensor_size = (4, 4, 2)
        classes = ("a", "b")

        def __init__(self, subjects=range(6), **options):
            super().__init__(str(tmp_path), **options)
            recordings.write(Path(self.location_on_system) / "file.bin", b"content")
            self.subjects = subjects
            self.data = [event_list(3 + subject) for subject in subjects]
            self.targets = [subject % 2 for subject in subjects]

        def __len__(self):
            return len(self.data)

        def __getitem__(self, index):
            events = self.data[index]
            return (events if self.transform is None else self.transform(events)), self.targets[index]

    return Mine


def test_a_set_of_tonics_base_class_is_told_by_its_recordings(mine, tmp_path):
    def lengths(dataset):
        found = opened(dataset, tmp_path / "cache", time_bins="full")
        return found.lengths.tolist(), found.targets.tolist()

    assert lengths(mine([0, 1])) == ([3, 4], [0, 1])
    assert lengths(mine([2, 3, 4])) == ([5, 6, 7], [0, 1, 0])
    shorter, other = mine(), mine()
    assert lengths(mine()) == ([3, 4, 5, 6, 7, 8], [0, 1] * 3)
    shorter.data, other.targets = shorter.data[:2], [1, 0] * 3
    assert lengths(shorter) == ([3, 4], [0, 1])
    assert lengths(other) == ([3, 4, 5, 6, 7, 8], [1, 0] * 3)
    assert lengths(mine([0, 1], transform=Cut(1))) == ([1, 1], [0, 1])
    assert lengths(mine([0, 1], transform=Cut(2))) == ([2, 2], [0, 1])


def test_a_set_of_tonic_is_told_by_its_state_and_files(tmp_path, monkeypatch):
    tonic = pytest.importorskip("tonic")
    recordings.dvsgesture(tmp_path)
    reads = recordings.reads_of(tonic.datasets.DVSGesture, monkeypatch)

    def load(cut=None, targets=None, **attributes):
        given = tonic.datasets.DVSGesture(save_to=str(tmp_path))
        given.data, given.targets = given.data[:cut], targets or given.targets[:cut]
        vars(given).update(attributes)
        reads.clear()
        return data.from_tonic(given, cache_dir=tmp_path / "cache"), bool(reads)

    assert [load()[1], load()[1]] == [True, False]
    assert len(load(cut=1)[0]) == 1 and len(load()[0]) == 2
    assert load(targets=[1, 2])[0].targets.tolist() == [1, 2]
    assert load(classes=range(12))[0].classes == 12
    assert load(sensor_size=(130, 128, 2))[0].sample_shape == (2, 128, 130)
    assert load(transform=Cut(1))[0][0][0].sum() == 1 and load(transform=Cut(2))[0][0][0].sum() == 2
    assert load(transform=tonic.transforms.Compose([Cut(1)]))[0][0][0].sum() == 1
    assert not load()[1]
    known = tonic.transforms.Compose([tonic.transforms.TimeSkew(2, 0)])
    assert [load(transform=known)[1], load(transform=known)[1]] == [True, False]
    outside = tmp_path / "outside.npy"
    for x in (1, 2):  # a file that is not in the data set's folder
        recordings.write_npy(outside, [(x, 0, 0, 0)])
        assert load(cut=1, data=[str(outside)])[0][0][0].nonzero()[0, -1] == x


# ---- the clock


def recorded(times, dtype) -> np.ndarray:
    events = np.zeros(len(times), [("t", dtype), ("x", np.int16)])
    events["t"] = times
    return events


def bins(times, folder, dtype, **options):
    """Returns the number of events in each time bin."""
    return opened([(recorded(times, dtype), 0)], folder, **options)[0][0].flatten().tolist()


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", ">u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"])
def test_every_type_of_times_counts_milliseconds(dtype, tmp_path):
    one_each = bins(range(0, 200, 10), tmp_path, dtype, clock_us=1_000, bin_us=10_000, time_bins=20)
    assert one_each == [1] * 20
    minutes = [0, 2**32 // 1_000 if dtype[1:] in ("4", "8") else 200]
    found = opened([(recorded(minutes, dtype), 0)], tmp_path, clock_us=1_000, bin_us=10**6, time_bins="full")
    assert found.lengths.tolist() == [minutes[1] // 1_000 + 1]  # beyond 32 bits of microseconds


@pytest.mark.parametrize("dtype, count", [("f8", 200_000), ("f4", 2_000)])
def test_seconds_are_rounded_to_microseconds(dtype, count, tmp_path):
    found = bins(np.arange(count) / 1_000, tmp_path, dtype, clock_us=1e6, bin_us=1_000, time_bins=count)
    assert found == [1] * count


def test_times_of_signed_types_are_aligned_without_wrapping(tmp_path):
    assert bins([-100, 100], tmp_path, "i1", align=True, bin_us=100, time_bins=3) == [1, 0, 1]
    assert bins([0, 3], tmp_path, "i8", clock_us=2.5, bin_us=1, time_bins=10) == [1] + [0] * 7 + [1, 0]
    with pytest.raises(UsageError, match="before time 0"):
        bins([-1, 0], tmp_path, "i1")
    for late, dtype, options in ((2**61, "i8", {"clock_us": 1_000}), (2**63, "u8", {"align": True})):
        with pytest.raises(UsageError, match="no numbers of microseconds"):
            bins([late, late + 5], tmp_path, dtype, **options)


# ---- the fields of events


def fields(places=True, **values) -> list[tuple[np.ndarray, int]]:
    """A recording of four events with these fields, and t, x and y."""
    values = {"t": [0, 10, 20, 30], "x": [1, 1, 2, 2]} | ({"y": [0, 0, 1, 1]} if places else {}) | values
    columns = {name: np.asarray(column) for name, column in values.items()}
    events = np.zeros(4, [(name, column.dtype) for name, column in columns.items()])
    for name, column in columns.items():
        events[name] = column
    return [(events, 0)]


@pytest.mark.parametrize("name", ["p", "pol", "polarity"])
@pytest.mark.parametrize("values", [[0, 1, 0, 1], [-1, 1, -1, 1], [False, True, False, True], [0.0, 1.0, 0.0, 1.0]])
@pytest.mark.parametrize("options", [{}, {"sensor_size": (3, 2, 2)}])
def test_polarities_of_every_name_and_code(name, values, options, tmp_path):
    dense = opened(fields(**{name: values}), tmp_path, **options)[0][0]
    assert [cell[1:] for cell in dense.nonzero().tolist()] == [[0, 0, 1], [1, 0, 1], [0, 1, 2], [1, 1, 2]]


def test_polarities_of_units(tmp_path):
    both = opened(fields(False, p=[0, 1, 0, 1]), tmp_path)
    assert both.sample_shape == (2, 1, 3) and both[0][0].sum((0, 2, 3)).tolist() == [2, 2]
    assert opened(fields(False, p=[1, 1, 1, 1]), tmp_path).sample_shape == (3,)  # as of tonic's units
    assert opened(fields(False, p=[0, 1, 0, 1]), tmp_path, sensor_size=(3, 1, 1)).sample_shape == (3,)
    assert opened(fields(p=[0, 1, 2, 2]), tmp_path, sensor_size=(3, 2, 3))[0][0].sum((0, 2, 3)).tolist() == [1, 1, 2]


@pytest.mark.parametrize("name", ["ts", "time", "timestamp"])
def test_times_of_every_name(name, tmp_path):
    ((events, label),) = fields()
    events.dtype.names = (name, "x", "y")
    assert torch.equal(opened([(events, label)], tmp_path)[0][0], opened(fields(), tmp_path)[0][0])


@pytest.mark.parametrize("parts, options, complaint", [
    (fields(p=[1, 2, 1, 2]), {}, "polarities 1, 2; give 0 and 1"),
    (fields(p=[1, 2, 1, 2]), {"sensor_size": (3, 2, 2)}, "polarities 1, 2"),
    (fields(False, p=[1, 2, 1, 2]), {}, "polarities 1, 2"),
    (fields(p=[-1, 0, 1, 1]), {}, "polarities -1, 0, 1"),
    (fields(p=list("abab")), {}, "p of type <U1"),
    (fields(x=list("abab")), {}, "x of type <U1"),
    (fields(p=[0.5, 1, 0, 1]), {}, "p=0.5"),
    (fields(x=[0.1, 0.4, 0.6, 0.9]), {}, "x=0.1; give whole numbers"),
    (fields(y=[0.0, 0.5, np.nan, 1.0]), {"sensor_size": (3, 2, 1)}, "y=0.5"),
    (fields(z=[0, 0, 0, 0]), {}, r"fields \('t', 'x', 'y', 'z'\)"),
    (fields(p=[0, 1, 0, 1], pol=[0, 1, 0, 1]), {}, r"fields .*'p', 'pol'"),
    (fields(), {"sensor_size": (3, 2, 2)}, "without p"),
    (fields(False), {"sensor_size": (3, 2, 1)}, "without y"),
    (fields(), {"sensor_size": (3, 1, 1)}, "y=1, outside the sensor"),
])  # fmt: skip
def test_fields_that_would_be_lost_are_told(parts, options, complaint, tmp_path):
    with pytest.raises(UsageError, match=complaint):
        opened(parts, tmp_path, **options)


# ---- the window


@pytest.mark.parametrize("augment", [None, []])
def test_recordings_behind_the_last_bin_are_told(augment, tmp_path):
    late = event_list(3)
    late["t"] += 1_600_000_000
    parts = [(event_list(3), 0), (event_list(0), 1), (late, 2)]
    with pytest.raises(UsageError, match=r"recording 2 .* 3 events, .* 1,600,000,000 us, .* 50 us; .*align=True"):
        opened(parts, tmp_path, augment=augment)
    aligned = opened(parts, tmp_path, augment=augment, align=True)
    assert [int(aligned[index][0].sum()) for index in range(3)] == [3, 0, 3]
    partly = opened([(event_list(8), 0)], tmp_path, augment=augment)  # as windows that are shorter than recordings do
    assert partly[0][0].sum() == 5


def test_a_shorter_window_is_not_taken_from_the_cache_of_a_longer_one(tmp_path, monkeypatch):
    tonic = pytest.importorskip("tonic")
    recordings.write_npy(tmp_path / "DVSGesture/ibmGestureTrain/user01_led/0.npy", [(0, 0, 90_000, 0)])
    monkeypatch.setattr(tonic.datasets.DVSGesture, "_check_exists", lambda self: True)
    given = tonic.datasets.DVSGesture(save_to=str(tmp_path))
    options = {"bin_us": 10_000, "align": False, "augment": []}
    assert opened(given, tmp_path / "cache", time_bins=10, **options)[0][0].sum() == 1
    with pytest.raises(UsageError, match="align=True"):
        opened(given, tmp_path / "cache", time_bins=5, **options)


# ---- labels


def labelled(*labels) -> list[tuple[np.ndarray, object]]:
    return [(event_list(3), label) for label in labels]


def test_names_are_numbered_as_the_data_set_lists_them(tmp_path):
    listed = {"classes": ["dog", "cat", "bee", "ape"]}
    found = opened(Own(labelled("bee", "ape"), **listed), tmp_path)
    assert found.targets.tolist() == [2, 3] and found.classes == 4
    alone = opened(Own(labelled("cat"), **listed), tmp_path)  # splits that are opened one by one agree
    assert alone.targets.tolist() == [1] and alone.classes == 4
    numbered = Own(labelled("bee"), classes={"bee": 1, "ape": 0})
    assert opened(numbered, tmp_path).targets.tolist() == [1]
    numbers = Own(labelled(*np.array(["cat", "dog"])), targets=[0, 1])
    assert opened(numbers, tmp_path).targets.tolist() == [0, 1]
    assert opened(Own(labelled(0, 1), classes=5), tmp_path).classes == 5


@pytest.mark.parametrize("parts, options, complaint", [
    (labelled("a", 1), {}, "recording 1 .* label 1; labels are all names"),
    (labelled("1", 1), {}, "label 1; labels are all names"),
    (labelled(1, "1"), {}, "label '1'; labels are all names"),
    ((labelled("a", "b"), labelled(0)), {}, "recording 0 of the testing set has the label 0; labels are all names"),
    (Own(labelled("bee", "ape"), classes=list("wxyz")), {}, "label 'bee', .* none of the 4 classes .*'w'"),
    (labelled("a", "b", "c"), {"classes": 2}, "label 'c', .* 2 classes"),
    (Own(labelled(0, 1, 2), classes=["a", "b"]), {}, "label 2; .* from 0 to 1"),
])  # fmt: skip
def test_labels_of_two_kinds_are_told(parts, options, complaint, tmp_path):
    with pytest.raises(UsageError, match=complaint):
        opened(parts, tmp_path, **options)
