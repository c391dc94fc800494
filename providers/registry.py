"""The registry of provider kinds: ours, and those that installed packages provide.

A package provides a kind by an entry point of the group `embedding_proxy.providers`. Its name is
the kind's; it refers to a `Profile`, or to a class with a `profile` that is made and used like
`HttpProvider` (deriving from it is the shortest way). It is loaded only when a configuration names
it.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, Self

from embedding_proxy.providers.routing.route import Provider

from . import plugins
from .openai_compatible import HttpProvider
from .profile import PROFILES, Profile
from .vendors import Azure, OpenAI, OpenRouter

LOCAL = "local"
"""The kind without an upstream: a model in this process."""


class OpenedProvider(Provider, Protocol):
    """A provider that is used inside `async with`."""

    async def __aenter__(self) -> Self:
        """Open whatever the provider needs."""
        ...

    async def __aexit__(self, *exc: object) -> None:
        """Close it."""
        ...


class Adapter(Protocol):
    """Makes a provider of one kind."""

    def __call__(
        self,
        name: str,
        profile: Profile,
        *,
        api_key: str | None,
        sleep: Callable[[float], Awaitable[None]],
    ) -> OpenedProvider:
        """Return the provider under the name that the configuration gives it."""
        ...


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of provider: its default profile and its adapter."""

    profile: Profile
    adapter: Adapter = HttpProvider


KINDS: dict[str, Kind] = {
    "openai": Kind(OpenAI.profile, OpenAI),
    "openrouter": Kind(OpenRouter.profile, OpenRouter),
    "azure": Kind(Azure.profile, Azure),
    **{name: Kind(profile) for name, profile in PROFILES.items()},
}
"""The built-in kinds except `local`, which has no profile."""


class UnknownKind(LookupError):
    """There is no such kind, or the package provides something else under its name."""


def find(name: str) -> Kind:
    """Return a kind by its name. Raises UnknownKind, with a message for people.

    >>> find("mistral").profile.base_url
    'https://api.mistral.ai/v1'
    """
    if name in KINDS:
        return KINDS[name]
    names = ", ".join(sorted({*KINDS, LOCAL}))
    absent = f"expected one of {names}, or a kind that an installed package brings"
    where, brought = plugins.load(plugins.PROVIDERS, name, UnknownKind, absent, makes=False)
    if isinstance(brought, Profile):
        return Kind(brought)
    profile = getattr(brought, "profile", None)
    if not callable(brought) or not isinstance(profile, Profile):
        raise UnknownKind(f"{where} is neither a Profile nor a class that has one")
    return Kind(profile, brought)
