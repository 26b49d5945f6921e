"""The demo's own parts: real photographs cut into triples, and a tiny FLUX-Fill to train on them."""
