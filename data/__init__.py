"""Pictures -> triples -> shards -> batches. Knows neither the trainer nor accelerate."""
