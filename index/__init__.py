"""The Qdrant side: writes answered vectors to an index, and searches it. Knows no HTTP.

client opens a server or a folder and checks its version; errors defines how Qdrant fails.
collection makes collections and says whose vectors they hold. A point goes from the indexer through
the outbox (outbox_db: its file) and the sender to Qdrant, where upsert writes it; resync sends
again what Qdrant has lost. search finds the nearest points to a vector. collection_reader reads the
points of a collection.

A migration, in migration/: plan shows its cost, runner decides where vectors come from and begins
it, text_template says which text a point stands for, copy carries the points, with vectors of
embedding; verify and cutover bring the new collection into use, and snapshot finds what changed
meanwhile. state keeps the progress on disk, and dual_writes reads there what goes to both
collections; points reads and writes points, vectors compares theirs, and qdrant makes collections
and switches aliases.
"""
