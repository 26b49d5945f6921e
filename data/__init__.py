"""Pictures -> triples -> shards -> batches, room by room. Knows neither the trainer nor accelerate.

preprocess.py    the door: `accelerate launch data/preprocess.py`
storage/         bytes on disks and networks: atomic writes, retries, full disks, remote files, strict tars
sources/         pictures where they are -> triples, each looked at once
samples/         triple -> planned sample -> planned shard -> pixels: buckets, crops, masks
encoders/        pixels and captions -> the tensors that FLUX.1-Fill trains on
cache/           the format: tar, index, manifest; opening one, here or by URL
batches/         order, noise, reading, micro-batches
preprocessing/   the job: many workers make one cache
online/          batches encoded while a run trains
verify/          `fluxfill shards verify [--repair]`
show/            `fluxfill shards show`, and grids for people
migrate/         `fluxfill migrate`: three old folders -> a dataset and a report
"""
