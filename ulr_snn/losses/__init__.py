"""Losses, objectives made of them, and their evaluation."""
