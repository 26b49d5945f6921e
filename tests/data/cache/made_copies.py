"""Copies of shards for the tests of the node cache."""

import threading

from data.cache.node_cache import NodeCache

GIB = 1 << 30


def copies_of(url, cache, tmp_path, *, limit=GIB):
    return NodeCache(url, tmp_path / "node", limit, cache.table, cache.manifest.format_version)


def held(copies, number, **options):
    return copies.open(number, stop=threading.Event(), **options)
