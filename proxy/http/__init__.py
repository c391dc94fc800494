"""The HTTP server: routes, connections, what a client is told."""
