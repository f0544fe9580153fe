"""Data sets with one file for each recording, in tonic's folders: one module a data set."""
