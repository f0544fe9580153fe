"""Credit of spikes for the loss, and the formula that turns credit into gradients."""
