"""The official client as Azure's: another path, another header for the key."""

from cases import run
from openai import AzureOpenAI

client = AzureOpenAI(api_version="2024-10-21")
MODEL = "text-embedding-3-small"


def embed(given: object) -> list:
    """Embed with what Azure calls a deployment."""
    reply = client.embeddings.create(model=MODEL, input=given)
    return [item.embedding for item in reply.data]


run(["openai"], embed=embed)
