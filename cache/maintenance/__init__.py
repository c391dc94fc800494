"""Maintenance of a store: statistics, verification, repair, backup, archives and imports."""
