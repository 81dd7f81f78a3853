"""Training a head: a whole run, its time, the network with gradients, losses, steps, scores."""
