"""Decides which provider is asked, and how often."""
