"""An upstream that embedding-proxy does not know, brought by a package of its own.

Install it beside the proxy (`pip install ./examples/acme_provider`), and `kind: acme` works.
"""

from typing import ClassVar
from urllib.parse import quote

from embedding_proxy.providers.openai_compatible import HttpProvider
from embedding_proxy.providers.profile import Limits, Profile

# What differs from OpenAI only in facts is a Profile, and needs no class.
PLAIN = Profile(
    base_url="https://embeddings.acme.example/v1",
    api_key_env="ACME_API_KEY",
    extra_fields=frozenset({"input_type"}),
    limits=Limits(inputs=64, tokens=20_000, concurrency=4),
)


class Acme(HttpProvider):
    """Names the model in the path, and wants to be told which of one's projects is charged."""

    profile: ClassVar[Profile] = Profile(
        base_url="https://embeddings.acme.example/v2",
        api_key_env="ACME_API_KEY",
        key_header="X-Acme-Key",
        key_prefix="",
        limits=Limits(inputs=64, tokens=20_000, concurrency=4),
        # Names and defaults of what the configuration may say under `options`.
        options={"project": "default"},
    )

    def path(self, model: str) -> str:
        """Return the path below the base URL."""
        return f"/models/{quote(model, safe='')}/embeddings"

    def fixed_fields(self) -> dict[str, object]:
        """Return what every request says beside the inputs. It must not change a vector."""
        return {"project": self.options["project"]}
