"""LlamaIndex's embedding for OpenAI."""

import asyncio
import atexit

from cases import run
from llama_index.embeddings.openai import OpenAIEmbedding

embedding = OpenAIEmbedding()
loop = asyncio.Runner()
atexit.register(loop.close)


def at_once(given: str | list[str]) -> list:
    """Embed a query or texts."""
    if isinstance(given, str):
        return [embedding.get_query_embedding(given)]
    return embedding.get_text_embedding_batch(given)


def later(given: str | list[str]) -> list:
    """Embed the same with what is awaited."""
    if isinstance(given, str):
        return [loop.run(embedding.aget_query_embedding(given))]
    return loop.run(embedding.aget_text_embedding_batch(given))


run(["llama-index-embeddings-openai", "openai"], at_once=at_once, later=later)
