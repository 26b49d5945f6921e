"""`fluxfill plan`: what a run would take on GPUs that need not be there, and how to start it on them."""
