"""Profiles: declarations, as data, of how upstreams differ from OpenAI's embeddings API.

A profile has the limits of calls (`Limits`), the time limits (`Timeouts`), the wire format and the
fields that an upstream knows. `PROFILES` are those of upstreams that need no code of their own.

Sources: the vendors' API references, autumn 2026. A limit that a vendor does not publish is left at
the default of `Limits`, or at None; each can be overridden in the configuration.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from .network import Network


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one provider; None means that there is none, or that none is known."""

    inputs: int = 2048
    """Inputs in one call."""
    tokens: int | None = 300_000
    """Tokens in one call, all inputs together."""
    concurrency: int = 8
    """Calls at the same time."""
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    from_headers: bool = True
    """Whether the limits in the upstream's reply headers (`x-ratelimit-…`) are kept, too."""
    bytes: int | None = None
    """Bytes of all texts in one call; learned when the upstream refuses larger calls."""

    def share(self, processes: int) -> "Limits":
        """Return the share of one of so many processes, so that together they keep the limits.

        Each makes at least one call at a time: with more processes than `concurrency` there may be
        as many calls as processes. What is allowed a minute is divided exactly.

        >>> Limits(concurrency=8, requests_per_minute=3).share(2).requests_per_minute
        1.5
        >>> [Limits(concurrency=8).share(n).concurrency for n in (1, 2, 3, 16)]
        [8, 4, 2, 1]
        """
        if processes == 1:
            return self
        requests, tokens = self.requests_per_minute, self.tokens_per_minute
        return replace(
            self,
            concurrency=max(1, self.concurrency // processes),
            requests_per_minute=None if requests is None else requests / processes,
            tokens_per_minute=None if tokens is None else tokens / processes,
        )


def limits_of(provider: object) -> Limits:
    """Return the limits that a provider declares; the defaults if it declares none."""
    limits = getattr(provider, "limits", None)
    return limits if isinstance(limits, Limits) else Limits()


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long one attempt may take, in seconds; the request's own deadline ends it earlier."""

    total_s: float = 60.0
    """From the first byte sent to the last received."""
    connect_s: float = 10.0
    first_byte_s: float | None = None
    """Until the reply begins; None = the total."""
    min_bytes_per_s: float = 100.0
    """The attempt fails if the reply arrives slower than this over a whole window."""
    min_rate_window_s: float = 15.0


_PLAIN_HEADERS = frozenset({"http-referer", "referer", "user-agent", "x-title"})
"""Headers whose values are no secrets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """How one upstream differs from OpenAI. A configuration may override each field."""

    base_url: str | None = None
    """The address up to, and without, `/embeddings`; None where every operator has their own."""
    api_key_env: str | None = None
    """The variable that holds the key; None where none is needed."""
    key_header: str = "Authorization"
    key_prefix: str = "Bearer "
    by_client: bool = False
    """Whether each client's own key is sent, that of `Context.credential`; then no other is."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Sent with every call, beside the key."""
    encoding_format: Literal["base64", "float"] | None = "float"
    """The one wire format ever asked of it: two may differ in the last bits. None sends no such
    field, for upstreams that refuse it."""
    accepts_tokens: bool = False
    """Whether token arrays may be sent as they are."""
    dimensions_field: str | None = None
    """What it calls the width of a vector; None where it cannot be told a width. Sent only for a
    model whose native width must be asked for (`Space.send_dimensions`)."""
    forward_user: bool = False
    """Whether the request's `user` is passed on; else it is dropped, since it changes no number."""
    extra_fields: frozenset[str] | None = None
    """The further request fields it knows; others are refused. None passes every field on."""
    neutral_fields: frozenset[str] = frozenset()
    """Request fields that change no number and are passed on, as `Context.neutral`; they belong to
    no space. The proxy drops such fields elsewhere."""
    unit_norm: bool = False
    """Whether all its vectors have length 1, whatever the model; one that has not is refused."""
    names_models: bool = True
    """Whether its replies name a model as it was asked for; otherwise they are not compared."""
    limits: Limits = field(default_factory=Limits)
    timeouts: Timeouts = field(default_factory=Timeouts)
    network: Network = field(default_factory=Network)
    """How it is reached: directly, or through an HTTP proxy, and whom certificates must be of."""
    options: Mapping[str, object] = field(default_factory=dict, repr=False)
    """What else its adapter can be told, with defaults; the configuration may set these alone."""

    def secrets(self, api_key: str | None) -> Iterator[str]:
        """Yield the keys and passwords that are sent to this upstream and to nobody else."""
        if api_key:
            yield api_key
        for name, value in self.headers.items():
            if name.lower() not in _PLAIN_HEADERS and value.split():
                # Without the scheme, such as `Bearer`.
                yield value.split()[-1]
        yield from self.network.secrets(self.base_url or "")


# A local server handles few calls at a time; more would only wait inside it.
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
"""Profiles by provider kind; `openai_compatible` is for upstreams that are not listed."""
