"""From settings to providers and models: keys from the environment, and remedies where none is."""

import logging
from contextlib import AsyncExitStack

import pytest
from conftest import no_wait
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.memory import Memory
from embedding_proxy.cache.tiers import Tiers
from embedding_proxy.providers.base import Context
from embedding_proxy.providers.errors import NoRoute
from embedding_proxy.providers.model_catalog import CATALOGUE
from embedding_proxy.providers.routing.health import HealthRegistry
from embedding_proxy.proxy.config.loader import ConfigError
from embedding_proxy.proxy.config.schema import ProviderConfig, Settings
from embedding_proxy.proxy.service.learned_dimensions import LearnedDimensions
from embedding_proxy.proxy.service.model_registry import Registry
from embedding_proxy.proxy.service.provider_factory import open_providers

SMALL = "text-embedding-3-small"


@pytest.fixture
async def opened(tmp_path):
    """Give a function that returns the open providers and the models of a configuration."""
    async with AsyncExitStack() as stack:
        tiers = Tiers(Memory(0), await stack.enter_async_context(Store(tmp_path, 1 << 30)))

        async def open_settings(**sections):
            settings = Settings.model_validate(sections)
            providers = await open_providers(settings, stack)
            learned = LearnedDimensions(tmp_path / "widths.json")
            registry = Registry(
                settings, providers, tiers, HealthRegistry(), learned, sleep=no_wait
            )
            return providers, registry.models

        yield open_settings


def _at(server, **keys) -> dict[str, object]:
    return {"kind": "openai", "base_url": server.url, **keys}


async def _ask(model) -> None:
    await model.embedder.embed(model.space, ["a"], Context())


@pytest.mark.parametrize(
    ("entry", "variable"),
    [
        ({"kind": "openai"}, "OPENAI_API_KEY"),
        ({"kind": "openrouter"}, "OPENROUTER_API_KEY"),
        ({"kind": "openrouter", "api_key_env": "MINE"}, "MINE"),
        ({"kind": "local"}, None),
        ({"kind": "ollama"}, None),
        ({"kind": "ollama", "api_key_env": "MINE"}, "MINE"),
        ({"kind": "mistral"}, "MISTRAL_API_KEY"),
    ],
)
def test_each_provider_has_its_key_variable(entry, variable):
    """The variable is the kind's unless the entry names one; the local model needs none."""
    assert ProviderConfig(**entry).key_variable == variable


async def test_all_kinds_are_opened_when_they_have_keys(opened, monkeypatch):
    """With both keys set, every default provider is there, and every model that leads to one."""
    monkeypatch.setenv("OPENAI_API_KEY", "a")
    monkeypatch.setenv("OPENROUTER_API_KEY", "b")
    providers, models = await opened()
    assert {name: type(provider).__name__ for name, provider in providers.items()} == {
        "openai": "OpenAI",
        "openrouter": "OpenRouter",
        "local": "Local",
    }
    assert {name for name, model in models.items() if model.usable} == {
        name for name, entry in CATALOGUE.items() if {*dict(entry.routes)} & {*providers}
    }


async def test_a_model_has_what_its_settings_say(opened):
    """The space and the other facts of a model come from its entry."""
    _, models = await opened()
    small, ada = models[SMALL], models["text-embedding-ada-002"]
    assert (small.name, small.space.name, small.price) == (SMALL, f"openai/{SMALL}", 0.02)
    assert (small.space.dimensions, small.space.tokenizer) == (1536, "cl100k_base")
    assert (small.space.matryoshka, small.reject_dimensions) == (True, False)
    assert (ada.space.matryoshka, ada.reject_dimensions) == (False, True)
    assert not small.usable
    assert models["wordllama-embed"].usable


async def test_a_key_is_sent_without_the_white_space_around_it(opened, upstream, monkeypatch):
    """A key read from a file into its variable may end in a newline; it is sent without."""
    monkeypatch.setenv("OPENAI_API_KEY", " openai-key\n")
    _, models = await opened(providers={"openai": _at(upstream)})
    await _ask(models[SMALL])
    assert upstream.calls[0].headers["Authorization"] == "Bearer openai-key"


async def test_a_provider_may_have_any_name_and_its_own_variable(opened, upstream, monkeypatch):
    """A provider under another name takes its key from the variable it names."""
    monkeypatch.setenv("MY_KEY", "mine")
    routes = [{"provider": "gone", "model": "x"}, {"provider": "mine", "model": "m"}]
    _, models = await opened(
        providers={"mine": _at(upstream, api_key_env="MY_KEY"), "gone": None},
        models={SMALL: {"routes": routes}},
    )
    await _ask(models[SMALL])
    assert upstream.calls[0].headers["Authorization"] == "Bearer mine"
    assert upstream.calls[0].payload["model"] == "m"


async def test_a_provider_is_asked_again_as_its_entry_says(opened, upstream, monkeypatch):
    """`retries` of a provider holds for its routes, and says nothing of another's."""
    monkeypatch.setenv("MY_KEY", "mine")
    routes = [{"provider": name, "model": "m"} for name in ("mine", "local")]
    _, models = await opened(
        providers={"mine": _at(upstream, api_key_env="MY_KEY", retries=0)},
        models={SMALL: {"routes": routes}},
    )
    assert [route.retries for route in models[SMALL].router.routes] == [0, None]


@pytest.mark.parametrize("key", ["sk-a\nsk-b", "sk-\u200bcanary", "schlüssel", "sk\tcanary"])
async def test_a_value_that_cannot_be_a_key_is_a_config_error(key, opened, monkeypatch):
    """A key that no header can hold is refused at the start, by its variable, and not shown."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ConfigError, match=r"^OPENAI_API_KEY: its value is no key") as caught:
        await opened()
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    ("providers", "model", "remedy"),
    [
        ({"openai": {}, "openrouter": {}}, SMALL, "set OPENAI_API_KEY or OPENROUTER_API_KEY and"),
        ({"openai": {"api_key_env": "MINE"}}, SMALL, "set MINE and start the proxy again"),
        ({"openai": None, "openrouter": {}}, SMALL, "has a key: set OPENROUTER_API_KEY and"),
        ({"openai": None}, SMALL, "add openai or openrouter to `providers`"),
        ({"local": None}, "wordllama-embed", "add local to `providers`"),
    ],
)
async def test_a_model_without_a_provider_says_what_to_set(
    providers, model, remedy, opened, monkeypatch
):
    """A model that nobody can be asked for names the variables or the providers to add."""
    monkeypatch.setenv("OPENAI_API_KEY", " ")
    _, models = await opened(providers=providers)
    assert not models[model].usable
    with pytest.raises(NoRoute) as caught:
        await _ask(models[model])
    assert f"`{model}`" in str(caught.value)
    assert remedy in str(caught.value)


async def test_a_skipped_provider_is_one_line_in_the_log(opened, caplog):
    """A provider whose key is not set is named in the log with its variable; a null one is not."""
    with caplog.at_level(logging.INFO, "embedding_proxy"):
        providers, _ = await opened(providers={"openai": {}, "openrouter": None, "local": None})
    assert caplog.messages == ["provider openai is skipped: OPENAI_API_KEY is not set"]
    assert not providers
