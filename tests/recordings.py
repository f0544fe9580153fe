"""Writers of small recordings in the file formats and folders of the data sets that `load` knows.

Events are lists of (x, y, time in microseconds, polarity).
"""

import struct
from pathlib import Path

import numpy as np
import pytest

Events = list[tuple[int, int, int, int]]

DV_HEADER = """<dv version="2.0"><node name="outInfo" path="/mainloop/Recorder/outInfo/">
<node name="0" path="/mainloop/Recorder/outInfo/0/"><attr key="compression" type="string">NONE</attr>
<attr key="originalModuleName" type="string">capture</attr><attr key="originalOutputName" type="string">events</attr>
<attr key="typeDescription" type="string">Array of events.</attr><attr key="typeIdentifier" type="string">EVTS</attr>
<node name="info" path="/mainloop/Recorder/outInfo/0/info/"><attr key="sizeX" type="int">128</attr>
<attr key="sizeY" type="int">128</attr><attr key="source" type="string">none</attr></node></node></node></dv>"""


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_bin(path: Path, events: Events) -> None:
    """N-MNIST and N-Caltech101: 40 bits an event, x, y, polarity and 23 bits of time."""
    write(path, b"".join(bytes([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255]) for x, y, t, p in events))


def write_npy(path: Path, events: Events) -> None:
    """tonic's DVS128 Gesture: [events, 4] with x, y, polarity and milliseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.array([(x, y, p, t / 1_000) for x, y, t, p in events], np.float64).reshape(-1, 4))


def write_aedat4(path: Path, packets: list[Events]) -> None:
    """CIFAR10-DVS: AEDAT 4, uncompressed. Its parts are flatbuffers, written byte by byte."""
    text = DV_HEADER.encode()
    vtable = struct.pack("<HHHHHxx", 10, 12, 8, 0, 4)  # fields: compression, no position of a table, the text
    table = struct.pack("<iIi", len(vtable), 8, 0)
    header = (
        struct.pack("<I4s", 8 + len(vtable), b"IOHE") + vtable + table + struct.pack("<I", len(text)) + text + b"\0"
    )
    content = b"#!AER-DAT4.0\r\n" + struct.pack("<I", len(header)) + header
    for events in packets:
        vtable = struct.pack("<HHHxx", 6, 8, 4)  # field: the events
        table = struct.pack("<iI", len(vtable), 4)
        body = b"".join(struct.pack("<qhh?xxx", t, x, y, p) for x, y, t, p in events)
        packet = struct.pack("<I4s", 8 + len(vtable), b"EVTS") + vtable + table + struct.pack("<I", len(events)) + body
        content += struct.pack("<ii", 0, 4 + len(packet)) + struct.pack("<I", len(packet)) + packet
    write(path, content)


def write_dat(path: Path, events: Events, version: int = 2) -> None:
    """N-CARS: lines of text, the type and size of an event, then 32 bits of time and of address for each event."""
    columns, rows = {1: (9, 8), 2: (14, 14)}[version]
    text = f"% Data file containing TD events.\n% Version {version}\n% Date 2018-01-01 12:00:00\n".encode()
    body = b"".join(struct.pack("<II", t, x | y << columns | p << columns + rows) for x, y, t, p in events)
    write(path, text + bytes([0, 8]) + body)


def write_mat(path: Path, events: Events) -> None:
    """ASL-DVS: MATLAB columns, y upwards on 180 rows."""
    from scipy.io import savemat

    path.parent.mkdir(parents=True, exist_ok=True)
    x, y, t, p = (np.array(column, np.int64).reshape(-1, 1) for column in zip(*events, strict=True))
    savemat(path, {"x": x.astype(np.uint8), "y": (179 - y).astype(np.uint8), "ts": t.astype(np.uint32), "pol": p})


def write_idx(folder: Path, split: str, images: np.ndarray, labels: list[int]) -> None:
    """MNIST's pictures [n, 28, 28] and labels."""
    images = images.astype(np.uint8)
    write(folder / f"{split}-images-idx3-ubyte", struct.pack(">IIII", 2051, len(images), 28, 28) + images.tobytes())
    write(folder / f"{split}-labels-idx1-ubyte", struct.pack(">II", 2049, len(labels)) + bytes(labels))


def write_h5(path: Path, samples: list[tuple[list[float], list[int]]], labels: list[int], names: int) -> None:
    """SHD and SSC: times in seconds and units of each sample."""
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for column, (name, kind) in enumerate((("times", np.float16), ("units", np.uint16))):
            rows = file.create_dataset(f"spikes/{name}", (len(samples),), dtype=h5py.vlen_dtype(kind))
            for i, sample in enumerate(samples):
                rows[i] = np.array(sample[column], kind)
        file["labels"] = np.array(labels, np.uint16)
        file["extra/keys"] = np.array([f"name {i}".encode() for i in range(names)])
        file["extra/speaker"] = np.zeros(len(labels), np.uint16)


