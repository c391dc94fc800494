"""Haystack's two embedders: one for a text, one for documents."""

from cases import run
from haystack import Document
from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder

text_embedder = OpenAITextEmbedder()
document_embedder = OpenAIDocumentEmbedder()


def embed(given: str | list[str]) -> list:
    """Embed a text or documents; one that was not embedded has no vector."""
    if isinstance(given, str):
        return [text_embedder.run(text=given)["embedding"]]
    documents = [Document(content=text) for text in given]
    return [one.embedding for one in document_embedder.run(documents=documents)["documents"]]


run(["haystack-ai", "openai"], embed=embed)
