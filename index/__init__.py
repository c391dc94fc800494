"""What lies in a vector index. Sees pairs of text and vector, and no HTTP or configuration."""