# ---- whole data sets of a few recordings

# One file of the training set of each.
FILES = {
    "nmnist": "NMNIST/Train/3/00001.bin",
    "shd": "SHD/shd_train.h5",
    "ssc": "SSC/ssc_train.h5",
    "dvsgesture": "DVSGesture/ibmGestureTrain/user01_led/10.npy",
    "cifar10dvs": "CIFAR10DVS/truck/cifar10_truck_0.aedat4",
    "ncaltech101": "NCALTECH101/Caltech101/accordion/image_0000.bin",
    "ncars": "NCARS/train/cars/obj_000000_td.dat",
    "asldvs": "ASLDVS/k/k_0000.mat",
    "smnist": "smnist/train-images-idx3-ubyte",
}
LIBRARIES = {"nmnist": "tonic", "shd": "h5py", "ssc": "h5py", "cifar10dvs": "aedat", "asldvs": "scipy",
             "dvsgesture": "numpy", "ncars": "numpy", "smnist": "numpy", "ncaltech101": "tonic"}  # fmt: skip


def nmnist(root: Path) -> None:
    for split in ("Train", "Test"):
        for digit in "37":
            events = [(3, 4, 0, 1), (33, 33, 1_000, 0), (5, int(digit), 299_999, 1)]
            write_bin(root / f"NMNIST/{split}/{digit}/00001.bin", events)


def shd(root: Path) -> None:
    for split in ("train", "test"):
        write_h5(root / f"SHD/shd_{split}.h5", [([0.0, 0.5], [3, 90]), ([0.25], [3])], [1, 0], 10)


def ssc(root: Path) -> None:
    for split, label in (("train", 34), ("valid", 1), ("test", 2)):
        write_h5(root / f"SSC/ssc_{split}.h5", [([0.0, 0.5], [label, 699]), ([0.25], [3])], [label, 0], 35)


def dvsgesture(root: Path) -> None:
    first = [(127, 0, 5_000, 1), (127, 0, 6_000, 1), (3, 64, 104_000, 0), (3, 64, 105_000, 0)]
    write_npy(root / "DVSGesture/ibmGestureTrain/user01_led/10.npy", first)
    write_npy(root / "DVSGesture/ibmGestureTrain/user02_lab/0.npy", [(1, 2, 0, 1), (1, 2, 6_000_000, 1)])
    write_npy(root / "DVSGesture/ibmGestureTest/user03_natural/3.npy", [(9, 9, 77_000, 0)])


def cifar10dvs(root: Path) -> None:
    start = 1_499_000_000_000_000  # microseconds since 1970
    for name in ("airplane", "truck"):
        for number in range(5):
            last = [(number, 6, start + 80_000, 1)]
            packets = [[(1, 2, start, 1), (127, 0, start + 70_000, 0)], last]
            write_aedat4(root / f"CIFAR10DVS/{name}/cifar10_{name}_{number}.aedat4", packets)


def ncaltech101(root: Path) -> None:
    for name in ("accordion", "BACKGROUND_Google", "yin_yang"):
        for number in range(5):
            events = [(10, 20, 0, 1), (249, 199, 20_000, 0), (10 + number, 20, 299_999, 1), (11, 21, 300_000, 1)]
            write_bin(root / f"NCALTECH101/Caltech101/{name}/image_{number:04d}.bin", events)


def ncars(root: Path) -> None:
    for split in ("train", "test"):
        for name, x in (("background", 0), ("cars", 119)):
            events = [(x, 99, 0, 1), (5, 6, 99_999, 0), (5, 6, 100_000, 0)]
            write_dat(root / f"NCARS/{split}/{name}/obj_000000_td.dat", events)


def asldvs(root: Path) -> None:
    for letter in "aky":
        for number in range(5):
            events = [(239, 0, 1_000, 1), (0, 179, 6_000 + number, 0)]
            write_mat(root / f"ASLDVS/{letter}/{letter}_{number:04d}.mat", events)


def smnist(root: Path) -> None:
    draw = np.random.default_rng(0)
    for split, count in (("train", 4), ("t10k", 2)):
        images = np.where(draw.random((count, 28, 28)) < 0.3, draw.integers(0, 256, (count, 28, 28)), 0)
        images[0, 3, 3:6] = 255
        write_idx(root / "smnist", split, images, list(range(count)))


def reads_of(dataset: type, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns the indices at which a data set of tonic is read from now on. Its files count as there."""
    monkeypatch.setattr(dataset, "_check_exists", lambda self: True)
    reads: list[int] = []
    item = dataset.__getitem__
    monkeypatch.setattr(dataset, "__getitem__", lambda self, i: reads.append(i) or item(self, i))
    return reads
