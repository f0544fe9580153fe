"""Where noise enters a model: at firing, on input currents, on weights."""
