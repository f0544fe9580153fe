"""Noise of all kinds: distributions, scales over the course of training, and counter-based random numbers."""
