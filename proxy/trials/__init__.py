"""Providers put to the test on purpose: whether they work, and which is better."""
