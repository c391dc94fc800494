"""The HTTP servers behind providers: the way there, rate limits, and what they answer."""
