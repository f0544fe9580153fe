"""What a spike does to the loss, and the formula that makes gradients of it."""
