"""The groups of commands that are more than a line or two."""
