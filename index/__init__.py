"""The Qdrant side: what is written to a vector index, and what is read from one. Knows no HTTP.

connection opens a server or a folder; failures and translation say how it fails. collection makes
collections and tells whose vectors they hold; claims looks at those that are there. A point goes
from indexer through the outbox (outbox_file: its tables) to the sender and by writing to Qdrant.
points reads a collection as pairs of text and vector.
"""
