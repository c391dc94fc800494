"""Never pays twice for one vector. Sees spaces and inputs, and knows no provider by name."""
