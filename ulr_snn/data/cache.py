"""Binned recordings on disk: one file a data set and way of binning, rebuilt whenever it may be stale."""

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
class Splits:
    """Both splits of a data set, binned, and what their files say about it."""

    train: Binned
    test: Binned
    sample_shape: tuple[int, ...]
    classes: int


def cached(
    cache_dir: str | os.PathLike | None, name: str, key: str, fingerprint: str, build: Callable[[], Splits]
) -> Splits:
    """What `build` returns, from the cache where that is current.

    cache_dir: default `ULR_SNN_CACHE`, else ~/.cache/ulr_snn.
    key: what was asked for (source folder, binning); fingerprint: the state of the source. They are apart so
    that a changed source replaces its old file instead of leaving it behind.
    A file that is missing, stale or damaged is built again. Where it cannot be written, a warning says so.
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
                f"{name} is not cached and will be read anew ({error}); set cache_dir= or ULR_SNN_CACHE.",
                stacklevel=3,
            )
    return splits


def _read(path: Path, fingerprint: str) -> Splits | None:
    try:
        # Opened here, since np.load leaves its own handle open where the zip is damaged.
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            if str(file["fingerprint"]) != fingerprint:
                return None
            train, test = (
                Binned(**{f.name: file[f"{split}_{f.name}"] for f in fields(Binned)}) for split in ("train", "test")
            )
            return Splits(train, test, tuple(file["sample_shape"].tolist()), int(file["classes"]))
    except Exception:
        # Not there yet, or damaged: that raises anything from BadZipFile to MemoryError (a size gone wrong).
        # The cure is the same for all. The zip's own checksums keep damage from passing as data.
        return None


def _write(path: Path, fingerprint: str, splits: Splits) -> None:
    arrays = {
        f"{split}_{f.name}": getattr(getattr(splits, split), f.name)
        for split in ("train", "test")
        for f in fields(Binned)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and moved there in one step: others see a whole file or none.
    temporary = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            np.savez(
                file,
                fingerprint=fingerprint,
                sample_shape=splits.sample_shape,
                classes=splits.classes,
                **arrays,
            )
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
