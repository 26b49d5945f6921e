"""Fills of a run's checkpoints: of pictures of one's own, and measured against others."""
