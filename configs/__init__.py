"""What a run is: schema, loading, recipes, engine files."""
