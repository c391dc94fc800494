"""From the inputs of many requests to the calls of an upstream."""
