"""LangChain: token arrays of its own making, and the texts themselves."""

import asyncio
import atexit

from cases import run
from langchain_openai import OpenAIEmbeddings

embeddings = OpenAIEmbeddings()
as_texts = OpenAIEmbeddings(check_embedding_ctx_length=False)
loop = asyncio.Runner()
atexit.register(loop.close)


def at_once(given: str | list[str], embeddings: OpenAIEmbeddings = embeddings) -> list:
    """Embed a query or documents."""
    if isinstance(given, str):
        return [embeddings.embed_query(given)]
    return embeddings.embed_documents(given)


def later(given: str | list[str]) -> list:
    """Embed the same with what is awaited."""
    if isinstance(given, str):
        return [loop.run(embeddings.aembed_query(given))]
    return loop.run(embeddings.aembed_documents(given))


def texts(given: str | list[str]) -> list:
    """Embed without counting tokens first."""
    return at_once(given, as_texts)


run(["langchain-openai", "openai"], at_once=at_once, later=later, texts=texts)
