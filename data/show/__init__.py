"""`fluxfill shards show`: statistics and pictures of a cache, and grids for people."""
