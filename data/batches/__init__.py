"""Shards -> micro-batches: order, noise, reading."""
