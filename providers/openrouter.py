"""OpenRouter: OpenAI's format, floats only, errors with integer codes, also inside a 200."""

from collections.abc import Mapping
from typing import ClassVar

from .http import HttpProvider
from .profile import Profile


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
        sends_user=True,
        options={"provider": None},
    )

    def fixed_fields(self) -> Mapping[str, object]:
        """Send the routing preferences with every call."""
        routing = self.options.get("provider")
        return {} if routing is None else {"provider": routing}
