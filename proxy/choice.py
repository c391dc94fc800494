"""Which models a check looks at: enough to try every provider, and not the whole catalogue."""

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from .config import ConfigError
from .settings import Settings


@dataclass(frozen=True, slots=True)
class Choice:
    """Which models are looked at."""

    named: Sequence[str]
    must_work: bool = True
    """Whether a named model that has no usable route is a problem."""
    also: Literal["nothing", "each provider", "all"] = "each provider"
    """Beside them: one model of each usable provider that no named one leads to, or all models."""


def choose(settings: Settings, choice: Choice, usable: Collection[str]) -> list[str]:
    """Return the models to look at. Raises ConfigError for a name that there is not."""

    def providers_of(name: str) -> set[str]:
        return {route.provider for route in settings.models[name].routes} & {*usable}

    for name in choice.named:
        if name not in settings.models:
            near = difflib.get_close_matches(name, settings.models, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else "add it to `models`"
            raise ConfigError(f"--model: there is no model {name!r}; {hint}")
    chosen = dict.fromkeys(choice.named)
    covered = {provider for name in chosen for provider in providers_of(name)}
    for name in settings.models:
        new = providers_of(name) - covered
        if (choice.also == "each provider" and new) or (
            choice.also == "all" and providers_of(name)
        ):
            chosen[name] = None
            covered |= new
    # What shares a space shares its vectors, whoever asks for them under which name.
    spaces = {settings.models[name].space for name in chosen}
    shared = [name for name, model in settings.models.items() if model.space in spaces]
    return list(chosen | dict.fromkeys(name for name in shared if providers_of(name)))
