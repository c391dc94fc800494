"""The parts of a migration, from the plan to the end of the old collection."""
