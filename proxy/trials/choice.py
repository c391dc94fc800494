"""Which models a check looks at: enough to try every provider, and not the whole catalogue."""

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from embedding_proxy.proxy.config import ConfigError
from embedding_proxy.proxy.settings import model_entry
from embedding_proxy.proxy.settings.model_entry import ModelConfig
from embedding_proxy.proxy.settings.schema import Settings


@dataclass(frozen=True, slots=True)
class ModelSelection:
    """Which models are looked at."""

    named: Sequence[str]
    """Those of no configuration are asked for by their names alone, as the proxy does it."""
    must_work: bool = True
    """Whether a named model that has no usable route is a problem."""
    also: Literal["nothing", "each provider", "all"] = "each provider"
    """Beside them: one model of each usable provider that no named one leads to, or all models."""


def choose(
    settings: Settings, choice: ModelSelection, usable: Collection[str]
) -> dict[str, ModelConfig]:
    """Return the models to look at, by name. Raises ConfigError for one that there is not."""

    def providers_of(model: ModelConfig) -> set[str]:
        return {route.provider for route in model.routes} & {*usable}

    chosen = {name: settings.models.get(name) or _by_name(settings, name) for name in choice.named}
    for name, model in chosen.items():
        if name not in settings.models and not providers_of(model):
            raise _unknown(settings, name)
    covered = {provider for model in chosen.values() for provider in providers_of(model)}
    for name, model in settings.models.items():
        new = providers_of(model) - covered
        if (choice.also == "each provider" and new) or (
            choice.also == "all" and providers_of(model)
        ):
            chosen.setdefault(name, model)
            covered |= new
    # What shares a space shares its vectors, whoever asks for them under which name.
    spaces = {model.space for model in chosen.values()}
    for name, model in settings.models.items():
        if model.space in spaces and providers_of(model):
            chosen.setdefault(name, model)
    return chosen


def with_stand_ins(settings: Settings, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of models, and of those that may stand in for them."""
    models = [settings.models[name] for name in names if name in settings.models]
    stand_ins = [fallback.model for model in models for fallback in model.fallback]
    return tuple(dict.fromkeys([*names, *stand_ins]))


def _by_name(settings: Settings, name: str) -> ModelConfig:
    """Return a model of which only the name is known, as the proxy would. Raises ConfigError."""
    asks = settings.server.unknown_models == "ask"
    model = model_entry.by_name(name) if asks else None
    if model is None:
        raise _unknown(settings, name)
    return model


def _unknown(settings: Settings, name: str) -> ConfigError:
    near = difflib.get_close_matches(name, settings.models, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else "add it to `models`"
    return ConfigError(f"--model: there is no model {name!r}; {hint}")
