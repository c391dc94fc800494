"""LlamaIndex's embedding for what is like OpenAI."""

import os

from cases import run
from llama_index.embeddings.openai_like import OpenAILikeEmbedding

embedding = OpenAILikeEmbedding(
    model_name="text-embedding-3-small",
    api_base=os.environ["OPENAI_BASE_URL"],
    api_key=os.environ["OPENAI_API_KEY"],
)


def embed(given: str | list[str]) -> list:
    """Embed a query or texts."""
    if isinstance(given, str):
        return [embedding.get_query_embedding(given)]
    return embedding.get_text_embedding_batch(given)


run(["llama-index-embeddings-openai-like", "openai"], embed=embed)
