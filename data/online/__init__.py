"""Batches encoded while a run trains."""
