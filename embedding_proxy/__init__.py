"""A caching proxy for OpenAI-compatible embeddings, as a library.

::

    import embedding_proxy

    result = embedding_proxy.embed(["some text"], model="wordllama-embed")
    result.vectors  # float32, shape (1, 256)

`embed` is for scripts and notebooks: it blocks until the vectors are there. Code that runs on an
event loop opens an `EmbeddingService` instead.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embedding_proxy.proxy.service.embedding_result import Result
    from embedding_proxy.proxy.service.embedding_service import EmbeddingService

    from .proxy.blocking import close, embed

    __version__: str

__all__ = ["EmbeddingService", "Result", "__version__", "close", "embed"]

_PLACES = {
    "EmbeddingService": "proxy.service.embedding_service",
    "Result": "proxy.service.embedding_result",
    "close": "proxy.blocking",
    "embed": "proxy.blocking",
}

# In a checkout, the packages lie beside this folder. In an installed copy they lie inside it.
_ROOT = Path(__file__).parents[1]
if (_ROOT / "pyproject.toml").is_file() and not (Path(__file__).parent / "proxy").exists():
    __path__.append(str(_ROOT))


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: `embedding-proxy --help` needs none of them."""
    import importlib.metadata  # noqa: PLC0415

    if name == "__version__":
        return importlib.metadata.version("embedding-proxy")
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{place}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
