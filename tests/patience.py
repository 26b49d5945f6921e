"""Patience of tests: how long one waits for what must come."""

PATIENCE = 900.0
"""Seconds: many times what the busiest machine has needed, and below the limit of a test (pyproject.toml). Only what
hangs is waited for that long."""
