"""The cache: buys each vector once. Knows spaces and inputs, but no provider by name."""
