"""Runs of a model: its neurons, its input, the way it is called, and one stochastic forward pass."""
