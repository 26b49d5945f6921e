"""Batches -> a trained FLUX.1-Fill. `trainer/main.py` is the recipe."""
