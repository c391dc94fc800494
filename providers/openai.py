"""OpenAI: the wire format itself."""

from typing import ClassVar

from .http import HttpProvider
from .profile import Profile


class OpenAI(HttpProvider):
    """api.openai.com; base64 halves the reply and keeps every bit of the float32 values."""

    profile: ClassVar[Profile] = Profile(
        base_url="https://api.openai.com/v1",
        api_key_env="OPENAI_API_KEY",
        encoding_format="base64",
        accepts_tokens=True,
        dimensions_field="dimensions",
        sends_user=True,
    )
