"""Turns inputs into vectors by asking an upstream. Knows no cache, HTTP server or configuration."""
