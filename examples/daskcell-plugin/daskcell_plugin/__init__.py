"""What this package adds to daskcell: see the entry points in pyproject.toml."""
