"""The adapter or model that a run leaves: written, read back and compared."""
