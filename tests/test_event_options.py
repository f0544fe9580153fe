"""What `load` and `from_tonic` do with events: views, augmentation, held-out parts, streaming from the cache."""

import multiprocessing
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import recordings
from ulr_snn import data
from ulr_snn.data import cache
from ulr_snn.errors import UsageError

SENSOR = (6, 5, 2)  # width, height, polarities
FIELDS = np.dtype([("x", np.int16), ("y", np.int16), ("t", np.int64), ("p", bool)])


def made(count: int, seed: int = 0, events: int = 200) -> list[tuple[np.ndarray, int]]:
    """Recordings of 1,000 us with the classes 0, 1 and 2."""
    draw, found = np.random.default_rng(seed), []
    for number in range(count):
        size = int(draw.integers(1, events))
        columns = draw.integers(0, 6, size), draw.integers(0, 5, size), draw.integers(0, 1000, size)
        array = np.empty(size, FIELDS)
        array["x"], array["y"], array["t"], array["p"] = (*columns, draw.random(size) < 0.5)
        found.append((array, number % 3))
    return found


def floats(*times: float, x: float = 0.0) -> list[tuple[np.ndarray, int]]:
    """A recording with these times, all of whose numbers are floats."""
    events = np.zeros(len(times), [(name, float) for name in "xytp"])
    events["t"], events["x"] = times, x
    return [(events, 0)]


def opened(parts, folder, **options):
    return data.from_tonic(parts, cache_dir=folder, **{"sensor_size": SENSOR, "time_bins": 10, "bin_us": 100} | options)


def dense(dataset: data.EventDataset) -> torch.Tensor:
    return dataset.dense(range(len(dataset)))[0]


def epochs(dataset: data.EventDataset, count: int = 2, **options) -> list[torch.Tensor]:
    loader = data.loader(dataset, batch_size=5, **options)
    return [torch.cat([batch[0] for batch in loader], 1) for _ in range(count)]


# ---- views


