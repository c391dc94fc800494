"""Turns inputs into vectors by asking an upstream. Knows nothing of caches, HTTP servers or config."""
