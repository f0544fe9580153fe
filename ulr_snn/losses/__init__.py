"""Losses, objectives that combine losses, and their evaluation."""

from ulr_snn.losses.named import LOSSES as LOSSES
from ulr_snn.losses.named import NamedLoss as NamedLoss
from ulr_snn.losses.named import ce_count as ce_count
from ulr_snn.losses.named import ce_rate as ce_rate
from ulr_snn.losses.named import latency as latency
from ulr_snn.losses.named import mse as mse
from ulr_snn.losses.named import negative_return as negative_return
from ulr_snn.losses.named import register as register
from ulr_snn.losses.named import zero_one as zero_one
