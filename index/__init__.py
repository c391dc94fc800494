"""The Qdrant side: what is written to a vector index, and what is read from one. Knows no HTTP.

connection opens a server or a folder, version says what a server is too old for; failures and
translation say how it fails. collection makes
collections and tells whose vectors they hold; claims looks at those that are there. A point goes
from indexer through the outbox (outbox_file: its file; outbox_purge deletes from it) to the sender,
and by writing to Qdrant. search finds what is nearest to a vector. points reads a collection as
pairs of text and vector.

A migration, in migration/: template says which text a point stands for, regime where its new vector
comes from, journal what has been done. migrate begins one, proof samples, copy carries the points
by pages, with vectors of embed; verify and switch bring it into use, and late follows what seen
says has changed meanwhile. Qdrant is asked by points and collections there.
"""
