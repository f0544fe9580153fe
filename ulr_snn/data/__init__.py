"""Event data sets: recordings binned in time, batches with time first."""

from ulr_snn.data.events import EventDataset as EventDataset
from ulr_snn.data.events import collate as collate
from ulr_snn.data.events import loader as loader
from ulr_snn.data.registry import Entry as Entry
from ulr_snn.data.registry import Source as Source
from ulr_snn.data.registry import load as load
from ulr_snn.data.registry import register as register
from ulr_snn.data.splits import split as split
