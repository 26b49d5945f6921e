"""`fluxfill gpus`: the GPU profiles there are, and one made of the machine at hand."""
