"""Embed some texts, compare vectors of two dimensions, and search. It needs no server.

    python examples/embed_compare_search.py [CONFIG]

It uses `EmbeddingService`, the proxy without HTTP, with the same cache. The local model needs no
key. With a key, set MODEL to any other model.
"""

import asyncio
import sys

from embedding_proxy.providers import similarity, vector
from embedding_proxy.proxy.service.embedding_service import EmbeddingService

MODEL = "wordllama-embed"
NARROW = 64
DOCUMENTS = [
    "The canteen serves lunch from noon until two.",
    "Two keepers together open the vault.",
    "Bicycles are parked behind the north wing.",
    "Trains to the coast leave every hour.",
    "The library lends books for three weeks.",
]
QUERIES = ["When can I eat lunch?", "Where do I park my bicycle?"]


async def main(config: str | None = None) -> None:
    """Print the cache hits, the agreement of both dimensions, and the nearest documents."""
    texts = [*DOCUMENTS, *QUERIES]
    async with EmbeddingService.from_config(config) as service:
        # Embed. With index=False nothing is written to Qdrant; use it for queries.
        wide = await service.embed(texts, MODEL, index=False)
        again = await service.embed(texts, MODEL, index=False)
        narrow = await service.embed(texts, MODEL, dimensions=NARROW, index=False)
    print(f"{wide.space.name}: {wide.dimensions} numbers a text, {wide.tokens} tokens")
    print(f"the second time: {again.usage.hits} of {len(texts)} from the cache")

    # Compare. The short vectors are cut from the long ones, and find nearly the same neighbours.
    asked = range(len(DOCUMENTS), len(texts))
    found = []
    for result in (wide, narrow):
        vectors = [row.tobytes() for row in result.vectors]
        found.append(similarity.nearest(vectors, asked, among=len(DOCUMENTS), k=2))
    share = similarity.overlap(*found)
    print(f"{NARROW} of {wide.dimensions} numbers: {share:.0%} of the neighbours are the same")

    # Search: the nearest document of each query, with its cosine.
    rows = [row.tobytes() for row in wide.vectors]
    for place, (best, *_) in zip(asked, found[0], strict=True):
        print(f"{vector.cosine(rows[place], rows[best]):.2f}  {texts[place]}  {texts[best]}")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:2]))
