"""What a step of training takes, counted without a GPU: the real model and the project's own code on fake tensors."""
