"""The sizes from which other code is faster on a CPU."""

from dataclasses import dataclass


@dataclass
class KernelLimits:
    """Sizes that decide which code runs. They change speed and memory, never results.

    block: bytes in a block of rows, so small that torch's temporaries stay in the cache and in the process.
    smallest: least bytes of an array of the pool; smaller memory seldom returns to the system.
    density: share of non-zero inputs beyond which a dense product is faster.
    fewest: least number of inputs for which sparse layers pay.
    share: share of a dense convolution's multiply-adds beyond which the dense one is faster.
    """

    block: int = 1 << 22
    smallest: int = 1 << 20
    density: float = 0.1
    fewest: int = 1 << 16
    share: float = 0.1


limits = KernelLimits()
