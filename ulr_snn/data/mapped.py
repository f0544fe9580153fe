"""Records of a cache file that stay on disk."""

import os
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from ulr_snn.errors import UsageError

BLOCK = 2**24


class MappedRecords:
    """A table in a file, memory-mapped: only what is read comes into memory, and leaves it when others need the memory.

    Pickling keeps the place in the file, not the records. The file must then be as it was, or UsageError is raised.
    """

    def __init__(self, path: Path, file: IO[bytes], offset: int, count: int, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.nbytes = count * dtype.itemsize
        self._place = path, offset, count
        self._stamp = _stamp(file)
        # An empty file region cannot be mapped.
        self._table = np.memmap(file, dtype, "r", offset, (count,)) if count else np.empty(0, dtype)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self._table[index])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_table"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        (path, offset, count), stamp = state["_place"], state["_stamp"]
        try:
            with path.open("rb") as file:
                changed = _stamp(file) != stamp
                self.__init__(path, file, offset, count, state["dtype"])  # type: ignore[misc]
        except (OSError, ValueError):
            changed = True
        if changed:
            raise UsageError(f"{path} has changed since the data set was loaded; load the data set again")


def _stamp(file: IO[bytes]) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size


def block_sums(file: IO[bytes], start: int, stop: int) -> np.ndarray:
    """Returns the CRC-32 of each block of 16 MiB of the file's bytes `start` to `stop`, uint32."""
    file.seek(start)
    sums: list[int] = []
    while (left := stop - start - len(sums) * BLOCK) > 0:
        sums.append(zlib.crc32(file.read(min(BLOCK, left))))
    return np.array(sums, np.uint32)
