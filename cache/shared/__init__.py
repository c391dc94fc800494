"""The shared tier: records, and what else several nodes must agree on, in Redis or Valkey."""
