"""The parts of a migration, from the plan to the deletion of the old collection."""
