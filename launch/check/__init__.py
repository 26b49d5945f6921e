"""`fluxfill check`: everything that can fail is tried before GPU hours burn. A module for each subject; run.py is the
order in which they are asked."""
