from ulr_snn.scan.reference import leaky_drive, scan, shift

__all__ = ["leaky_drive", "scan", "shift"]
