"""Providers that need more than a profile, or a class of their own: OpenAI, OpenRouter and Azure.

OpenAI is the wire format itself. OpenRouter speaks it with floats only, and its errors have integer
codes, also inside a reply of status 200. Azure OpenAI takes the key in a header of its own, and has
deployments in place of models.
"""

from collections.abc import Mapping
from typing import ClassVar
from urllib.parse import quote

from .openai_compatible import HttpProvider
from .profile import Profile


class OpenAI(HttpProvider):
    """api.openai.com; base64 halves the reply and keeps every bit of the float32 values."""

    profile: ClassVar[Profile] = Profile(
        base_url="https://api.openai.com/v1",
        api_key_env="OPENAI_API_KEY",
        encoding_format="base64",
        accepts_tokens=True,
        dimensions_field="dimensions",
        forward_user=True,
    )


class OpenRouter(HttpProvider):
    """openrouter.ai; it may answer floats although base64 was asked, so floats are asked.

    Its option `provider` holds OpenRouter's routing preferences (order, only, data_collection, …).
    """

    profile: ClassVar[Profile] = Profile(
        base_url="https://openrouter.ai/api/v1",
        api_key_env="OPENROUTER_API_KEY",
        # OpenRouter asks its callers to name themselves; HTTP-Referer is the operator's to set.
        headers={"X-Title": "embedding-proxy"},
        accepts_tokens=True,
        dimensions_field="dimensions",
        forward_user=True,
        options={"provider": None},
    )

    def fixed_fields(self) -> Mapping[str, object]:
        """Send the routing preferences with every call."""
        routing = self.options.get("provider")
        return {} if routing is None else {"provider": routing}


class Azure(HttpProvider):
    """A resource of one's own; a route's `model` is the name of a deployment.

    With a base URL that ends in `/openai/v1` it is asked as OpenAI is. With the option
    `api_version`, and a base URL that ends in `/openai`, by the older path of the deployment.
    """

    profile: ClassVar[Profile] = Profile(
        api_key_env="AZURE_OPENAI_API_KEY",
        key_header="api-key",
        key_prefix="",
        encoding_format="base64",
        accepts_tokens=True,
        dimensions_field="dimensions",
        forward_user=True,
        names_models=False,
        options={"api_version": None},
    )

    def path(self, model: str) -> str:
        """Return the path of a deployment."""
        version = self.options.get("api_version")
        if version is None:
            return "/embeddings"
        deployment = quote(model, safe="")
        return f"/deployments/{deployment}/embeddings?api-version={quote(str(version), safe='')}"
