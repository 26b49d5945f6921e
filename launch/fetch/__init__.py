"""`fluxfill fetch`: a model's folder for runs that have no network, from a hub or from other programs' files."""
