"""The file of the disk tier: opened, read, written, kept under its limit."""
