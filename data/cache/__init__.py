"""The format of a cache: tar, index, manifest; opening one, here or by URL."""
