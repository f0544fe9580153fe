"""Run directories, the command line, and pictures."""
