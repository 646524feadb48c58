"""What a run is: the schema, its defaults and checks, and reading it from files."""
