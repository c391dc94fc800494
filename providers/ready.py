"""Upstreams that speak OpenAI's embeddings and need no code, as data.

Sources: the vendors' API references, autumn 2026. A limit that a vendor does not publish is left at
the default of `Limits`, or at None; each can be overridden in the configuration.
"""

from .limits import Limits
from .profile import Profile

# What a local server can do at once is little; more calls would only wait inside it.
_LOCAL = Limits(inputs=256, tokens=None, concurrency=4)

PROFILES: dict[str, Profile] = {
    "openai_compatible": Profile(limits=Limits(tokens=None)),
    "mistral": Profile(
        base_url="https://api.mistral.ai/v1",
        api_key_env="MISTRAL_API_KEY",
        dimensions_field="output_dimension",
        extra_fields=frozenset(),
        unit_norm=True,
        # A call of 257 inputs is refused with code 3210 (public reports of 2026).
        limits=Limits(inputs=256, tokens=16_384),
    ),
    "voyage": Profile(
        base_url="https://api.voyageai.com/v1",
        api_key_env="VOYAGE_API_KEY",
        # It knows `base64` or nothing, and nothing means floats.
        encoding_format=None,
        dimensions_field="output_dimension",
        extra_fields=frozenset({"input_type", "truncation"}),
        unit_norm=True,
        # 120,000 tokens is the least that one of its models takes in a call.
        limits=Limits(inputs=1000, tokens=120_000),
    ),
    "jina": Profile(
        base_url="https://api.jina.ai/v1",
        api_key_env="JINA_API_KEY",
        # `encoding_format` is `embedding_type` here, and floats are its default.
        encoding_format=None,
        dimensions_field="dimensions",
        # Not `late_chunking`: it mixes the inputs of a call, so no vector would be an input's own.
        extra_fields=frozenset({"task", "normalized", "truncate"}),
        limits=Limits(inputs=512, tokens=None, concurrency=5),
    ),
    "cohere": Profile(
        base_url="https://api.cohere.ai/compatibility/v1",
        api_key_env="COHERE_API_KEY",
        extra_fields=frozenset({"input_type"}),
        limits=Limits(inputs=96, tokens=None),
    ),
    "gemini": Profile(
        base_url="https://generativelanguage.googleapis.com/v1beta/openai",
        api_key_env="GEMINI_API_KEY",
        dimensions_field="dimensions",
        extra_fields=frozenset(),
        # Replies may name `models/…`.
        names_models=False,
        limits=Limits(inputs=100, tokens=None),
    ),
    "together": Profile(
        base_url="https://api.together.xyz/v1",
        api_key_env="TOGETHER_API_KEY",
        encoding_format=None,
        extra_fields=frozenset(),
        limits=Limits(tokens=None),
    ),
    "deepinfra": Profile(
        base_url="https://api.deepinfra.com/v1/openai",
        api_key_env="DEEPINFRA_API_KEY",
        dimensions_field="dimensions",
        extra_fields=frozenset(),
        limits=Limits(inputs=1024, tokens=None),
    ),
    "dashscope": Profile(
        base_url="https://dashscope-intl.aliyuncs.com/compatible-mode/v1",
        api_key_env="DASHSCOPE_API_KEY",
        dimensions_field="dimensions",
        extra_fields=frozenset(),
        limits=Limits(inputs=10, tokens=None),
    ),
    "ollama": Profile(
        base_url="http://127.0.0.1:11434/v1",
        dimensions_field="dimensions",
        extra_fields=frozenset(),
        limits=_LOCAL,
    ),
    "vllm": Profile(
        base_url="http://127.0.0.1:8000/v1",
        dimensions_field="dimensions",
        limits=_LOCAL,
    ),
    "tei": Profile(
        # No address: it has none of its own (its container's port is mapped at will).
        extra_fields=frozenset(),
        names_models=False,
        limits=Limits(inputs=32, tokens=None, concurrency=4),
    ),
    "infinity": Profile(
        base_url="http://127.0.0.1:7997",
        dimensions_field="dimensions",
        extra_fields=frozenset(),
        limits=_LOCAL,
    ),
    "lm_studio": Profile(
        base_url="http://127.0.0.1:1234/v1",
        extra_fields=frozenset(),
        names_models=False,
        limits=_LOCAL,
    ),
    "llama_cpp": Profile(
        # No address: its default port, 8080, is this proxy's too.
        extra_fields=frozenset(),
        names_models=False,
        limits=_LOCAL,
    ),
}
"""Profiles by the name of the kind; `openai_compatible` is for what is not listed."""
