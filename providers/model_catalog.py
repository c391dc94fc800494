"""The known embedding models, as data: width, price, longest input, and where each can be bought.

Sources: the model and price pages of the vendors named, and OpenRouter's list of embedding models,
autumn 2026. What was not certain was left out. A model that is missing here is added in the
configuration, without code.

One model at two providers is two spaces here, though its weights be public and the same: they may
be served at different precisions, and 16 bits or 8 give other numbers than 32. Only OpenAI's own
models, which OpenRouter passes on to OpenAI, share theirs. An operator who has compared two
providers may give both models one space.
"""

from dataclasses import dataclass

from .tokens import CL100K


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One model. `routes` are (provider, upstream model) in order of preference."""

    space: str
    dimensions: int
    """The native width; 0 where it is not known."""
    price: float
    """USD per million tokens; 0 for what runs on one's own machine, or has no known price."""
    routes: tuple[tuple[str, str], ...]
    matryoshka: bool = False
    reject_dimensions: bool = False
    """Whether OpenAI refuses `dimensions` for it even at the native width."""
    send_dimensions: bool = False
    """Whether the native width is asked for by name, since the upstream has several."""
    tokenizer: str | None = None
    unit_norm: bool = False
    """Whether all vectors have length 1, so that any other length is a sign of something wrong."""
    max_input_tokens: int = 8192
    """The most tokens one input may have."""


def _openai(name: str, dimensions: int, price: float, *, matryoshka: bool) -> dict[str, ModelEntry]:
    entry = ModelEntry(
        space=f"openai/{name}",
        dimensions=dimensions,
        price=price,
        routes=(("openai", name), ("openrouter", f"openai/{name}")),
        matryoshka=matryoshka,
        reject_dimensions=not matryoshka,
        tokenizer=CL100K,
        unit_norm=True,
    )
    # OpenRouter's clients say `openai/…` for the same model: one space, one price paid.
    return {name: entry, entry.space: entry}


def _openrouter(
    name: str, dimensions: int, price: float, max_input_tokens: int, *, matryoshka: bool = False
) -> dict[str, ModelEntry]:
    routes = (("openrouter", name),)
    entry = ModelEntry(
        name, dimensions, price, routes, matryoshka=matryoshka, max_input_tokens=max_input_tokens
    )
    return {name: entry}


def _own(  # noqa: PLR0913 - the facts of a model
    provider: str,
    name: str,
    dimensions: int,
    price: float,
    max_input_tokens: int,
    *,
    matryoshka: bool = False,
    unit_norm: bool = False,
    send_dimensions: bool = False,
) -> dict[str, ModelEntry]:
    """Return a model by the name that its one provider gives it, in that provider's space."""
    return {
        name: ModelEntry(
            space=f"{provider}/{name}",
            dimensions=dimensions,
            price=price,
            routes=((provider, name),),
            matryoshka=matryoshka,
            send_dimensions=send_dimensions,
            unit_norm=unit_norm,
            max_input_tokens=max_input_tokens,
        )
    }


def _voyage(name: str, price: float) -> dict[str, ModelEntry]:
    return _own("voyage", name, 1024, price, 32_000, matryoshka=True, unit_norm=True)


def by_name(name: str) -> ModelEntry:
    """Return what can be said of a model from its name alone: where to ask for it.

    A plain name is one of OpenAI's, which OpenRouter may have too; with a vendor before it, it is
    one of OpenRouter's. Its width is 0: not known.

    >>> by_name("text-embedding-9").routes
    (('openai', 'text-embedding-9'), ('openrouter', 'openai/text-embedding-9'))
    >>> by_name("vendor/model").routes
    (('openrouter', 'vendor/model'),)
    """
    vendor, slash, plain = name.rpartition("/")
    if not slash or vendor == "openai":
        routes = (("openai", plain), ("openrouter", f"openai/{plain}"))
        return ModelEntry(space=f"openai/{plain}", dimensions=0, price=0.0, routes=routes)
    return ModelEntry(space=name, dimensions=0, price=0.0, routes=(("openrouter", name),))


CATALOGUE: dict[str, ModelEntry] = {
    **_openai("text-embedding-3-small", 1536, 0.02, matryoshka=True),
    **_openai("text-embedding-3-large", 3072, 0.13, matryoshka=True),
    **_openai("text-embedding-ada-002", 1536, 0.10, matryoshka=False),
    **_openrouter("google/gemini-embedding-001", 3072, 0.15, 20_000, matryoshka=True),
    **_openrouter("qwen/qwen3-embedding-8b", 4096, 0.01, 32_000, matryoshka=True),
    **_openrouter("qwen/qwen3-embedding-4b", 2560, 0.02, 32_000, matryoshka=True),
    **_openrouter("qwen/qwen3-embedding-0.6b", 1024, 0.01, 32_000, matryoshka=True),
    **_openrouter("mistralai/mistral-embed-2312", 1024, 0.10, 8_192),
    **_openrouter("baai/bge-m3", 1024, 0.01, 8_192),
    **_openrouter("baai/bge-large-en-v1.5", 1024, 0.01, 512),
    **_openrouter("baai/bge-base-en-v1.5", 768, 0.005, 512),
    **_openrouter("intfloat/multilingual-e5-large", 1024, 0.01, 512),
    **_openrouter("thenlper/gte-large", 1024, 0.01, 512),
    **_own("mistral", "mistral-embed", 1024, 0.10, 8_192, unit_norm=True),
    **_own("mistral", "codestral-embed", 1536, 0.15, 8_192, matryoshka=True, send_dimensions=True),
    **_voyage("voyage-4-large", 0.12),
    **_voyage("voyage-4", 0.06),
    **_voyage("voyage-4-lite", 0.02),
    **_voyage("voyage-3.5", 0.06),
    **_voyage("voyage-3.5-lite", 0.02),
    **_voyage("voyage-code-3", 0.18),
    **_own("jina", "jina-embeddings-v3", 1024, 0.0, 8_192, matryoshka=True),
    **_own("cohere", "embed-v4.0", 1536, 0.12, 128_000, matryoshka=True),
    **_own("cohere", "embed-english-v3.0", 1024, 0.10, 512),
    **_own("cohere", "embed-multilingual-v3.0", 1024, 0.10, 512),
    **_own("gemini", "gemini-embedding-001", 3072, 0.15, 2_048, matryoshka=True, unit_norm=True),
    **_own("together", "intfloat/multilingual-e5-large-instruct", 1024, 0.02, 512),
    **_own("deepinfra", "BAAI/bge-m3", 1024, 0.01, 8_192),
    **_own("dashscope", "text-embedding-v4", 1024, 0.07, 8_192, matryoshka=True),
    **_own("dashscope", "text-embedding-v3", 1024, 0.07, 8_192, matryoshka=True),
    **_own("ollama", "nomic-embed-text", 768, 0.0, 2_048),
    **_own("ollama", "mxbai-embed-large", 1024, 0.0, 512),
    **_own("ollama", "bge-m3", 1024, 0.0, 8_192),
    **_own("ollama", "all-minilm", 384, 0.0, 256),
    "wordllama-embed": ModelEntry(
        space="wordllama/l2-supercat-256",
        dimensions=256,
        price=0.0,
        routes=(("local", "l2_supercat_256"),),
        matryoshka=True,
        unit_norm=True,
    ),
}
