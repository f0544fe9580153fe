"""Data sets: recordings binned in time, and signals over time; batches with time first."""

from ulr_snn.data.augment import Augmentation as Augmentation
from ulr_snn.data.binning import Recordings as Recordings
from ulr_snn.data.dynamics import SignalDataset as SignalDataset
from ulr_snn.data.entry import Entry as Entry
from ulr_snn.data.entry import Raw as Raw
from ulr_snn.data.entry import Recorded as Recorded
from ulr_snn.data.entry import Source as Source
from ulr_snn.data.events import EventDataset as EventDataset
from ulr_snn.data.events import collate as collate
from ulr_snn.data.events import loader as loader
from ulr_snn.data.registry import load as load
from ulr_snn.data.registry import register as register
from ulr_snn.data.sequences import from_tonic as from_tonic
from ulr_snn.data.splits import balanced as balanced
from ulr_snn.data.splits import split as split
