"""The preprocessing job: many workers make one cache. `data/preprocess.py` is its door."""
