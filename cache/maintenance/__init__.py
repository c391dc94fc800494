"""What people do with a store beside serving from it: look, mend, copy, carry."""
