"""Loops over time and over rows: a plain reference in torch, and compiled code for CPUs and GPUs."""
