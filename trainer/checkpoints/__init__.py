"""Checkpoints, from which a run goes on: saved, found, resumed."""
