"""The disk cache of binned recordings. It has one file for each data set and binning, and rebuilds stale files."""

import hashlib
import os
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ulr_snn.data.binning import Binned

FORMAT = 1


@dataclass(frozen=True)
class BinnedSplits:
    """Both binned splits of a data set, its sample shape and its number of classes."""

    train: Binned
    test: Binned
    sample_shape: tuple[int, ...]
    classes: int


def cached(
    cache_dir: str | os.PathLike[str] | None, name: str, key: str, fingerprint: str, build: Callable[[], BinnedSplits]
) -> BinnedSplits:
    """Returns the result of `build`, from the cache if the cached file is current.

    A file that is missing, stale or damaged is built again. If it cannot be written, a warning says so.

    cache_dir: default `ULR_SNN_CACHE`, else ~/.cache/ulr_snn.
    key: the request (source folder, binning). fingerprint: the state of the source. Only the key is part of the file's
        name, so that a changed source replaces its old file.
    """
    folder = Path(cache_dir or os.environ.get("ULR_SNN_CACHE") or Path.home() / ".cache" / "ulr_snn").expanduser()
    digest = hashlib.blake2b(f"{FORMAT}\n{name}\n{key}".encode(), digest_size=8).hexdigest()
    path = folder / f"{name}-{digest}.npz"
    splits = _read(path, fingerprint)
    if splits is None:
        splits = build()
        try:
            _write(path, fingerprint, splits)
        except OSError as error:
            warnings.warn(
                f"{name} is not cached and will be read anew ({error}); set cache_dir= or ULR_SNN_CACHE",
                stacklevel=3,
            )
    return splits


def _read(path: Path, fingerprint: str) -> BinnedSplits | None:
    try:
        # np.load would leave a handle of its own open if the zip is damaged.
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            if str(file["fingerprint"]) != fingerprint:
                return None
            train, test = (
                Binned(**{f.name: file[f"{split}_{f.name}"] for f in fields(Binned)}) for split in ("train", "test")
            )
            return BinnedSplits(train, test, tuple(file["sample_shape"].tolist()), int(file["classes"]))
    except Exception:
        # A missing or damaged file raises anything from FileNotFoundError and BadZipFile to MemoryError (a wrong size).
        # The remedy is the same for all. The zip's checksums detect damaged data.
        return None


def _write(path: Path, fingerprint: str, splits: BinnedSplits) -> None:
    arrays = {
        f"{split}_{f.name}": getattr(getattr(splits, split), f.name)
        for split in ("train", "test")
        for f in fields(Binned)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # The file is written under another name and then moved in one step, so that readers see a complete file or none.
    temporary = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            shape, classes = splits.sample_shape, splits.classes
            np.savez(file, fingerprint=fingerprint, sample_shape=shape, classes=classes, **arrays)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
