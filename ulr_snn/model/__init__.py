"""A bound model: its neurons, its input, the way it is called, one stochastic forward pass."""
