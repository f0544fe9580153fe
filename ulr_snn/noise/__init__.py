"""Firing noise: distributions, its level over a training, and the counter-based numbers that it is drawn from."""
