"""Pictures where they are (folders, tars, tables) -> triples, each looked at once."""
