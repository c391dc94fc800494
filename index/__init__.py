"""The Qdrant side: what is written to a vector index, and what is read from one. Knows no HTTP.

connection opens a server or a folder, and says what a server is too old for; failures says how it
fails. collection makes collections, tells whose vectors they hold, and looks at those that are
there. A point goes from indexer through the outbox (outbox_file: its file; outbox_purge deletes
from it) to the sender, and by that to Qdrant. search finds what is nearest to a vector.
collection_reader reads the points of a collection, also as pairs of text and vector.

A migration, in migration/: template says which text a point stands for, regime where its new vector
comes from, journal what has been done. migrate begins one, copy proves by samples and carries the
points by pages, with vectors of embed; verify and switch bring it into use, and seen says what has
changed meanwhile. points writes to Qdrant, collections makes and switches what is there.
"""
