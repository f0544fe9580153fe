"""Run directories, the command line, callbacks, progress, and pictures."""
