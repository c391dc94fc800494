"""What decides which provider is asked, and how often."""
