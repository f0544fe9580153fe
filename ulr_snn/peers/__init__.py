"""What likelihood ratios are compared with: `METHODS`, by the name that `compare` takes."""

from ulr_snn.peers.surrogate import SurrogateBPTT

METHODS = {"surrogate": SurrogateBPTT}
