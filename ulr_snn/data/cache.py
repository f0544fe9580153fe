"""The disk cache of recordings: one file for each data set and binning, rebuilt when it is stale or damaged.

A file holds a header of 16 bytes (a mark, and where the index begins), the records of all splits, and the index, an npz
archive of the other arrays. It is written chunk by chunk, so that a data set may be larger than memory.
"""

import hashlib
import io
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ulr_snn.data.binning import Binned, Rows, join
from ulr_snn.data.mapped import MappedRecords, block_sums
from ulr_snn.errors import UsageError

FORMAT = 2
MARK = b"ulr-snn2"
HEADER = 16
SPLITS = ("train", "validation", "test")
ABANDONED = 3_600  # seconds without a write, after which a file was left by a process that has been killed
MEMORY_SHARE = 0.5  # a file that is larger than this share of the machine's memory stays on disk


@dataclass(frozen=True)
class BinnedSplits:
    """The splits of a data set, its sample shape and its number of classes."""

    train: Rows
    test: Rows
    sample_shape: tuple[int, ...]
    classes: int
    validation: Rows | None = None


@dataclass(frozen=True)
class Chunks:
    """The splits of a data set as chunks of recordings, of which one is in memory at a time.

    splits: "train", "test" and, if the data set has it, "validation".
    classes: the number of classes, or None for 1 + the largest label.
    """

    splits: Mapping[str, Iterable[Rows]]
    sample_shape: tuple[int, ...]
    classes: int | None
    kind: type[Rows] = Binned


def cached(
    cache_dir: str | os.PathLike[str] | None,
    name: str,
    key: str,
    fingerprint: str,
    build: Callable[[], BinnedSplits | Chunks],
    stream: bool | None = False,
) -> BinnedSplits:
    """Returns the recordings of `build`, from the cache if the cached file is current.

    A file that is missing, stale or damaged is built again. If it cannot be written, a warning says so.

    cache_dir: default `ULR_SNN_CACHE`, else ~/.cache/ulr_snn.
    key: the request (source folder, binning). fingerprint: the state of the source. Only the key is part of the file's
        name, so that a changed source replaces its old file.
    stream: whether records stay on disk, memory-mapped; None: only if they are larger than half of the memory.
    """
    folder = Path(cache_dir or os.environ.get("ULR_SNN_CACHE") or Path.home() / ".cache" / "ulr_snn").expanduser()
    digest = hashlib.blake2b(f"{FORMAT}\n{name}\n{key}".encode(), digest_size=8).hexdigest()
    path = folder / f"{name}-{digest}.bin"
    try:
        with path.open("rb") as file:
            splits = _read(path, file, fingerprint, stream)
    except OSError:
        splits = None
    if splits is None:
        try:
            return _write(path, fingerprint, _chunks(build()), stream)
        except OSError as error:
            warnings.warn(
                f"{name} is not cached and will be read anew ({error}); set cache_dir= or ULR_SNN_CACHE",
                stacklevel=6,  # the caller of `load`
            )
            splits = _collect(_chunks(build()))
    return splits


def _chunks(content: BinnedSplits | Chunks) -> Chunks:
    if isinstance(content, Chunks):
        return content
    found = {split: getattr(content, split) for split in SPLITS}
    splits = {split: [rows] for split, rows in found.items() if rows is not None}
    return Chunks(splits, content.sample_shape, content.classes, type(content.train))


def _collect(chunks: Chunks) -> BinnedSplits:
    splits = {split: join(list(parts)) for split, parts in chunks.splits.items()}
    classes = chunks.classes or 1 + max(int(rows.labels.max(initial=0)) for rows in splits.values())
    return BinnedSplits(splits["train"], splits["test"], chunks.sample_shape, classes, splits.get("validation"))


def _read(path: Path, file: IO[bytes], fingerprint: str, stream: bool | None) -> BinnedSplits | None:
    """Returns the recordings of an open cache file, or None if it is stale or damaged."""
    try:
        file.seek(0)
        header = file.read(HEADER)
        start = int.from_bytes(header[8:], "little")
        file.seek(start)
        with np.load(io.BytesIO(file.read()), allow_pickle=False) as index:
            if header[:8] != MARK or str(index["fingerprint"]) != fingerprint:
                return None
            if not np.array_equal(block_sums(file, HEADER, start), index["sums"]):
                return None
            stays = (start > MEMORY_SHARE * _memory()) if stream is None else stream
            kind = {cls.__name__: cls for cls in Rows.__subclasses__()}[str(index["kind"])]
            splits, offset = {}, HEADER
            for split in index["splits"].tolist():
                rows = [index[f"{split}_{column}"] for column in ("offsets", "labels", "lengths")]
                records = MappedRecords(path, file, offset, int(rows[0][-1]), index[f"{split}_dtype"].dtype)
                splits[split] = kind(records if stays else records[:].copy(), *rows)
                offset += records.nbytes
            shape, classes = tuple(index["sample_shape"].tolist()), int(index["classes"])
            return BinnedSplits(splits["train"], splits["test"], shape, classes, splits.get("validation"))
    except UsageError:
        raise
    except Exception:
        # A damaged file raises anything from BadZipFile to MemoryError (a wrong size). The remedy is the same for all.
        return None


def _write(path: Path, fingerprint: str, chunks: Chunks, stream: bool | None) -> BinnedSplits:
    """Writes a cache file and returns its recordings."""
    made = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    # The file is written under another name and then moved in one step, so that readers see a complete file or none.
    temporary = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.tmp")
    for left in path.parent.glob(f"{path.stem}-*.tmp"):
        with suppress(OSError):  # another process has removed it
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()
    try:
        with temporary.open("x+b") as file:
            file.write(bytes(HEADER))
            index = _write_records(file, chunks)
            start = file.tell()
            file.flush()
            archive = io.BytesIO()
            sums = block_sums(file, HEADER, start)
            np.savez(archive, fingerprint=fingerprint, sums=sums, kind=chunks.kind.__name__, **index)
            file.seek(start)
            file.write(archive.getvalue())
            file.seek(0)
            file.write(MARK + start.to_bytes(8, "little"))
            file.flush()
            os.replace(temporary, path)
            splits = _read(path, file, fingerprint, stream)  # of this file, whatever has taken its name since
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if made and not isinstance(error, OSError):
            with suppress(OSError):  # another process may use it by now
                path.parent.rmdir()
        raise
    if splits is None:
        raise OSError(f"{path} does not hold what was written to it")
    return splits


def _write_records(file: IO[bytes], chunks: Chunks) -> dict[str, Any]:
    """Appends the records of all splits to the file, chunk by chunk. Returns the arrays of the index."""
    index: dict[str, Any] = {"splits": list(chunks.splits), "sample_shape": chunks.sample_shape}
    largest = 0
    for split, parts in chunks.splits.items():
        sizes, labels, lengths = [], [], []
        for part in parts:
            file.write(np.ascontiguousarray(part.records).view(np.uint8).data)
            sizes.append(np.diff(part.offsets))
            labels.append(part.labels)
            lengths.append(part.lengths)
            index[f"{split}_dtype"] = np.empty(0, part.records.dtype)
        index[f"{split}_offsets"] = np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64)
        index[f"{split}_labels"], index[f"{split}_lengths"] = np.concatenate(labels), np.concatenate(lengths)
        largest = max(largest, int(index[f"{split}_labels"].max(initial=0)))
    index["classes"] = chunks.classes or 1 + largest
    return index


def _memory() -> int:
    """Returns the machine's memory in bytes."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on this system
        return 2**34
