"""Pending inputs, and the batches that buy them."""
