"""The page that shows people what the proxy saves: sessions, live samples, failovers, and files."""
