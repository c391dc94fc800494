"""The kinds of provider a configuration may name."""

from .http import HttpProvider
from .openai import OpenAI
from .openrouter import OpenRouter

HTTP_KINDS: dict[str, type[HttpProvider]] = {kind.kind: kind for kind in (OpenAI, OpenRouter)}
"""Kinds that ask an upstream over HTTP, by name; `local` is the one that does not."""
