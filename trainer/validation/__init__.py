"""Validation: pictures sampled with the live weights, and their figures."""
