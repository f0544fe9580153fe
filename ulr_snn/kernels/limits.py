"""The sizes from which other code is faster."""

from dataclasses import dataclass


@dataclass
class KernelLimits:
    """Sizes that decide which code runs. They change speed and memory, never results.

    block: bytes in a block of rows, so small that torch's temporaries stay in the cache and in the process.
    smallest: least bytes of an array of the pool; smaller memory seldom returns to the system.
    density: share of non-zero inputs beyond which a dense product is faster.
    fewest: least number of inputs for which sparse layers pay.
    narrow: width of pictures up to which convolutions are faster with channels first.
    share: share of a dense convolution's multiply-adds beyond which the dense one is faster.
    recurrent: largest number of neurons of a recurrent layer that a GPU runs by one kernel. A wider layer runs step by
        step, since the kernel uses few of the GPU's processors.
    """

    block: int = 1 << 22
    smallest: int = 1 << 20
    density: float = 0.1
    fewest: int = 1 << 16
    narrow: int = 4
    share: float = 0.1
    recurrent: int = 1024


limits = KernelLimits()
