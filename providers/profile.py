"""What is to be known of an upstream before it is asked: a declaration, as data."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from .limits import Limits, Timeouts
from .network import Network

_PLAIN_HEADERS = frozenset({"http-referer", "referer", "user-agent", "x-title"})
"""Headers whose values an operator tells everybody."""


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
    model whose native width must be asked for (`Space.dimensions_sent`)."""
    sends_user: bool = False
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
        """Yield what this upstream is sent and nobody else may see: keys and passwords."""
        if api_key:
            yield api_key
        for name, value in self.headers.items():
            if name.lower() not in _PLAIN_HEADERS and value.split():
                # Without the scheme, such as `Bearer`.
                yield value.split()[-1]
        yield from self.network.secrets(self.base_url or "")
