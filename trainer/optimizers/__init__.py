"""The optimizers, the learning rate, and which of their state can be cut and moved."""
