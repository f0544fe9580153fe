"""Copies of a sample: how many, and which noise they share."""
