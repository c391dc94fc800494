"""Chroma's embedding function, called, and as a collection calls it."""

from cases import run
from chromadb import EphemeralClient
from chromadb.utils.embedding_functions import OpenAIEmbeddingFunction

embedding_function = OpenAIEmbeddingFunction()


def called(given: str | list[str]) -> list:
    """Embed what the function is called with."""
    return embedding_function([given] if isinstance(given, str) else given)


def collected(given: str | list[str]) -> list:
    """Add to a collection, and return what it keeps."""
    client = EphemeralClient()
    collection = client.create_collection("texts", embedding_function=embedding_function)
    documents = [given] if isinstance(given, str) else given
    ids = [f"{i:05}" for i in range(len(documents))]
    try:
        collection.add(ids=ids, documents=documents)
        kept = collection.get(ids, include=["embeddings"])
    finally:
        client.delete_collection("texts")
    vectors = dict(zip(kept["ids"], kept["embeddings"], strict=True))
    return [vectors[one] for one in ids]


run(["chromadb", "openai"], called=called, collected=collected)
