"""What a training step keeps: the whole sequence, or chunks of time."""
