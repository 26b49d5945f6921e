"""Triples -> planned samples -> planned shards -> pixels: buckets, crops, masks."""
