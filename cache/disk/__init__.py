"""The disk tier: its file, how it is opened, read, written, and kept under its limit."""
