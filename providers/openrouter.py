"""OpenRouter: OpenAI's format, floats only, errors with integer codes, also inside a 200."""

from collections.abc import Mapping
from typing import ClassVar

from .http import HttpProvider


class OpenRouter(HttpProvider):
    """openrouter.ai; it may answer floats although base64 was asked, so floats are asked."""

    kind: ClassVar[str] = "openrouter"
    base_url: ClassVar[str] = "https://openrouter.ai/api/v1"
    api_key_env: ClassVar[str] = "OPENROUTER_API_KEY"

    def extra_headers(self) -> Mapping[str, str]:
        """Name the application, as OpenRouter asks its callers to."""
        return {"X-Title": "embedding-proxy"}
