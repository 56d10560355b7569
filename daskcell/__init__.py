"""daskcell."""
