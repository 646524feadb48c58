"""The composition root and the command line; nothing imports this package."""
