"""Ports of this machine for programs that are told on which to listen."""

from benchmarks.ranks import own_port

__all__ = ["own_port"]
