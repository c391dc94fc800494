"""Calls that are not ours: passed on to one provider as they are."""
