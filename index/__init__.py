"""The Qdrant side: writes answered vectors to an index, and searches it. Knows no HTTP.

The way of a point, from the request to Qdrant:

1. `proxy.service.index_writes` makes points of an answer: id, payload, collection.
2. indexer leaves out the points that it knows to be indexed, and puts the others into the outbox.
3. outbox keeps them on disk until Qdrant has them (outbox_db: its file). Then the reply leaves.
4. sender, in one process, writes them to Qdrant in batches. What Qdrant rejects becomes a dead
   letter.

resync sends again what Qdrant has lost. client opens a server or a folder and checks its version;
errors defines how Qdrant fails. collection makes collections and says whose vectors they hold;
collection_reader reads their points; search finds the nearest points to a vector.

A migration, in migration/: plan shows its cost, runner decides where vectors come from and begins
it, text_template says which text a point stands for, copy carries the points, with vectors of
embedding; verify and cutover bring the new collection into use, and snapshot finds what changed
meanwhile. state keeps the progress on disk, and which points go to both collections. points reads,
writes and compares points, and qdrant makes collections and switches aliases.
"""