@pytest.mark.parametrize("polarity", ["both", "merged", "on", "off"])
@pytest.mark.parametrize("crop, downsample", [(None, 1), ((3, 4), 1), (None, 2), ((5, 4), 3)])
def test_views_agree_with_a_plain_loop(polarity, crop, downsample, tmp_path):
    parts = made(7)
    seen = opened(parts, tmp_path, polarity=polarity, crop=crop, downsample=downsample)
    rows, columns = crop or (5, 6)
    channels = 2 if polarity == "both" else 1
    assert seen.sample_shape == (channels, -(-rows // downsample), -(-columns // downsample))
    expected = np.zeros((10, 7, *seen.sample_shape), int)
    for number, (events, _) in enumerate(parts):
        for x, y, t, p in events.tolist():
            y, x = y - (5 - rows) // 2, x - (6 - columns) // 2
            inside = 0 <= y < rows and 0 <= x < columns
            if inside and (polarity in ("both", "merged") or p == (polarity == "on")):
                expected[t // 100, number, p * (channels - 1), y // downsample, x // downsample] += 1
    assert np.array_equal(dense(seen), expected)


@pytest.mark.parametrize("wrong", [
    {"downsample": 0}, {"downsample": 1.5}, {"polarity": "up"}, {"crop": (6, 2)}, {"crop": (2, 7)}, {"crop": 3},
    {"crop": (0, 2)},
])  # fmt: skip
def test_wrong_views_are_named(wrong, tmp_path):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        opened(made(3), tmp_path, **wrong)


def test_units_have_no_pixels(tmp_path):
    units = [(events[["x", "t"]], label) for events, label in made(4)]
    whole, coarse = (opened(units, tmp_path, sensor_size=(6, 1, 1), downsample=n) for n in (1, 4))
    assert whole.sample_shape == (6,) and coarse.sample_shape == (2,)
    assert torch.equal(dense(coarse)[..., 0], dense(whole)[..., :4].sum(-1, dtype=torch.uint8))
    for wrong in ({"crop": (1, 2)}, {"polarity": "on"}, {"augment": data.Augmentation(flip=0.5)}):
        with pytest.raises(UsageError, match="units"):
            opened(units, tmp_path, sensor_size=(6, 1, 1), **wrong)


# ---- augmentation


def test_events_without_changes_are_binned_alike(tmp_path):
    for time_bins in (10, 4, "full"):
        plain = opened(made(9), tmp_path, time_bins=time_bins)
        same = opened(made(9), tmp_path, time_bins=time_bins, augment=[])
        assert torch.equal(plain.lengths, same.lengths) and torch.equal(plain.targets, same.targets)
        assert torch.equal(dense(plain), dense(same)) and not same.augments


@pytest.mark.parametrize("field", ["event_drop", "flip", "shift", "jitter_us"])
def test_each_augmentation_changes_events_as_it_says(field, tmp_path):
    pytest.importorskip("tonic")
    value = {"event_drop": True, "flip": 1.0, "shift": 2, "jitter_us": 150.0}[field]
    parts = made(60)
    plain = dense(opened(parts, tmp_path)).long()
    changed = dense(opened(parts, tmp_path, augment=data.Augmentation(**{field: value}))).long()
    if field == "event_drop":
        kept = changed.sum((0, 2, 3, 4)) / plain.sum((0, 2, 3, 4))
        assert (changed <= plain).all() and 0.4 < kept.mean() < 0.9 and (kept == 1).sum() > 5
    if field == "flip":
        assert torch.equal(changed, plain.flip(4))
    if field == "jitter_us":
        assert (changed.sum(0) <= plain.sum(0)).all() and not torch.equal(changed, plain)
        assert 0.8 < changed.sum() / plain.sum() < 1
    if field == "shift":
        found = set()
        for i in range(60):
            moves = [(y, x) for y in range(-2, 3) for x in range(-2, 3)]
            found |= {(y, x) for y, x in moves if torch.equal(moved(plain[:, i], y, x), changed[:, i])}
        assert len(found) > 15


def moved(frames: torch.Tensor, y: int, x: int) -> torch.Tensor:
    wide = torch.nn.functional.pad(frames, (2, 2, 2, 2))
    return wide[..., 2 - y : 7 - y, 2 - x : 8 - x]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_seed_gives_the_same_events_whatever_the_number_of_workers(shuffle, tmp_path):
    pytest.importorskip("tonic")
    train = opened(made(12), tmp_path, augment=data.Augmentation(event_drop=True, flip=0.5, shift=1, jitter_us=50))
    here = epochs(train, shuffle=shuffle, seed=4)
    for workers in (1, 2):
        for a, b in zip(here, epochs(train, shuffle=shuffle, seed=4, num_workers=workers), strict=True):
            assert torch.equal(a, b)
    sparse = [torch.cat([x.to_dense() for x, _ in data.loader(train, 5, shuffle, 4, sparse=True)], 1)]
    assert torch.equal(sparse[0], here[0])
    assert not torch.equal(here[0], here[1])  # drawn anew in the second epoch
    assert not torch.equal(here[0], epochs(train, shuffle=shuffle, seed=5)[0])


class Doubled(torch.utils.data.Dataset):
    """A data set of one's own, which holds another."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        x, y = self.dataset[index]
        return 2 * x, y


@pytest.mark.parametrize("wrap", [
    lambda made: torch.utils.data.Subset(made, [3, 1, 5, 0, 8, 2]),
    lambda made: torch.utils.data.Subset(torch.utils.data.Subset(made, range(9)), range(1, 8)),
    lambda made: torch.utils.data.ConcatDataset([made, made.plain()]),
    lambda made: torch.utils.data.Subset(torch.utils.data.ConcatDataset([made, made]), range(3, 15)),
    lambda made: torch.utils.data.random_split(made, [8, 4], torch.Generator().manual_seed(0))[0],
    lambda made: Doubled(made),
])  # fmt: skip
def test_a_seed_gives_the_same_events_in_sets_that_hold_others(wrap, tmp_path):
    train = opened(made(12), tmp_path, augment=data.Augmentation(shift=2))
    torch.manual_seed(0)
    here = epochs(wrap(train), seed=4)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    for options in ({}, {"num_workers": 1}, {"num_workers": 2}):
        assert all(map(torch.equal, here, epochs(wrap(train), seed=4, **options)))
    assert not torch.equal(here[0], here[1]) and not torch.equal(here[0], epochs(wrap(train), seed=5)[0])
    epochs(wrap(opened(made(12), tmp_path)), seed=4)
    torch.set_rng_state(state)
    plain = wrap(train.plain())
    assert torch.equal(epochs(plain)[0], torch.stack([plain[index][0] for index in range(len(plain))], 1))


def test_augmentation_goes_on_where_the_loaders_generator_is_set_back(tmp_path):
    train = opened(made(12), tmp_path, augment=data.Augmentation(shift=2))
    loader = data.loader(train, batch_size=5, shuffle=True)
    epoch = lambda: torch.cat([x for x, _ in loader], 1)  # noqa: E731
    epoch()
    state = loader.generator.get_state()
    second = epoch()
    again = data.loader(train, batch_size=5, shuffle=True)
    again.generator.set_state(state)
    assert torch.equal(torch.cat([x for x, _ in again], 1), second)


def test_only_training_events_are_augmented(tmp_path):
    augment = data.Augmentation(shift=2)
    pair = made(30), made(12, seed=1)
    train, validation, test = opened(pair, tmp_path, augment=augment, validation=0.3)
    plain = opened(pair, tmp_path, validation=0.3)
    assert train.augments and not validation.augments and not test.augments
    assert torch.equal(dense(validation), dense(plain[1])) and torch.equal(dense(test), dense(plain[2]))
    assert not torch.equal(dense(train), dense(plain[0])) and torch.equal(dense(train.plain()), dense(plain[0]))
    assert not torch.equal(train[0][0], train[0][0]) or not torch.equal(train[1][0], train[1][0])  # without a seed
    torch.manual_seed(0)
    one = dense(train)
    torch.manual_seed(0)
    assert torch.equal(one, dense(train))


def test_augmentation_leaves_numpys_generator_alone(tmp_path):
    drawn = []

    def draws(events):
        drawn.append(np.random.rand())
        return events[np.random.rand(len(events)) < 0.5]

    train = opened(made(6), tmp_path, augment=draws)
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    epochs(train, 1)
    assert np.random.rand() == expected and len(set(drawn)) == 6


@pytest.mark.parametrize("wrong", [{"flip": 1.5}, {"shift": -1}, {"jitter_us": -1.0}])
def test_wrong_augmentations_are_named(wrong, tmp_path):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        opened(made(3), tmp_path, augment=data.Augmentation(**wrong))


@pytest.mark.parametrize("augment, complaint", [
    ("flip", "augment got 'flip'; give an Augmentation"),
    (3, "augment got 3"),
    ([Doubled, "flip"], "augment got 'flip'"),
    (data.Augmentation(transforms=[None]), "augment got None"),
    (lambda events: None, "the augmentation .*lambda.* returned NoneType, not a structured array"),
    (lambda events: np.zeros((3, 2, 5, 6)), "returned ndarray, not a structured array of events .*frames"),
    (lambda events: events[["t", "x"]], "fields x, y, t and p"),
])  # fmt: skip
def test_what_is_no_augmentation_is_told(augment, complaint, tmp_path):
    with pytest.raises(UsageError, match=complaint):
        epochs(opened(made(3), tmp_path, augment=augment), 1)


def test_events_are_cached_before_they_are_augmented(tmp_path):
    for augment in (data.Augmentation(shift=1), data.Augmentation(shift=2), []):
        for bins in (10, 5):
            opened(made(6), tmp_path, augment=augment, time_bins=bins)
    assert len(list(tmp_path.iterdir())) == 1


# ---- parts


def test_balanced_classes(tmp_path):
    train = opened(made(30), tmp_path)
    few = data.balanced(train, 4, seed=1)
    assert torch.bincount(few.targets).tolist() == [4, 4, 4]
    assert torch.equal(dense(few), dense(data.balanced(train, 4, seed=1)))
    assert not torch.equal(dense(few), dense(data.balanced(train, 4, seed=2)))
    rest, validation, _ = opened((made(30), made(3)), tmp_path, validation=0.2, per_class=5)
    assert torch.bincount(rest.targets).tolist() == [5] * 3 and torch.bincount(validation.targets).tolist() == [2] * 3
    for wrong in (0, 11, 2.0, True):
        with pytest.raises(UsageError, match="per_class"):
            data.balanced(train, wrong)


def test_a_set_without_validation_recordings_of_its_own(tmp_path):
    recordings.ncars(tmp_path)
    with pytest.raises(UsageError, match="ncars has no validation recordings"):
        data.load("ncars", tmp_path, cache_dir=tmp_path, validation="own")


# ---- from_tonic


def test_pairs_and_single_sets(tmp_path):
    first, second = made(6), made(4, seed=1)
    train, test = opened((first, second), tmp_path)
    assert len(train) == 6 and len(test) == 4 and train.classes == 3
    assert torch.equal(dense(opened(first, tmp_path)), dense(train))
    alone = opened(tuple(second[:2]), tmp_path)  # a sequence of two recordings is no pair
    assert torch.equal(dense(alone), dense(test)[:, :2])
    rest, held_out = opened(first, tmp_path, validation=0.5)
    assert len(rest) == len(held_out) == 3


def test_what_is_not_given_follows_from_the_events(tmp_path):
    parts = made(9)
    found = data.from_tonic(parts, cache_dir=tmp_path)
    assert found.sample_shape == (2, 5, 6) and found.classes == 3 and found.time_bins == 20
    longest = max(int(events["t"].max()) for events, _ in parts) + 1
    width = -(-longest // 20)
    assert torch.equal(dense(found), dense(opened(parts, tmp_path, time_bins=20, bin_us=width)))
    full = data.from_tonic(parts, cache_dir=tmp_path, time_bins="full", bin_us=100)
    assert full.lengths.tolist() == [int(events["t"].max()) // 100 + 1 for events, _ in parts]
    units = data.from_tonic([(events[["t", "x"]], label) for events, label in parts], cache_dir=tmp_path)
    assert units.sample_shape == (6,)


def test_clock_and_alignment(tmp_path):
    parts = made(5)
    later = [(events.copy(), label) for events, label in parts]
    for events, _ in later:
        events["t"] += 10**12
    first = [int(events["t"].min()) for events, _ in parts]
    aligned = opened(later, tmp_path, align=True, bin_us=1, time_bins=1000)
    assert torch.equal(
        aligned[2][0][: 1000 - first[2]], opened(parts, tmp_path, bin_us=1, time_bins=1000)[2][0][first[2] :]
    )
    coarse = opened(parts, tmp_path, clock_us=1000.0, bin_us=100_000)
    assert torch.equal(dense(coarse), dense(opened(parts, tmp_path)))
    with pytest.raises(UsageError, match="align=True"):
        data.from_tonic(later, cache_dir=tmp_path)


def test_names_are_numbered_in_alphabetical_order(tmp_path):
    parts = [(events, ("zebra", "ant", "cow")[label]) for events, label in made(6)]
    found = opened((parts, parts[1:2]), tmp_path)
    assert found[0].targets.tolist() == [2, 0, 1, 2, 0, 1] and found[1].targets.tolist() == [0]
    assert found[0].classes == 3


@pytest.mark.parametrize("parts, complaint", [
    ([], "not empty"),
    (3, "got int"),
    ([(np.zeros((3, 2)), 0)], "has events of type ndarray, which is no structured array"),
    ([made(1)[0][0]], "recording 0 .* is ndarray, not a pair"),
    ([(np.zeros(3, np.dtype([("t", int)])), 0)], "need t and x"),
    ([(made(1)[0][0], -1)], "label -1"),
    ([(made(1)[0][0], 0.5)], "label 0.5"),
    ([(made(1)[0][0], 10**9)], "label 1000000000.*0 to 9999"),
    ([(made(1)[0][0], float("inf"))], "label inf"),
    ([(made(1)[0][0], np.eye(3)[0])], "label array"),
    (floats(1.0, np.nan), "recording 0 .* no numbers of microseconds"),
    (floats(1.0, 1e30), "no numbers of microseconds"),
    (floats(-1.0, np.inf), "before time 0"),
    (floats(1.0, x=np.nan), "x=nan"),
    (floats(1.0, x=9.3e18), "x=9.3e"),
    ([(np.zeros(3, [("t", "U3"), ("x", int)]), 0)], "no numbers of microseconds"),
    ([(made(1)[0][0], 0), (made(1)[0][0], "a")], "label 'a'"),
])  # fmt: skip
def test_what_is_no_set_of_events_is_told(parts, complaint, tmp_path):
    with pytest.raises(UsageError, match=complaint):
        opened(parts, tmp_path)


@pytest.mark.parametrize("options, complaint", [
    ({"sensor_size": (5, 5, 2)}, "x=5, outside the sensor"),
    ({"clock_us": 0}, "clock_us"),
    ({"clock_us": float("inf")}, "clock_us"),
    ({"align": "no"}, "align"),
    ({"classes": 2.5}, "classes"),
    ({"seed": 0.5}, "seed"),
    ({"classes": 2}, "label 2"),
    ({"time_bins": 0}, "time_bins"),
])  # fmt: skip
def test_wrong_arguments_of_from_tonic_are_told(options, complaint, tmp_path):
    with pytest.raises(UsageError, match=complaint):
        opened(made(9), tmp_path, **options)


def test_tonics_transforms_and_files_are_part_of_the_cache(tmp_path, monkeypatch):
    tonic = pytest.importorskip("tonic")
    recordings.dvsgesture(tmp_path)
    reads = recordings.reads_of(tonic.datasets.DVSGesture, monkeypatch)

    def load(**arguments):
        before = len(reads)
        given = tonic.datasets.DVSGesture(save_to=str(tmp_path), **arguments)
        return data.from_tonic(given, cache_dir=tmp_path / "cache"), len(reads) > before

    flip = tonic.transforms.RandomFlipLR(sensor_size=(128, 128, 2), p=1)
    assert [load()[1], load()[1], load(train=False)[1], load(transform=flip)[1], load(transform=flip)[1]] == [
        True, False, True, True, False,
    ]  # fmt: skip
    assert torch.equal(load(transform=flip)[0][0][0], load()[0][0][0].flip(3))
    recordings.write_npy(tmp_path / "DVSGesture/ibmGestureTrain/user09_led/1.npy", [(0, 0, 0, 0)])
    found, read = load()
    assert read and len(found) == 3
    nameless = lambda events: events[:1]  # noqa: E731
    assert load(transform=nameless)[1] and load(transform=nameless)[1]  # told apart by its events


def test_a_changed_sequence_is_read_again(tmp_path):
    parts = made(4)
    before = dense(opened(parts, tmp_path))
    parts[0][0]["x"][:] = 0
    assert not torch.equal(before, dense(opened(parts, tmp_path)))


# ---- streaming


def test_streamed_recordings_equal_those_in_memory(tmp_path):
    for augment in (None, data.Augmentation(shift=1)):
        memory, disk = (opened(made(20), tmp_path, stream=stream, augment=augment) for stream in (False, True))
        assert torch.equal(memory.lengths, disk.lengths)
        for a, b in zip(epochs(memory, 1, shuffle=True), epochs(disk, 1, shuffle=True), strict=True):
            assert torch.equal(a, b)
        for workers in (0, 1):
            assert torch.equal(
                epochs(memory, 1)[0], epochs(pickle.loads(pickle.dumps(disk)), 1, num_workers=workers)[0]
            )
    assert len(pickle.dumps(disk)) < 5_000


def test_only_large_files_are_streamed_by_default(tmp_path, monkeypatch):
    stays = lambda dataset: not isinstance(dataset._source.binned.records, np.ndarray)  # noqa: E731
    assert not stays(opened(made(4), tmp_path))
    monkeypatch.setattr(cache, "_memory", lambda: 100)
    assert stays(opened(made(4), tmp_path)) and not stays(opened(made(4), tmp_path, stream=False))


def test_a_replaced_cache_file_is_told_where_it_is_opened_again(tmp_path):
    disk = opened(made(4), tmp_path, stream=True)
    held = pickle.dumps(disk)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(UsageError, match=re.escape(str(file))):
        pickle.loads(held)
    file.unlink()
    with pytest.raises(UsageError, match="load the data set again"):
        pickle.loads(held)
    assert dense(disk).sum() > 0  # what is open stays readable


def test_a_damaged_file_is_not_streamed(tmp_path):
    expected = dense(opened(made(8), tmp_path, stream=True))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 50)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        assert torch.equal(dense(opened(made(8), tmp_path, stream=True)), expected)


def test_chunks_are_written_one_at_a_time(tmp_path):
    alive = []

    def parts():
        for seed in range(5):
            chunk = data.from_tonic(made(3, seed), cache_dir=tmp_path / "parts", time_bins=4, bin_us=250)
            rows = chunk._source.binned
            alive.append(seed)
            yield rows

    written = cache.cached(tmp_path, "set", "key", "state", lambda: cache.Chunks(
        {"train": parts(), "test": parts()}, (2, 5, 6), None
    ), stream=True)  # fmt: skip
    assert written.classes == 3 and len(written.train.labels) == 15 and alive == [0, 1, 2, 3, 4] * 2
    assert not isinstance(written.train.records, np.ndarray)


def build_at_once(folder: Path, start) -> None:
    start.wait()
    for turn in range(5):
        for path in Path(folder).glob("*.bin"):
            path.unlink(missing_ok=True)
        found = data.from_tonic(
            made(30), sensor_size=SENSOR, time_bins=10, bin_us=100, cache_dir=folder, stream=turn % 2 == 0
        )
        assert torch.equal(dense(found), torch.load(Path(folder).parent / "expected.pt"))


def test_two_processes_build_one_cache_at_once(tmp_path):
    torch.save(dense(opened(made(30), tmp_path / "other")), tmp_path / "expected.pt")
    context = multiprocessing.get_context("fork")
    start = context.Event()
    processes = [context.Process(target=build_at_once, args=(tmp_path / "cache", start)) for _ in range(2)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(list((tmp_path / "cache").iterdir())) <= 1


# ---- real recordings


def test_real_recordings(tmp_path):
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "n-mnist-1000"
    if not folder.is_dir():
        pytest.skip("no n-mnist-1000 in ../shared/data")
    tonic = pytest.importorskip("tonic")
    plain, test = data.load("nmnist", folder, cache_dir=tmp_path, binary=True)
    assert len(plain) == 900 and len(test) == 100 and 0.04 < dense(test).float().mean() < 0.06
    augment = data.Augmentation(event_drop=True, shift=2)
    train, validation, _ = data.load(
        "nmnist",
        folder,
        cache_dir=tmp_path,
        binary=True,
        validation=0.1,
        augment=augment,
        polarity="merged",
        downsample=2,
    )
    x, _ = next(iter(data.loader(train, 64, shuffle=True)))
    assert x.shape == (20, 64, 1, 17, 17) and 0.01 < x.float().mean() < 0.2 and len(validation) == 91
    item = tonic.io.read_mnist_file(str(next((folder / "NMNIST/Test/0").glob("*.bin"))), tonic.datasets.NMNIST.dtype)
    alone = opened([(item, 0)], tmp_path, sensor_size=(34, 34, 2), time_bins=20, bin_us=15_000, binary=True)
    assert any(torch.equal(alone[0][0], part) for part in dense(test).unbind(1))
