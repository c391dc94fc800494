"""OpenAI: the wire format itself."""

from typing import ClassVar, Literal

from .http import HttpProvider


class OpenAI(HttpProvider):
    """api.openai.com; base64 halves the reply and keeps every bit of the float32 values."""

    kind: ClassVar[str] = "openai"
    base_url: ClassVar[str] = "https://api.openai.com/v1"
    api_key_env: ClassVar[str] = "OPENAI_API_KEY"
    encoding_format: ClassVar[Literal["base64", "float"]] = "base64"
