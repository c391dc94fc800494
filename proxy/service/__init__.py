"""Embedding without HTTP: models, clients, requests and their results."""
