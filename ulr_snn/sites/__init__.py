"""The places where noise enters a model: firing, input currents and weights."""
