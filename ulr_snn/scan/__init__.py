from ulr_snn.scan.reference import leaky_drive, scan

__all__ = ["leaky_drive", "scan"]
