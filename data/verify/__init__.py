"""`fluxfill shards verify [--repair]`: a cache checked against its checksums, and mended."""
