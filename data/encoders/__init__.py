"""Pixels and captions -> the tensors that FLUX.1-Fill trains on."""
