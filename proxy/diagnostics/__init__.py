"""Providers tested on purpose: `check` and `compare`."""
