"""Configuration files, and what they may say."""
