"""Two kinds of provider for embedding-proxy, in a package of their own.

After `pip install ./examples/acme_provider` in the environment of the proxy, a configuration can
use `kind: acme` and `kind: acme_plain`.
"""

from typing import ClassVar
from urllib.parse import quote

from embedding_proxy.providers.openai_compatible import HttpProvider
from embedding_proxy.providers.profile import Limits, Profile

# An upstream that differs from OpenAI only in facts needs no class: a Profile is enough.
PLAIN = Profile(
    base_url="https://embeddings.acme.example/v1",
    api_key_env="ACME_API_KEY",
    extra_fields=frozenset({"input_type"}),
    limits=Limits(inputs=64, tokens=20_000, concurrency=4),
)


class Acme(HttpProvider):
    """The API of acme names the model in the path, and needs the project to charge."""

    profile: ClassVar[Profile] = Profile(
        base_url="https://embeddings.acme.example/v2",
        api_key_env="ACME_API_KEY",
        key_header="X-Acme-Key",
        key_prefix="",
        limits=Limits(inputs=64, tokens=20_000, concurrency=4),
        # The options that the configuration may set, with their defaults.
        options={"project": "default"},
    )

    def path(self, model: str) -> str:
        """Return the path below the base URL."""
        return f"/models/{quote(model, safe='')}/embeddings"

    def fixed_fields(self) -> dict[str, object]:
        """Return fields for the body of every call. They must not change a vector."""
        return {"project": self.options["project"]}
