"""The known embedding models, as data: width, price, context, and where each can be bought.

Sources: OpenAI's model pages and OpenRouter's list of embedding models, autumn 2026. A model that
is missing here is added in the configuration, without code.
"""

from dataclasses import dataclass

from .tokens import CL100K


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One model. `routes` are (provider, upstream model) in order of preference."""

    space: str
    dimensions: int
    price: float
    """USD per million tokens."""
    routes: tuple[tuple[str, str], ...]
    matryoshka: bool = False
    dimensions_refused: bool = False
    """Whether OpenAI refuses `dimensions` for it even at the native width."""
    tokenizer: str | None = None
    unit_norm: bool = False
    """Whether all vectors have length 1, so that any other length is a sign of something wrong."""
    context: int = 8192
    """The most tokens one input may have."""


def _openai(name: str, dimensions: int, price: float, *, matryoshka: bool) -> dict[str, ModelEntry]:
    entry = ModelEntry(
        space=f"openai/{name}",
        dimensions=dimensions,
        price=price,
        routes=(("openai", name), ("openrouter", f"openai/{name}")),
        matryoshka=matryoshka,
        dimensions_refused=not matryoshka,
        tokenizer=CL100K,
        unit_norm=True,
    )
    # OpenRouter's clients say `openai/…` for the same model: one space, one price paid.
    return {name: entry, entry.space: entry}


def _openrouter(name: str, dimensions: int, price: float, context: int) -> dict[str, ModelEntry]:
    return {name: ModelEntry(name, dimensions, price, (("openrouter", name),), context=context)}


CATALOGUE: dict[str, ModelEntry] = {
    **_openai("text-embedding-3-small", 1536, 0.02, matryoshka=True),
    **_openai("text-embedding-3-large", 3072, 0.13, matryoshka=True),
    **_openai("text-embedding-ada-002", 1536, 0.10, matryoshka=False),
    **_openrouter("google/gemini-embedding-001", 3072, 0.15, 20_000),
    **_openrouter("qwen/qwen3-embedding-8b", 4096, 0.01, 32_000),
    **_openrouter("qwen/qwen3-embedding-4b", 2560, 0.02, 32_000),
    **_openrouter("qwen/qwen3-embedding-0.6b", 1024, 0.01, 32_000),
    **_openrouter("mistralai/mistral-embed-2312", 1024, 0.10, 8_192),
    **_openrouter("baai/bge-m3", 1024, 0.01, 8_192),
    **_openrouter("baai/bge-large-en-v1.5", 1024, 0.01, 512),
    **_openrouter("baai/bge-base-en-v1.5", 768, 0.005, 512),
    **_openrouter("intfloat/multilingual-e5-large", 1024, 0.01, 512),
    **_openrouter("thenlper/gte-large", 1024, 0.01, 512),
    "wordllama-embed": ModelEntry(
        space="wordllama/l2-supercat-256",
        dimensions=256,
        price=0.0,
        routes=(("local", "l2_supercat_256"),),
        matryoshka=True,
        unit_norm=True,
    ),
}
