"""What makes calls out of inputs: parts, gathered requests, limits."""
